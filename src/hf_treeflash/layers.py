"""What a layer of a cache keeps of a text, with the verbs by which nodes of a tree stay there or go.

A layer keeps columns, a window of columns, a state (see `states`), or some of these, or nothing. Each thing kept
answers to the same verbs, and nobody else asks what kind it is:

* `commit(choice)` keeps the chosen nodes of a pass, drops the others; `rollback(length)` drops a pass that broke off.
* `select(index)` keeps some rows of the batch.
* `row(index, filled)` copies what is kept of one row; `restore(rows, ends, length)` makes such copies the whole batch.
* `trim(columns)` forgets all but the last columns, for drafters with a window.

A further kind is a class with these verbs and its line in `cache.kept_by`.
"""

from functools import cached_property
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Uploaded:
    """A small tensor of the host that goes to each device once, without the host waiting.

    Args:
        host (`torch.Tensor`):
            The tensor.
    """

    def __init__(self, host: torch.Tensor):
        self.copies = {host.device: host}

    def on(self, device: torch.device) -> torch.Tensor:
        """Return it on a device."""
        if device not in self.copies:
            (host, *_) = self.copies.values()
            host = host.pin_memory() if device.type == "cuda" else host
            self.copies[device] = host.to(device, non_blocking=True)
        return self.copies[device]


class Choice:
    """Which columns of a pass stay, worked out once for all layers.

    Args:
        paths (`list[list[int]]`):
            Columns of the tail to keep per row, at least one, in order.
        length (`int`), tail (`int`):
            Columns before the pass, and of it.
        filled (`list[int]`, *optional*):
            Columns of each row up to the right edge; None if all rows fill `length`.

    Attributes:
        new_length (`int`):
            Columns afterwards.
        filled (`list[int]`, *optional*):
            As above, afterwards.
        shifts (`bool`):
            Whether rows keep different numbers, so that they move against each other to end at the right edge.
    """

    def __init__(self, paths: list[list[int]], length: int, tail: int, filled: list[int] | None = None):
        self.paths, self.length, self.tail = paths, length, tail
        counts = [len(path) for path in paths]
        before = filled or [length] * len(paths)
        after = [have + count for have, count in zip(before, counts, strict=True)]
        self.shifts = min(counts) < max(counts)
        self.new_length = max(after) if self.shifts else length + counts[0]
        self.filled = None if min(after) == self.new_length else after
        # Most paths are the tail's first columns: nothing has to move then.
        self.moves = not self.shifts and any(path != list(range(counts[0])) for path in paths)
        # A row that shifts says for every new column where it was; -1 where it has none.
        self.index = Uploaded(self._sources(before) if self.shifts else torch.tensor(paths))
        self._columns: dict[tuple, torch.Tensor] = {}
        self._newest: dict[tuple[int, int], Uploaded] = {}

    @cached_property
    def padded(self) -> Uploaded:
        """The paths, `(batch, longest)`, shorter ones padded with -1."""
        if not self.shifts:
            return self.index
        longest = max(map(len, self.paths))
        return Uploaded(torch.tensor([path + [-1] * (longest - len(path)) for path in self.paths]))

    def newest(self, stored: int, keep: int) -> Uploaded:
        """Return where each row's last columns are among `stored` ones and the tail, wherever rows end in the text."""
        if (stored, keep) not in self._newest:
            columns = [[*range(stored), *(stored + node for node in path)][-keep:] for path in self.paths]
            self._newest[stored, keep] = Uploaded(torch.tensor(columns))
        return self._newest[stored, keep]

    def of(self, states: torch.Tensor, stored: int, keep: int) -> torch.Tensor:
        """Return what stays of a layer's columns.

        Args:
            states (`torch.Tensor` of shape `(batch, heads, stored + tail, size)`):
                Keys or values after the pass; may be written to.
            stored (`int`):
                Columns the layer held before the pass, the last ones.
            keep (`int`):
                Columns it is to hold, the last ones.
        """
        if self.shifts:
            return columns_at(states, self._shifted(states.device, stored, keep))
        end = stored + self.new_length - self.length
        if self.moves:
            states[:, :, stored:end] = columns_at(states[:, :, stored:], self.index.on(states.device))
        return states[:, :, max(0, end - keep) : end]

    def valid(self, before: torch.Tensor | None, tail: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Return which columns hold a token afterwards, given which did before and which of the pass do.

        Args:
            before, tail (`torch.BoolTensor` of shape `(batch, length)` and `(batch, tail)`, *optional*):
                None if all do.
            device (`torch.device`):
                Of the result.

        Returns:
            `torch.BoolTensor` of shape `(batch, new_length)`.
        """
        parts = [
            torch.ones(len(self.paths), columns, dtype=torch.bool, device=device) if valid is None else valid
            for valid, columns in ((before, self.length), (tail, self.tail))
        ]
        index = self.index.on(device)
        if not self.shifts:
            return torch.cat([parts[0], parts[1].gather(1, index)], dim=1)  # (batch, new_length)
        return torch.cat(parts, dim=1).gather(1, index.clamp(min=0)) & (index >= 0)

    def _sources(self, before: list[int]) -> torch.Tensor:
        sources = torch.full((len(self.paths), self.new_length), -1)
        for source, have, path in zip(sources, before, self.paths, strict=True):
            end = self.new_length - len(path)
            source[end - have : end] = torch.arange(self.length - have, self.length)
            source[end:] = torch.tensor(path) + self.length
        return sources

    def _shifted(self, device: torch.device, stored: int, keep: int) -> torch.Tensor:
        key = device, stored, keep
        if key not in self._columns:
            index = self.index.on(device)[:, self.new_length - keep :]  # (batch, keep)
            self._columns[key] = (index - (self.length - stored)).clamp(min=0)
        return self._columns[key]


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


__all__ = ["Choice", "Columns", "Kept", "Uploaded", "Window", "columns_at", "placed", "window_of"]
