"""The texts being generated: one row each, growing at its own pace, stopping where plain `generate` stops."""

import sys

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList


class Sequences:
    """Token ids of every row, with the stopping criteria of the call.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            Prompts, padded as they were given.
        stopping_criteria ([`StoppingCriteriaList`]):
            The criteria of the call.
    """

    def __init__(self, input_ids: torch.Tensor, stopping_criteria: StoppingCriteriaList):
        self.prompt_length = input_ids.shape[1]
        self.lengths = [self.prompt_length] * input_ids.shape[0]
        self._ids = input_ids
        self._unwritten: list[list[int]] = [[] for _ in self.lengths]  # emitted, but not in `_ids` yet
        self._max_length = None
        self.eos_ids: set[int] = set()
        # Length and end-of-text need no tensor; exact types, as a subclass may decide otherwise.
        self._criteria = StoppingCriteriaList()
        # Without an end-of-text token plain decoding pads nothing: every row is written until all have ended.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._ended: dict[int, int] = {}  # length at which a row met a criterion
        self._all_criteria = stopping_criteria
        self.unfinished = torch.ones(len(self.lengths), dtype=torch.bool, device=input_ids.device)
        for criterion in stopping_criteria:
            if type(criterion) is MaxLengthCriteria:
                self._max_length = min(criterion.max_length, self._max_length or criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                self.eos_ids |= set(criterion.eos_token_id.tolist())
            else:
                self._criteria.append(criterion)

    def prefix(self, row: int) -> torch.Tensor:
        """Return one row's ids so far, of shape `(1, length)`."""
        self._write(row)
        return self._ids[row : row + 1, : self.lengths[row]]

    def room(self, row: int) -> int:
        """Return how many tokens a row may still grow by; very many where there is no limit."""
        return sys.maxsize if self._max_length is None else self._max_length - self.lengths[row]

    def append(self, row: int, token: int, scores: tuple | None) -> bool:
        """Add a token to a row; return whether that ends the row.

        Args:
            scores (`tuple[torch.FloatTensor]`, *optional*):
                What stopping criteria are shown as scores.
        """
        length = self.lengths[row]
        self._unwritten[row].append(token)
        self.lengths[row] = length + 1
        done = token in self.eos_ids or (self._max_length is not None and length + 1 >= self._max_length)
        for criterion in self._criteria:  # asked for every token, also for one that ends the text anyway
            done = bool(torch.as_tensor(criterion(self.prefix(row), scores)).any()) or done
        if done:
            self._ended.setdefault(row, length + 1)
        if self.pads or length + 1 == self._max_length:
            return done
        return len(self._ended) == len(self.lengths) and length + 1 >= self.final_length

    @property
    def may_overrun(self) -> bool:
        """Whether rows can be written beyond where all end: one then has met a criterion for all of them earlier."""
        return len(self.lengths) > 1 and not self.pads and bool(self._criteria)

    @property
    def final_length(self) -> int:
        """Length of the longest text, once every row has ended."""
        return max(self._ended.values())

    @property
    def ids(self) -> torch.Tensor:
        """The ids of all rows, of shape `(batch, length)`, where they advance together."""
        return self._ids

    def extend(self, token_ids: torch.Tensor) -> None:
        """Add a token to every row, of shape `(batch,)`, where they advance together; `judge` comes next."""
        self._ids = torch.cat([self._ids, token_ids[:, None]], dim=1)  # (batch, length + 1)
        self.lengths = [self._ids.shape[1]] * len(self.lengths)

    def ended_rows(self) -> set[int]:
        """Return the rows that have ended, where rows advance together."""
        return {row for row, unfinished in enumerate(self.unfinished.tolist()) if not unfinished}

    def judge(self, scores: tuple | None) -> bool:
        """Ask all criteria about all rows, as plain decoding does; return whether every row has ended.

        Args:
            scores (`tuple[torch.FloatTensor]`, *optional*):
                Of each step so far, of shape `(batch, vocab)`, where the call keeps them.
        """
        self.unfinished = self.unfinished & ~self._all_criteria(self._ids, scores)
        if self.unfinished.any():
            return False
        self._ended = dict.fromkeys(range(len(self.lengths)), self._ids.shape[1])
        return True

    def padded(self, pad_token_id: torch.Tensor | None) -> torch.Tensor:
        """Return all rows, shorter ones filled up with the pad token, of shape `(batch, longest)`."""
        for row in range(len(self.lengths)):
            self._write(row)
        ids = self._ids[:, : self.final_length].clone()
        for row, length in enumerate(self.lengths):
            if pad_token_id is not None and length < ids.shape[1]:
                ids[row, length:] = pad_token_id
        return ids

    def _write(self, row: int) -> None:
        """Write what was emitted since the ids were last asked for: most calls ask once, at the end."""
        tokens, end = self._unwritten[row], self.lengths[row]
        if not tokens:
            return
        missing = end - self._ids.shape[1]
        if missing > 0:
            room = missing + max(64, end // 2)
            self._ids = torch.cat([self._ids, self._ids.new_zeros(self._ids.shape[0], room)], dim=1)
        self._ids[row, end - len(tokens) : end] = self._ids.new_tensor(tokens)
        self._unwritten[row] = []


__all__ = ["Sequences"]
