"""What the drafter reads: the target's states, from the prompt to the last accepted path."""

from typing import NamedTuple

import torch
from transformers import Cache

from .cache import PrefixCache
from .choice import columns_at, upload
from .memory import circumstances, forget, recall, remember


class Context(NamedTuple):
    """Target states of newly committed positions, what the drafter reads next.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch, length, taps * hidden_size)`):
            States at the drafter's `target_layer_ids`, concatenated.
        position_ids (`torch.LongTensor` of shape `(batch, length)`):
            Their absolute positions.
        counts (`list[int]`):
            How many of them each row has; the rest, at the end, is filler.
        valid (`torch.BoolTensor` of shape `(batch, length)`, *optional*):
            Which of them hold a token rather than padding or filler; None if all do.
    """

    hidden_states: torch.Tensor
    position_ids: torch.Tensor
    counts: list[int]
    valid: torch.Tensor | None = None

    @classmethod
    def of_paths(cls, states: torch.Tensor, anchor_positions: torch.Tensor, paths: list[list[int]]) -> "Context":
        """Gather the states of accepted paths.

        Args:
            states (`torch.Tensor` of shape `(batch, nodes, taps * hidden_size)`):
                Of a verify pass.
            anchor_positions (`torch.LongTensor` of shape `(batch,)`):
                Positions of the roots.
            paths (`list[list[int]]`):
                Accepted nodes of each row, root first.
        """
        counts, device = [len(path) for path in paths], states.device
        if states.shape[1] == 1:  # no tree, nothing to choose
            return cls(states, anchor_positions.to(device)[:, None], counts)
        longest = max(counts)
        nodes = upload([path + [0] * (longest - len(path)) for path in paths], device)
        steps = torch.arange(longest, device=device)
        return cls(
            columns_at(states[:, None], nodes)[:, 0],
            anchor_positions.to(device)[:, None] + steps,
            counts,
            None if min(counts) == longest else steps < upload(counts, device)[:, None],
        )

    @property
    def newest_positions(self) -> torch.Tensor:
        """The last position of each row, `(batch, 1)`."""
        if self.valid is None:
            return self.position_ids[:, -1:]
        return self.position_ids.gather(1, upload(self.counts, self.position_ids.device)[:, None] - 1)

    def select(self, rows: list[int]) -> "Context":
        """Keep only some rows of the batch."""
        return Context(
            self.hidden_states[rows],
            self.position_ids[rows],
            [self.counts[row] for row in rows],
            None if self.valid is None else self.valid[rows],
        )

    def last(self, length: int) -> "Context":
        """Keep the last positions of a context without filler."""
        if length >= self.position_ids.shape[1] or min(self.counts) < self.position_ids.shape[1]:
            return self
        valid = None if self.valid is None else self.valid[:, -length:]
        return Context(
            self.hidden_states[:, -length:], self.position_ids[:, -length:], [length] * len(self.counts), valid
        )

    @classmethod
    def joined(cls, parts: "list[Context]") -> "Context":
        """Append successive contexts of the same rows to each other, closing up the filler in between."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        states = torch.cat([part.hidden_states.to(first.hidden_states.device) for part in parts], dim=1)
        positions = torch.cat([part.position_ids.to(first.position_ids.device) for part in parts], dim=1)
        counts = [sum(of_row) for of_row in zip(*(part.counts for part in parts), strict=True)]
        if all(part.valid is None for part in parts):
            return cls(states, positions, counts)
        columns: list[list[int]] = [[] for _ in counts]
        start = 0
        for part in parts:
            for own, count in zip(columns, part.counts, strict=True):
                own += range(start, start + count)
            start += part.position_ids.shape[1]
        index = upload([own + [0] * (max(counts) - len(own)) for own in columns], positions.device)
        valids = [
            torch.ones_like(part.position_ids, dtype=torch.bool) if part.valid is None else part.valid
            for part in parts
        ]
        valid = torch.cat([valid.to(index.device) for valid in valids], dim=1)
        present = torch.arange(max(counts), device=index.device) < upload(counts, index.device)[:, None]
        return cls(
            columns_at(states[:, None], index.to(states.device))[:, 0],
            positions.gather(1, index),
            counts,
            valid.gather(1, index) & present,
        )


def count_positions(attention_mask: torch.Tensor | None, length: int, like: torch.Tensor) -> torch.Tensor:
    """Number the tokens of each row from 0, padding aside; `(batch or 1, length)`."""
    if attention_mask is None:
        return torch.arange(length, device=like.device)[None]
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def remember_context(cache: Cache, drafter, text: torch.Tensor, prefix: PrefixCache, pending: Context) -> None:
    """Leave the drafter's cache with the target's, so that a next turn on it drafts with the whole conversation.

    Args:
        cache ([`Cache`]):
            The target's, at the end of a call.
        drafter ([`PreTrainedModel`]):
            The drafter.
        text (`torch.LongTensor` of shape `(1, length)`):
            The whole text.
        prefix ([`PrefixCache`]), pending ([`Context`]):
            The drafter's cache, and what it has not read of the text yet.
    """
    length = cache.get_seq_length()
    if text.shape[1] >= length:  # else it began with embeddings, and nobody could tell it again
        remember("context", (circumstances(drafter), text[0, :length].tolist(), prefix, pending), cache, drafter)


def take_context(cache: Cache, drafter, text: torch.Tensor) -> tuple[PrefixCache, Context | None] | None:
    """Take what an earlier turn left with this cache, for the call that goes on from it.

    Nothing is left for another call: this one changes it, and keeps it again if it ends well. A cache may have been
    cut since, as chats do whose templates write the last answer in another way.

    Args:
        cache ([`Cache`]):
            The target's, at the beginning of a call.
        drafter ([`PreTrainedModel`]):
            The drafter.
        text (`torch.LongTensor` of shape `(batch, length)`):
            The prompt, with what the cache holds.

    Returns:
        `tuple`: The drafter's cache and what it has not read yet, if anything; None if nothing was left, or the text
        or the circumstances are others than those it was made in.
    """
    left = recall("context", cache, drafter)
    forget(cache, "context")
    if left is None:
        return None
    made_in, read, prefix, pending = left
    length = cache.get_seq_length()
    if made_in != circumstances(drafter) or text[:, :length].tolist() != [read[:length]]:
        return None
    return (prefix, pending) if length == len(read) else _cut(prefix, pending, length, len(read))


def _cut(prefix: PrefixCache, pending: Context, length: int, read: int) -> tuple[PrefixCache, Context | None] | None:
    """Go back to the first tokens of a text; None where that is not possible."""
    positions = pending.position_ids
    if pending.valid is not None or int(positions[0, -1]) != read - 1:  # padding or counts of the caller's own
        return None
    first = int(positions[0, 0])  # the prefix ends before it, wherever a window lets it begin
    if length < first:
        return (prefix, None) if prefix.crop(prefix.length - (first - length)) else None
    kept = length - first
    return prefix, Context(pending.hidden_states[:, :kept], positions[:, :kept], [kept]) if kept else None


__all__ = ["Context", "count_positions", "remember_context", "take_context"]
