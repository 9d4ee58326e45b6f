"""Rows taken out of a batch when they end, and given back when all have ended."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One row of a cache.

    Attributes:
        filled (`int`):
            Its columns, up to the right edge.
        valid (`torch.BoolTensor` of shape `(filled,)`, *optional*):
            Which of them hold a token; None if all do.
        kept (`list`):
            What each part of the cache keeps of it, see [`Kept`].
    """

    filled: int
    valid: torch.Tensor | None
    kept: list[Any]


class Rows:
    """Which rows of a batch are in its cache, and what those that left it had there.

    Args:
        batch (`int`):
            Rows at first, all in the cache.
    """

    def __init__(self, batch: int):
        self.present = list(range(batch))
        self.away: dict[int, Row] = {}

    def leave(self, prefix, kept: list[int]) -> None:
        """Take all rows but those at some places of the batch along, before they leave the cache.

        Args:
            prefix ([`PrefixCache`]):
                The cache.
            kept (`list[int]`):
                Places of the rows that stay.
        """
        self.away |= {row: prefix.row(place) for place, row in enumerate(self.present) if place not in kept}
        self.present = [self.present[place] for place in kept]

    def give_back(
        self, prefix, length: int | None = None, run_last: Callable[[Any, list[int]], None] | None = None
    ) -> None:
        """Put all rows back in, each at the left edge, as plain decoding leaves them.

        Args:
            prefix ([`PrefixCache`]):
                The cache.
            length (`int`, *optional*):
                Columns to keep, by default those of the longest row; the columns behind a shorter row are zeros.
            run_last (`Callable[[PrefixCache, list[int]], None]`, *optional*):
                Runs the target over the last token of some rows, given a cache of these rows: plain decoding computes
                its state for every row but the longest.
        """
        rows = self.away | {row: prefix.row(place) for place, row in enumerate(self.present)}
        length = max(row.filled for row in rows.values()) if length is None else length
        short = [row for row in sorted(rows) if rows[row].filled < length]
        try:
            if run_last is not None and short:
                prefix.put([rows[row] for row in short])
                run_last(prefix, short)
                prefix.commit([[0]] * len(short), tail=1)
                rows |= {row: prefix.row(place) for place, row in enumerate(short)}
        finally:
            prefix.put([rows[row] for row in sorted(rows)], at_left=True, length=length)
            self.present, self.away = sorted(rows), {}


__all__ = ["Row", "Rows"]
