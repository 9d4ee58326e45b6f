"""The terms of layers whose nodes add products of two vectors to the state."""

from typing import NamedTuple

import torch

from ..kernels import add_path


class ProductTerms(NamedTuple):
    """Terms that are products of two vectors, which decay from node to node.

    Attributes:
        keys (`torch.FloatTensor` of shape `(batch, key_heads, nodes, rows)`):
            First vectors; consecutive heads share them.
        updates (`torch.FloatTensor` of shape `(batch, heads, nodes, columns)`):
            Second vectors; a state is `(batch, heads, rows, columns)`.
        decays (`torch.Tensor` of shape `(batch, heads, nodes, 1 or rows)`):
            Log decays, summed over a node and its ancestors.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether the layer keeps its state as `(batch, heads, columns, rows)`.
    """

    keys: torch.Tensor
    updates: torch.Tensor
    decays: torch.Tensor
    transposed: bool = False

    def add_path(self, state: torch.Tensor, path: torch.Tensor) -> None:
        """Move the state along accepted paths, see [`Terms`]."""
        add_path(state.mT if self.transposed else state, self.keys, self.updates, self.decays, path)


__all__ = ["ProductTerms"]
