"""What a layer of a cache keeps of a text, with the verbs by which nodes of a tree stay there or go.

A layer keeps columns, a window of columns, a state (see `states`), or some of these, or nothing. Each thing kept
answers to the same verbs, and nobody else asks what kind it is:

* `commit(choice)` keeps the chosen nodes of a pass, drops the others; `rollback(length)` drops a pass that broke off.
* `select(index)` keeps some rows of the batch.
* `row(index, filled)` copies what is kept of one row; `restore(rows, ends, length)` makes such copies the whole batch.
* `trim(columns)` forgets all but the last columns, for drafters with a window.

A further kind is a class with these verbs and its line in `cache.kept_by`.
"""

from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .choice import Choice, Uploaded


class Kept(Protocol):
    """Something that a layer keeps; see the verbs above."""

    layer: Any

    def commit(self, choice: Choice) -> None: ...
    def rollback(self, length: int) -> None: ...
    def trim(self, columns: int) -> None: ...
    def select(self, index: Uploaded) -> None: ...
    def row(self, index: int, filled: int) -> Any: ...
    def restore(self, rows: list, ends: list[int], length: int) -> None: ...


class Columns:
    """Keys and values of every column: full attention."""

    def __init__(self, layer: DynamicLayer):
        self.layer = layer

    def held(self, length: int) -> int:
        """Return how many columns of a text the layer holds between passes."""
        return length

    def commit(self, choice: Choice) -> None:
        """Keep the chosen columns of a pass."""
        if self.layer.is_initialized:
            states, keep = self._states(), self.held(choice.new_length)
            stored = states[0].shape[2] - choice.tail
            self._set([choice.of(part, stored, keep) for part in states], choice.new_length)

    def rollback(self, length: int) -> None:
        """Drop the columns of a pass, which this layer may not have seen yet."""
        if self.layer.is_initialized:
            states = self._states()
            end = states[0].shape[2] - (self.layer.get_seq_length() - length)
            self._set([part[:, :, :end] for part in states], length)

    def trim(self, columns: int) -> None:
        """Keep the last columns."""
        self._set([states[:, :, -columns:] for states in self._states()], columns)

    def select(self, index: Uploaded) -> None:
        """Keep some rows of the batch."""
        if self.layer.is_initialized:
            self.layer.batch_select_indices(index.on(self.layer.keys.device))

    def row(self, index: int, filled: int) -> tuple[torch.Tensor, ...]:
        """Return copies of one row's keys and values, the columns that are filled."""
        return tuple(states[index, :, -filled:].clone() for states in self._states())

    def restore(self, rows: list, ends: list[int], length: int) -> None:
        """Hold these rows, each ending before its column of `ends`, in a text of `length` columns."""
        first = length - self.held(length)
        self._set([placed(list(states), ends, first, length) for states in zip(*rows, strict=True)], length)

    def _states(self) -> list[torch.Tensor]:
        return [self.layer.keys, self.layer.values]

    def _set(self, states: list[torch.Tensor], length: int) -> None:
        self.layer.keys, self.layer.values = states


class Window(Columns):
    """Keys and values of a window of columns.

    Args:
        layer ([`DynamicSlidingWindowLayer`]):
            The layer.
        rewinds (`bool`, *optional*, defaults to `False`):
            Whether rows may be restored to fewer columns than they had: what leaves the window is put aside till then.
    """

    layer: DynamicSlidingWindowLayer

    def __init__(self, layer: DynamicSlidingWindowLayer, rewinds: bool = False):
        super().__init__(layer)
        self.rewinds = rewinds
        self.aside: list[torch.Tensor] | None = None

    def held(self, length: int) -> int:
        """Return how many columns of a text are held between passes, those put aside included."""
        return length if self.rewinds else min(length, self.layer.sliding_window - 1)

    def select(self, index: Uploaded) -> None:
        """Keep some rows of the batch."""
        super().select(index)
        if self.aside is not None:
            self.aside = [states[index.on(states.device)] for states in self.aside]

    def restore(self, rows: list, ends: list[int], length: int) -> None:
        """Hold these rows, each ending before its column of `ends`, in a text of `length` columns."""
        self.rewinds = False
        super().restore(rows, ends, length)

    def _states(self) -> list[torch.Tensor]:
        states = super()._states()
        if self.aside is None:
            return states
        return [torch.cat(parts, dim=2) for parts in zip(self.aside, states, strict=True)]

    def _set(self, states: list[torch.Tensor], length: int) -> None:
        if self.rewinds:
            first = max(0, states[0].shape[2] - self.layer.sliding_window + 1)
            self.aside = [part[:, :, :first] for part in states]
            states = [part[:, :, first:] for part in states]
        else:
            self.aside = None
        super()._set(states, length)
        self.layer.cumulative_length = length


def window_of(layer: Any) -> int | None:
    """Return the sliding window of a layer, None if it has none."""
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def placed(rows: list[torch.Tensor], ends: list[int], first: int, length: int) -> torch.Tensor:
    """Stack rows that stand at places of their own, zeros around them; what stands outside is cut off.

    Args:
        rows (`list[torch.Tensor]`):
            Each of shape `(heads, columns, size)`.
        ends (`list[int]`):
            For each the column behind its last.
        first (`int`), length (`int`):
            Columns of the result: from `first`, before `length`.

    Returns:
        `torch.Tensor` of shape `(rows, heads, length - first, size)`.
    """
    heads, _, size = rows[0].shape
    result = rows[0].new_zeros(len(rows), heads, length - first, size)
    for own, end, place in zip(rows, ends, result, strict=True):
        begin = end - own.shape[1]
        left, right = max(begin, first), min(end, length)
        if left < right:
            place[:, left - first : right - first] = own[:, left - begin : right - begin]
    return result


__all__ = ["Columns", "Kept", "Window", "placed", "window_of"]
