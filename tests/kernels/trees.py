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


def make_transitions(batch: int, levels: int, rows: int, branching: int, kind: str, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, levels, rows, branching)
    logits = torch.randn(*shape[:-1], branching + 4, generator=generator) * 3
    log_probs = logits.log_softmax(-1).sort(-1, descending=True).values[..., :branching].contiguous()
    if kind == "ties":
        log_probs = (log_probs * 2).round() / 2
    elif kind == "certain":  # children as likely as their parents
        log_probs[..., 0] = 0.0
        log_probs[..., 1:] = log_probs[..., 1:].round()
    elif kind == "masked":
        length = torch.randint(0, branching + 1, shape[:-1], generator=generator).unsqueeze(-1)
        log_probs = log_probs.masked_fill(torch.arange(branching) >= length, float("-inf"))
        log_probs[:, 0, 0, -1] = float("nan")
    token_ids = torch.rand(*shape[:-1], 50, generator=generator).argsort(-1)[..., :branching].contiguous()
    next_row = torch.randint(-1, rows, shape, generator=generator)
    return token_ids, log_probs, next_row
