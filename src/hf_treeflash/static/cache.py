"""Key-value caches of fixed size whose rows have lengths of their own; dropping columns costs nothing."""

from collections.abc import Iterable

import torch
from transformers import Cache
from transformers.cache_utils import StaticLayer

from ..kernels import compact, pointer_table


class RowLayer(StaticLayer):
    """One layer's keys and values; a pass writes at slots of each row's own, which [`StaticTreeCache`] sets.

    Args:
        keys, values (`torch.Tensor` of shape `(batch, kv_heads, capacity, head_dim)`):
            The storage, written in place.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        self.slots, self.span = None, keys.shape[2]

    def update(self, key_states, value_states, *args, **kwargs):
        """Write a pass's states at their slots and return the first `span` slots."""
        # Not through a transposed view: before torch 2.13 inductor would copy the whole storage to write there.
        # Under autocast keys and values may come in another dtype than the storage's.
        self.keys[self.rows, :, self.slots] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[self.rows, :, self.slots] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, : self.span], self.values[:, :, : self.span]


class StaticTreeCache(Cache):
    """Preallocated keys and values of every layer.

    It knows no lengths: who runs a pass says where its states go, and the masks say which slots hold something. So
    taking rejected tokens back is not writing down a length.

    Args:
        shapes (`Iterable[tuple[int, int, int]]`):
            For each layer its heads and the sizes of a key and of a value.
        batch (`int`):
            Rows.
        capacity (`int`):
            Slots per row.
        dtype (`torch.dtype`), device (`torch.device`):
            Of the storage.
    """

    def __init__(self, shapes: Iterable[tuple[int, int, int]], batch: int, capacity: int, dtype, device):
        def storage(heads: int, size: int) -> torch.Tensor:
            return torch.zeros(batch, heads, capacity, size, dtype=dtype, device=device)

        super().__init__(layers=[RowLayer(storage(heads, k), storage(heads, v)) for heads, k, v in shapes])
        # Compaction takes tensors of one shape at a time; nearly all models have one.
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                by_shape.setdefault(tensor.shape, []).append(tensor)
        self._groups = [(tensors, pointer_table(tensors)) for tensors in by_shape.values()]

    def place(self, slots: torch.Tensor, span: int) -> None:
        """Say where the next pass writes, and how much it sees.

        Args:
            slots (`torch.LongTensor` of shape `(batch, columns)`):
                Slot of each column of the pass, different within a row.
            span (`int`):
                Slots the pass's attention gets to see, from the first.
        """
        for layer in self.layers:
            layer.slots, layer.span = slots, span

    def commit(self, path: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor) -> None:
        """Move an accepted path's states to the front of the pass's slots.

        Args:
            path (`torch.LongTensor` of shape `(batch, width)`):
                Accepted nodes, root first, padded with -1.
            counts (`torch.LongTensor` of shape `(batch,)`):
                Accepted nodes per row, at least 1.
            lengths (`torch.LongTensor` of shape `(batch,)`):
                Slot of the root.
        """
        for tensors, pointers in self._groups:
            compact(tensors, path, counts, lengths, pointers)

    def take_over(self, cache: Cache, length: int) -> None:
        """Move a prompt's keys and values in, emptying the dynamic cache that held them.

        Args:
            cache ([`DynamicCache`]):
                As prefill leaves it; sliding layers hold the last columns only, and windows hide the missing ones.
            length (`int`):
                Columns of the prompt.
        """
        for mine, theirs in zip(self.layers, cache.layers, strict=True):
            start = length - theirs.keys.shape[2]
            mine.keys[:, :, start:length] = theirs.keys
            mine.values[:, :, start:length] = theirs.values
            theirs.keys = theirs.values = None

    def clear(self) -> None:
        """Zero the storage: what an earlier text left behind could be NaN, which no mask hides."""
        for layer in self.layers:
            layer.keys.zero_()
            layer.values.zero_()


__all__ = ["StaticTreeCache"]
