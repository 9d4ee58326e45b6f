"""What a call's processors leave possible along paths that are not written yet, so that drafts can be pruned."""

from collections.abc import Collection, Sequence

import torch
from transformers import LogitsProcessor, PrefixConstrainedLogitsProcessor

from .effects import changes_nothing
from .logits_process import MASKING, can_fork, fork


class Lookahead:
    """Answers for one row and one round; processors with a state are asked through forks, and stay where they are.

    Args:
        processors (`Sequence[LogitsProcessor]`):
            Those of the call, in order; what cannot be asked is left out.
        row (`int`):
            The row among those that the processors see.
        prefix (`torch.LongTensor` of shape `(1, length)`):
            The row's tokens so far.
        vocab_size (`int`):
            Width of the scores.
        room (`int`):
            Tokens that may follow the text; plain decoding asks nothing behind them.
        ends (`Collection[int]`):
            Tokens that end the text; nothing is asked behind these either.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        row: int,
        prefix: torch.Tensor,
        vocab_size: int,
        room: int,
        ends: Collection[int],
    ):
        self.processors, self.row = askable(processors), row
        self.prefix, self.vocab_size, self.room, self.ends = prefix, vocab_size, room, ends
        # What has read a path and can go on from it; not there where it raised, so that nobody knows what may follow.
        self.after: dict[tuple[int, ...], list[LogitsProcessor]] = {}
        self.answers: dict[tuple[int, ...], torch.Tensor] = {}  # a builder that waits for the drafter asks again

    def __call__(self, path: list[int]) -> torch.Tensor:
        """Return which tokens may follow a path from the end of the text.

        Args:
            path (`list[int]`):
                Tokens of which each may follow those before it; all but the last have been asked about.

        Returns:
            `torch.BoolTensor` of shape `(vocab_size,)` on the host.
        """
        key = tuple(path)
        if key not in self.answers:
            self.answers[key] = self._ask(path)
        return self.answers[key]

    def _ask(self, path: list[int]) -> torch.Tensor:
        if len(path) >= self.room or (path and path[-1] in self.ends):
            return torch.zeros(self.vocab_size, dtype=torch.bool)
        # Only the call's own processors see all rows.
        before, row = (self.after.get(tuple(path[:-1])), 0) if path else (self.processors, self.row)
        unknown = torch.ones(self.vocab_size, dtype=torch.bool)
        if before is None:
            return unknown
        processors = [fork(processor, row) if can_fork(processor) else processor for processor in before]
        ids = torch.cat([self.prefix, self.prefix.new_tensor([path])], dim=1)
        scores = torch.zeros(1, self.vocab_size, device=ids.device)
        try:
            for processor in processors:
                scores = processor(ids, scores)
        except Exception:  # the text may never come to this
            return unknown
        self.after[tuple(path)] = processors
        return (scores[0] > float("-inf")).cpu()

    def longest(self, chain: list[int]) -> list[int]:
        """Return as much of a chain of tokens as may be emitted."""
        for depth, token in enumerate(chain):
            if not self(chain[:depth])[token]:
                return chain[:depth]
        return chain


def askable(processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """Return those of a call's processors that rule tokens out and can be asked ahead of time."""
    return [processor for processor in processors if _can_be_asked(processor)]


def _can_be_asked(processor: LogitsProcessor) -> bool:
    if type(processor) is PrefixConstrainedLogitsProcessor and not changes_nothing(
        processor._prefix_allowed_tokens_fn
    ):
        return False  # only plain decoding's questions may have an effect
    return type(processor) in MASKING or can_fork(processor)


__all__ = ["Lookahead", "askable"]
