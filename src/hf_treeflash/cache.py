"""Key-value caches under a tree: what a node sees, and keeping one path of a verify pass."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .storage import Storage, StoredLayer, release, share


def check_restorable(cache: Cache | None) -> None:
    """Refuse a cache from which the rejected nodes of a tree cannot be dropped again.

    Raises:
        ValueError: Naming the first layer whose state cannot be restored, and what works.
    """
    if cache is None:
        raise ValueError("Tree drafting needs a target that keeps its state in a `Cache`, which this one does not.")
    if getattr(cache, "offloading", False):
        raise ValueError(
            "Tree drafting does not work on an offloaded cache, whose layers move between devices during a pass; use "
            "a plain `DynamicCache` (what `generate` makes by itself)."
        )
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"Tree drafting cannot take rejected tokens back from layer {index} of the target's cache, a "
                f"{type(layer).__name__}. Targets whose layers all use full or sliding-window attention work, with a "
                "`DynamicCache` (what `generate` makes by itself) or with `cache_implementation='static'`."
            )


@contextmanager
def recording_past(cache: Cache) -> Iterator[None]:
    """Let sliding-window layers hold a pass's columns until they are committed, and only then trim to the window."""
    before = [(layer, layer.record_past) for layer in cache.layers if hasattr(layer, "record_past")]
    cache.activate_past_recording()
    try:
        yield
    finally:
        for layer, record_past in before:
            layer.record_past = record_past


class StoredRow(NamedTuple):
    """One row of a cache: its number of columns, each layer's last of them, and which columns hold a token."""

    filled: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    valid: torch.Tensor | None


