"""Which columns of a pass stay, worked out once for all layers of a cache."""

from functools import cached_property

import torch


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


def upload(values: list, device: torch.device) -> torch.Tensor:
    """Return integers of the host as a tensor on a device, without the host waiting.

    Args:
        values (`list`):
            Integers, or lists of them.
        device (`torch.device`):
            Where to.
    """
    return Uploaded(torch.tensor(values, dtype=torch.long)).on(device)


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


__all__ = ["Choice", "Uploaded", "columns_at", "upload"]
