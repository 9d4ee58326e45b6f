"""What a recurrent layer keeps of a text: the columns its convolution reaches back over, and a state."""

from typing import Any, Protocol

import torch
from transformers.cache_utils import LinearAttentionLayer

from .choice import Choice, Uploaded, columns_at

STATEFUL = {"linear_attention", "conv", "hybrid"}  # kinds of layers that keep one, as configs call them


class Terms(Protocol):
    """What the nodes of a pass add to one layer's state, kept until it is known which of them are accepted."""

    def add_path(self, state: torch.Tensor, path: torch.Tensor) -> None:
        """Move the state along accepted paths, in place.

        Args:
            state (`torch.Tensor` of shape `(batch, ...)`):
                The layer's state before the pass.
            path (`torch.LongTensor` of shape `(batch, length)`):
                Accepted nodes from the root down, padded with -1.
        """


class PerRow:
    """A tensor of each row that has no columns of the text: rows come and go, and nothing is aligned.

    Args:
        states (`dict[int, torch.Tensor | None]`):
            Where the layer has it, as its entry 0; None before the layer's first pass.
    """

    def __init__(self, states: dict[int, Any]):
        self.states = states

    def trim(self, columns: int) -> None:
        """Raise: what a state has read it cannot forget."""
        raise NotImplementedError("a recurrent layer cannot be cut to its last columns")

    def select(self, index: Uploaded) -> None:
        """Keep some rows of the batch."""
        if self.states[0] is not None:
            self.states[0] = self.states[0].index_select(0, index.on(self.states[0].device))

    def row(self, index: int, filled: int) -> torch.Tensor | None:
        """Return a copy of one row's tensor."""
        return None if self.states[0] is None else self.states[0][index].clone()

    def restore(self, rows: list, ends: list[int], length: int) -> None:
        """Hold these rows; what a row has read stays in, wherever its columns end."""
        if self.states[0] is not None:
            self.states[0] = torch.stack(rows)


class Reached(PerRow):
    """The last columns of a layer's convolution, as many as its kernel is wide."""

    def __init__(self, layer: LinearAttentionLayer):
        super().__init__(layer.conv_states)
        self.layer = layer

    def commit(self, choice: Choice) -> None:
        """Keep the last columns of what was there and the chosen ones."""
        columns, kernel = self.states[0], self.layer.conv_kernel_size[0]
        if columns is not None:
            index = choice.newest(columns.shape[2] - choice.tail, kernel).on(columns.device)
            self.states[0] = columns_at(columns[..., None], index)[..., 0]  # (batch, channels, kernel)

    def rollback(self, length: int) -> None:
        """Drop the columns of a pass, which this layer may not have seen yet."""
        if self.states[0] is not None:
            self.states[0] = self.states[0][..., : self.layer.conv_kernel_size[0]]


class State(PerRow):
    """A layer's recurrent state. A pass over trees leaves it as it is, and what the nodes would add in `terms`."""

    def __init__(self, layer: LinearAttentionLayer):
        super().__init__(layer.recurrent_states)
        self.layer = layer
        self.terms: Terms | None = None

    def commit(self, choice: Choice) -> None:
        """Add what the chosen nodes add; a pass without a tree has done it itself."""
        if self.terms is not None:
            self.terms.add_path(self.states[0], choice.padded.on(self.states[0].device))
            self.terms = None

    def rollback(self, length: int) -> None:
        """Forget the pass."""
        self.terms = None


__all__ = ["STATEFUL", "Reached", "State", "Terms"]