class PrefixCache:
    """A cache of committed columns that keeps, after each pass, a different path of the tail for each row.

    Between passes it looks as after a left-padded batch: every row's columns end at the right edge. During a pass it
    also holds the pass's own columns, the tail; `commit` keeps some of them and drops the rest.

    Args:
        cache ([`Cache`]):
            The cache the model writes to.
        valid (`torch.BoolTensor` of shape `(batch, columns)`, *optional*):
            Which of the present columns hold a token rather than padding; None if all do.
        keep_rows (`bool`, *optional*, defaults to `False`):
            Whether rows that `select` takes out are to come back with `restore_rows`.
    """

    def __init__(self, cache: Cache, valid: torch.Tensor | None = None, keep_rows: bool = False):
        self.cache = cache
        self.valid = valid
        self.length: int = cache.get_seq_length()
        # Columns of each row up to the right edge, its own padding included; None while all rows fill `length`.
        self.filled: list[int] | None = None
        # Rows taken out, by their place in the first batch.
        self.rows = list(range(cache.layers[0].keys.shape[0])) if keep_rows else None
        self.taken_out: dict[int, StoredRow] = {}
        self.storages: list[Storage] | None = None  # until the first commit

    def stored(self, place: int) -> int:
        """Return how many columns of the prefix a layer holds; none before its first pass."""
        layer = self.cache.layers[place]
        return layer.keys.shape[-2] if layer.is_initialized else 0

    def present(self, columns: int, device: torch.device) -> torch.Tensor:
        """Return which of the last columns of the prefix hold a token; bool, `(batch or 1, columns)`."""
        if self.valid is None:
            return torch.ones(1, columns, dtype=torch.bool, device=device)
        return self.valid[:, self.length - columns :].to(device)

    def commit(self, paths: list[list[int]], tail: int, tail_valid: torch.Tensor | None = None) -> None:
        """Keep each row's path of the tail behind its prefix and drop every other tail column.

        Args:
            paths (`list[list[int]]`):
                Tail columns to keep per row, in order.
            tail (`int`):
                Number of columns the pass appended.
            tail_valid (`torch.BoolTensor` of shape `(batch, tail)`, *optional*):
                Which tail columns hold a token; None if all do.
        """
        counts = [len(path) for path in paths]
        even = min(counts) == max(counts)
        if even:  # rows of different lengths stay aligned, too
            new_length = self.length + counts[0]
            self.filled = None if self.filled is None else [have + counts[0] for have in self.filled]
            # Most paths are the tail's first columns: nothing has to move then.
            moved = None if all(path == list(range(counts[0])) for path in paths) else torch.tensor(paths)
            source = None
        else:
            new_length, source = self._right_align(paths)
            moved = None
        if self.valid is not None or tail_valid is not None or not even:
            self._commit_valid(paths, tail, tail_valid, source)
        if self.storages is None:  # rows of a batch shift against each other, a single one stays where it is
            self.storages = share(self.cache) if len(paths) == 1 else []
        for storage in self.storages:
            storage.commit(self.length, None if moved is None else moved[0], counts[0])
        for layer in self.cache.layers:
            if layer.is_initialized and not isinstance(layer, StoredLayer):
                _commit_layer(layer, self.length, tail, new_length, moved, source)
        self.length = new_length

    def trim(self, columns: int) -> None:
        """Keep only the last columns."""
        if self.length <= columns:
            return
        for storage in self.storages or ():
            storage.trim(self.length - columns)
        for layer in self.cache.layers:
            if not isinstance(layer, StoredLayer):
                layer.keys, layer.values = layer.keys[:, :, -columns:], layer.values[:, :, -columns:]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = columns
        self.valid = None if self.valid is None else self.valid[:, -columns:]
        self.filled = None if self.filled is None else [min(filled, columns) for filled in self.filled]
        self.length = columns

    def rollback(self) -> None:
        """Drop the tail of a pass that was not committed, whole or broken off."""
        for storage in self.storages or ():
            storage.cut(self.length)
        for layer in self.cache.layers:
            if layer.is_initialized and not isinstance(layer, StoredLayer):
                extra = layer.get_seq_length() - self.length
                layer.keys, layer.values = (s[:, :, : s.shape[2] - extra] for s in (layer.keys, layer.values))
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = self.length

    def select(self, rows: list[int]) -> None:
        """Keep only some rows of the batch."""
        if self.rows is not None:
            self.taken_out |= {row: self._row(i) for i, row in enumerate(self.rows) if i not in rows}
            self.rows = [self.rows[i] for i in rows]
        index = torch.tensor(rows)
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.batch_select_indices(index.to(layer.keys.device))
        if self.valid is not None:
            self.valid = self.valid[index.to(self.valid.device)]
        if self.filled is not None:
            self.filled = [self.filled[row] for row in rows]

    def restore_rows(self, length: int | None = None, run_last=None) -> None:
        """Leave the cache as plain decoding does: with its own layers, and all rows back in, each at the left edge.

        Args:
            length (`int`, *optional*):
                Columns to keep, by default those of the longest row; the columns behind a shorter row are zeros.
            run_last (`Callable[[PrefixCache, list[int]], None]`, *optional*):
                Runs the target over the last token of some rows, given a cache of these rows: plain decoding computes
                its state for every row but the longest.
        """
        if self.rows is None:
            return
        self.storages = []  # each is freed once its layers have left
        release(self.cache)
        if self.filled is None and not self.taken_out and length in (None, self.length):
            return
        rows = self.taken_out | {row: self._row(index) for index, row in enumerate(self.rows)}
        self.length = max(row.filled for row in rows.values()) if length is None else length
        short = [row for row in sorted(rows) if rows[row].filled < self.length]
        if run_last is not None and short:
            closing = self._of_rows([rows[row] for row in short])
            run_last(closing, short)
            closing.commit([[0]] * len(short), tail=1)
            rows |= {row: closing._row(index) for index, row in enumerate(short)}
        for number, layer in enumerate(self.cache.layers):
            window = getattr(layer, "sliding_window", None)
            for part, name in enumerate(("keys", "values")):
                own = [(rows[row].filled, rows[row].layers[number][part]) for row in sorted(rows)]
                states = _left_aligned(own, self.length)
                setattr(layer, name, states if window is None else states[:, :, 1 - window :])
            if window is not None:
                layer.cumulative_length = self.length
        self.rows, self.filled, self.taken_out = sorted(rows), None, {}

    def _row(self, index: int) -> "StoredRow":
        filled = self.length if self.filled is None else self.filled[index]
        layers = [
            (layer.keys[index, :, -filled:].clone(), layer.values[index, :, -filled:].clone())
            for layer in self.cache.layers
        ]
        return StoredRow(filled, layers, None if self.valid is None else self.valid[index, -filled:])

    def _of_rows(self, rows: list["StoredRow"]) -> "PrefixCache":
        """Return a cache of its own with these rows, ending at the right edge."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        filled = [row.filled for row in rows]
        for number, layer in enumerate(cache.layers):
            layer.keys, layer.values = (
                _right_aligned([row.layers[number][part] for row in rows]) for part in range(2)
            )
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = max(filled)
        own = [torch.ones(row.filled, dtype=torch.bool) if row.valid is None else row.valid for row in rows]
        result = PrefixCache(cache, _right_aligned([valid[None, :, None] for valid in own])[:, 0, :, 0])
        result.filled = filled
        return result

    def _right_align(self, paths: list[list[int]]) -> tuple[int, torch.Tensor]:
        """Return the new length, and for every new column the present column it comes from."""
        filled = self.filled or [self.length] * len(paths)
        self.filled = [have + len(path) for have, path in zip(filled, paths, strict=True)]
        new_length = max(self.filled)
        source = torch.zeros(len(paths), new_length, dtype=torch.long)
        for row, (have, path) in enumerate(zip(filled, paths, strict=True)):
            source[row, new_length - self.filled[row] :] = torch.cat(
                [torch.arange(self.length - have, self.length), torch.tensor(path, dtype=torch.long) + self.length]
            )
        return new_length, source

    def _commit_valid(self, paths, tail: int, tail_valid: torch.Tensor | None, source: torch.Tensor | None) -> None:
        device = tail_valid.device if tail_valid is not None else self.cache.layers[0].keys.device
        prefix = self.valid
        if prefix is None:
            prefix = torch.ones(len(paths), self.length, dtype=torch.bool, device=device)
        if tail_valid is None:
            tail_valid = prefix.new_ones(len(paths), tail)
        valid = torch.cat([prefix, tail_valid], dim=1)
        if source is None:
            columns = torch.tensor(paths, device=device) + self.length
            self.valid = torch.cat([prefix, valid.gather(1, columns)], dim=1)
            return
        self.valid = valid.gather(1, source.to(device))
        for row, filled in enumerate(self.filled or ()):
            self.valid[row, : source.shape[1] - filled] = False
        if min(self.filled or ()) == source.shape[1]:
            self.filled = None


def _left_aligned(rows: list[tuple[int, torch.Tensor]], length: int) -> torch.Tensor:
    """Stack rows given as their number of columns and the states of the last of these."""
    _, like = rows[0]
    states = like.new_zeros(len(rows), like.shape[0], length, like.shape[2])
    for row, (filled, own) in enumerate(rows):
        start = filled - own.shape[1]
        states[row, :, start:filled] = own[:, : max(0, length - start)]
    return states


def _right_aligned(rows: list[torch.Tensor]) -> torch.Tensor:
    """Stack rows of different lengths, each `(heads, columns, size)`."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])


