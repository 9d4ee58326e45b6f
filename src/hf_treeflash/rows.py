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
        self, prefix, length: int | None = None, read_on: Callable[[Any, list[int], list[int]], None] | None = None
    ) -> None:
        """Put all rows back in, each at the left edge, as plain decoding leaves them.

        Args:
            prefix ([`PrefixCache`]):
                The cache.
            length (`int`, *optional*):
                Columns to keep, by default those of the longest row; the columns behind a shorter row are zeros.
            read_on (`Callable[[PrefixCache, list[int], list[int]], None]`, *optional*):
                Fills some columns of shorter rows, given a cache of these rows and how many each has to go: plain
                decoding reads on until all rows have ended.
        """
        rows = self.away | {row: prefix.row(place) for place, row in enumerate(self.present)}
        length = max(row.filled for row in rows.values()) if length is None else length
        try:
            while read_on is not None and (short := [row for row in sorted(rows) if rows[row].filled < length]):
                prefix.put([rows[row] for row in short])
                read_on(prefix, short, [length - rows[row].filled for row in short])
                rows |= {row: prefix.row(place) for place, row in enumerate(short)}
        finally:
            prefix.put([rows[row] for row in sorted(rows)], at_left=True, length=length)
            self.present, self.away = sorted(rows), {}


__all__ = ["Row", "Rows"]
