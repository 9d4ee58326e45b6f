"""A cache under trees: keeping one path of each pass, for every row of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from .choice import Choice, Uploaded
from .layers import Columns, Kept, Window, placed
from .rows import Row, Rows
from .states import Reached, State
from .storage import Storage, StoredLayer, Unwritten, release, share


def kept_by(layer: Any, rewinds: bool = False) -> list[Kept] | None:
    """Return what a layer keeps; None for a layer from which nodes cannot be taken back.

    Args:
        layer ([`CacheLayerMixin`]):
            Of a cache.
        rewinds (`bool`, *optional*, defaults to `False`):
            See [`Window`].
    """
    kind = type(layer)
    if kind is DynamicLayer:
        return [Columns(layer)]
    if kind is DynamicSlidingWindowLayer:
        return [Window(layer, rewinds)]
    if kind in (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer) and layer.number_of_states == 1:
        states: list[Kept] = [Reached(layer), State(layer)]
        return states if kind is LinearAttentionLayer else [*states, Columns(layer)]
    if kind.__name__ == "DummyLayer":  # of layers without a memory, such as experts alone; not in every release
        return []
    return None


def check_restorable(cache: Cache | None) -> None:
    """Refuse a cache from which the rejected nodes of a tree cannot be dropped again.

    Raises:
        ValueError: Naming the first layer whose state cannot be restored, and what works.
    """
    if cache is None:
        raise ValueError("Tree drafting needs a target that keeps its state in a `Cache`, which this one does not.")
    if cache.offloading:
        raise ValueError(
            "Tree drafting does not work on an offloaded cache, whose layers move between devices during a pass; use "
            "a plain `DynamicCache` (what `generate` makes by itself)."
        )
    for index, layer in enumerate(cache.layers):
        if kept_by(layer) is None:
            raise ValueError(
                f"Tree drafting cannot take rejected tokens back from layer {index} of the target's cache, a "
                f"{type(layer).__name__}. Layers with full or sliding-window attention work, and recurrent ones with "
                "a single state, in a `DynamicCache` (what `generate` makes by itself) or, where all layers are "
                "attention, with `cache_implementation='static'`."
            )


def is_left_padded(valid: torch.Tensor | None) -> bool:
    """Return whether every row's tokens stand together and end at the right edge.

    Args:
        valid (`torch.BoolTensor` of shape `(batch, columns)`, *optional*):
            Which columns hold a token; None if all do.
    """
    return valid is None or bool(valid[:, -1].all() & ~(valid[:, :-1] & ~valid[:, 1:]).any())


@contextmanager
def recording_past(cache: Cache) -> Iterator[None]:
    """Let layers with a window or a convolution hold a pass's columns until it is committed."""
    before = [(layer, layer.record_past) for layer in cache.layers if hasattr(layer, "record_past")]
    cache.activate_past_recording()
    try:
        yield
    finally:
        for layer, record_past in before:
            layer.record_past = record_past