def _commit_layer(
    layer: DynamicLayer,
    length: int,
    tail: int,
    new_length: int,
    moved: torch.Tensor | None,
    source: torch.Tensor | None,
) -> None:
    """Compact one layer's keys and values; a sliding layer holds only the last columns of the prefix."""
    if source is None and moved is None and new_length == length + tail and not hasattr(layer, "sliding_window"):
        return  # the whole tail stays, as when nothing was drafted
    stored = layer.keys.shape[-2] - tail
    window = getattr(layer, "sliding_window", None)
    keep = new_length if window is None else min(new_length, window - 1)
    for name in ("keys", "values"):
        states = getattr(layer, name)
        if source is not None:
            columns = (source[:, new_length - keep :].to(states.device) - (length - stored)).clamp(min=0)
            states = states.gather(2, columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
        else:
            kept = new_length - length
            if moved is not None:
                states[:, :, stored : stored + kept] = columns_at(states[:, :, stored:], moved.to(states.device))
            states = states[:, :, max(0, stored + kept - keep) : stored + kept]
        setattr(layer, name, states)
    if window is not None:
        layer.cumulative_length = new_length


def columns_at(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return chosen columns of each row.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, columns, size)`):
            To choose from.
        index (`torch.LongTensor` of shape `(batch, kept)`):
            The columns.
    """
    if len(index) == 1:  # twice as fast on a CPU
        return states.index_select(2, index[0])
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


__all__ = ["PrefixCache", "check_restorable", "columns_at", "recording_past"]
