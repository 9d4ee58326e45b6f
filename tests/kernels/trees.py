"""Random trees and lengths for the kernel tests."""

from __future__ import annotations

import torch

from hf_treeflash.kernels import pack_ancestor_words


def random_parents(batch: int, nodes: int, generator: torch.Generator) -> torch.Tensor:
    """Parents before children, `(batch, nodes)`, -1 for the root."""
    parents = torch.full((batch, nodes), -1)
    for node in range(1, nodes):
        parents[:, node] = torch.randint(max(0, node - 12), node, (batch,), generator=generator)
    return parents


def ancestor_mask(parents: torch.Tensor) -> torch.Tensor:
    """Ancestors-or-self of every node, by walking up one node at a time."""
    batch, nodes = parents.shape
    mask = torch.zeros(batch, nodes, nodes, dtype=torch.bool)
    for row in range(batch):
        for node in range(nodes):
            current = node
            while current >= 0:
                mask[row, node, current] = True
                current = int(parents[row, current])
    return mask


def random_words(batch: int, nodes: int, generator: torch.Generator) -> torch.Tensor:
    return pack_ancestor_words(ancestor_mask(random_parents(batch, nodes, generator)))