class PrefixCache:
    """A cache of committed columns that keeps, after each pass, a different path of the tail for each row.

    Between passes it looks as after a left-padded batch: every row's columns end at the right edge. During a pass it
    also holds the pass's own columns, the tail; `commit` keeps some of them and drops the rest.

    Args:
        cache ([`Cache`]):
            The cache the model writes to.
        valid (`torch.BoolTensor` of shape `(batch, columns)`, *optional*):
            Which of the present columns hold a token rather than padding; None if all do.
        rows ([`Rows`], *optional*):
            Keeps the rows that `select` takes out, for `restore_rows`; None if the cache is not used afterwards.
        rewinds (`bool`, *optional*, defaults to `False`):
            Whether `restore_rows` may be asked for fewer columns than a row has.
    """

    def __init__(
        self, cache: Cache, valid: torch.Tensor | None = None, rows: Rows | None = None, rewinds: bool = False
    ):
        self.cache, self.valid, self.rows, self.rewinds = cache, valid, rows, rewinds
        self.length: int = cache.get_seq_length()
        # Columns of each row up to the right edge, its own padding included; None while all rows fill `length`.
        self.filled: list[int] | None = None
        self.storages: list[Storage] | None = None  # until the first commit
        self.of_layers = [kept for layer in cache.layers for kept in kept_by(layer, rewinds) or ()]
        self.kept: list[Kept | Storage] = [*self.of_layers]  # the same, by storages where a single text has them
        self._gapless: bool | None = None  # as far as it is known
        self._zeros: torch.Tensor | None = None

    def over(self, cache: Cache) -> "PrefixCache":
        """Return the prefix in another cache, one column of a pass behind it: some targets read texts anew."""
        other = PrefixCache(cache, rows=self.rows, rewinds=self.rewinds)
        other.length -= 1
        other.valid = None if self.valid is None else self.valid[:, self.length - other.length :]
        return other

    def starts(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """Return the first column of each row that holds a token; None if further columns hold none.

        Args:
            batch (`int`):
                Rows of the next pass.
            device (`torch.device`):
                Of the result.

        Returns:
            `torch.LongTensor` of shape `(batch,)`.
        """
        if self.valid is None:
            if self._zeros is None or len(self._zeros) != batch:
                self._zeros = torch.zeros(batch, dtype=torch.long, device=device)
            return self._zeros
        if self._gapless is None:  # the host waits, but once: paths leave no gaps behind them
            self._gapless = is_left_padded(self.valid)
        return (~self.valid).sum(dim=1).to(device) if self._gapless else None

    def shapes(self) -> list[tuple[int, int, int]] | None:
        """Return for each layer its heads and the sizes of a key and of a value; None unless all keep all columns."""
        if not all(isinstance(layer, StoredLayer) or type(layer) is DynamicLayer for layer in self.cache.layers):
            return None
        states = [(layer.keys, layer.values) for layer in self.cache.layers if layer.is_initialized]
        return [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in states]

    @contextmanager
    def unwritten(self) -> Iterator[Unwritten | None]:
        """Leave the columns of a pass to its attention to write; None where layers write their own.

        Raises:
            RuntimeError: If some were not written.
        """
        if not all(isinstance(layer, StoredLayer) for layer in self.cache.layers):
            yield None
            return
        unwritten = Unwritten()
        for storage in self.storages or ():
            storage.unwritten = unwritten
        try:
            yield unwritten
            if unwritten.states:
                raise RuntimeError("a layer's attention did not write its keys and values")
        finally:
            for storage in self.storages or ():
                storage.unwritten = None

    def stored(self, place: int) -> int:
        """Return how many columns of the prefix a layer holds; none before its first pass."""
        layer = self.cache.layers[place]
        return layer.keys.shape[-2] if layer.is_initialized else 0

    def present(self, columns: int, device: torch.device) -> torch.Tensor:
        """Return which of the last columns of the prefix hold a token; bool, `(batch or 1, columns)`."""
        if self.valid is None:
            return torch.ones(1, columns, dtype=torch.bool, device=device)
        return self.valid[:, self.length - columns :].to(device)

    def begun(self, device: torch.device) -> torch.Tensor:
        """Return how many columns each row has, padding on its left aside; int64, `(batch or 1, 1)`."""
        if self.valid is None:
            return torch.tensor([[self.length]], device=device)
        return self.length - self.valid.to(device, torch.int8).argmax(dim=1, keepdim=True)  # the first that is valid

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
        choice = Choice(paths, self.length, tail, self.filled)
        if self.storages is None:  # rows of a batch shift against each other, a single one stays where it is
            self.storages = share(self.cache) if len(paths) == 1 else []
            stored = {id(layer.layer) for layer in self.cache.layers if isinstance(layer, StoredLayer)}
            self.kept = [*self.storages, *(kept for kept in self.of_layers if id(kept.layer) not in stored)]
        if self.valid is not None or tail_valid is not None or choice.shifts:
            known = self.valid if self.valid is not None else tail_valid
            self.valid = choice.valid(self.valid, tail_valid, self._device if known is None else known.device)
        for kept in self.kept:
            kept.commit(choice)
        self.length, self.filled = choice.new_length, choice.filled

    def trim(self, columns: int) -> None:
        """Keep only the last columns."""
        if self.length <= columns:
            return
        for kept in self.kept:
            kept.trim(columns)
        self.valid = None if self.valid is None else self.valid[:, -columns:]
        self.filled = None if self.filled is None else [min(filled, columns) for filled in self.filled]
        self.length = columns

    def crop(self, columns: int) -> bool:
        """Keep only the first columns of a single text; return whether its layers can, and some are left."""
        if columns < 1 or not all(type(layer) in (DynamicLayer, StoredLayer) for layer in self.cache.layers):
            return False
        self.length, self.valid = columns, None if self.valid is None else self.valid[:, :columns]
        self.rollback()
        return True

    def rollback(self) -> None:
        """Drop the tail of a pass that was not committed, whole or broken off."""
        for kept in self.kept:
            kept.rollback(self.length)

    def select(self, rows: list[int]) -> None:
        """Keep only some rows of the batch."""
        if self.rows is not None:
            self.rows.leave(self, rows)
        index = Uploaded(torch.tensor(rows))
        for kept in self.of_layers:
            kept.select(index)
        if self.valid is not None:
            self.valid = self.valid[index.on(self.valid.device)]
        if self.filled is not None:
            self.filled = [self.filled[row] for row in rows]

    def row(self, place: int) -> Row:
        """Return a copy of one row."""
        filled = self.length if self.filled is None else self.filled[place]
        valid = None if self.valid is None else self.valid[place, self.length - filled :]
        return Row(filled, valid, [kept.row(place, filled) for kept in self.of_layers])

    def put(self, rows: list[Row], at_left: bool = False, length: int | None = None) -> None:
        """Make some rows the whole batch.

        Args:
            rows (`list[Row]`):
                The rows.
            at_left (`bool`, *optional*, defaults to `False`):
                Whether they begin at the left edge instead of ending at the right one.
            length (`int`, *optional*):
                Columns afterwards, by default those of the longest row; rows that begin at the left are cut to it.
        """
        filled = [row.filled for row in rows]
        self.length = max(filled) if length is None else length
        ends = filled if at_left else [self.length] * len(rows)
        for kept, of_rows in zip(self.of_layers, zip(*(row.kept for row in rows), strict=True), strict=True):
            kept.restore(list(of_rows), ends, self.length)
        self._gapless = None
        valid = [
            torch.ones(row.filled, dtype=torch.bool, device=self._device) if row.valid is None else row.valid
            for row in rows
        ]
        self.valid = placed([own[None, :, None] for own in valid], ends, 0, self.length)[:, 0, :, 0]  # (rows, length)
        self.filled = None if at_left or min(filled) == self.length else filled

    def restore_rows(self, length: int | None = None, read_on=None) -> None:
        """Leave the cache as plain decoding does: with its own layers, and all rows back in, each at the left edge.

        Args:
            length (`int`, *optional*), read_on (`Callable`, *optional*):
                See [`Rows.give_back`].
        """
        if self.rows is None:
            return
        whole = self.filled is None and not self.rows.away and length in (None, self.length) and not self.rewinds
        self.storages, self.kept = [], [*self.of_layers]  # each storage is freed once its layers have left
        release(self.cache)
        if not whole:
            self.rows.give_back(self, length, read_on)

    @property
    def _device(self) -> torch.device:
        return next(layer.keys.device for layer in self.cache.layers if getattr(layer, "keys", None) is not None)


__all__ = ["PrefixCache", "check_restorable", "is_left_padded", "recording_past"]
