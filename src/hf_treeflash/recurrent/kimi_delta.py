"""Kimi's delta attention over trees, a gated delta rule with one decay per channel: Kimi-Linear, Bailing-hybrid."""

import torch

from .terms import ProductTerms

# Decays between pairs of nodes exist per channel; so many of them at a time.
ELEMENTS = 1 << 22


def kimi_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> tuple[torch.Tensor, ProductTerms]:
    """Run the rule over the nodes of trees, all from one state, which stays as it is.

    Args:
        query, key (`torch.Tensor` of shape `(batch, nodes, heads, key_size)`):
            Brought to length 1 here, and queries scaled by `key_size ** -0.5`.
        value (`torch.Tensor` of shape `(batch, nodes, heads, value_size)`):
            Values.
        log_decay (`torch.Tensor` of shape `(batch, nodes, heads, key_size)`):
            Log decay of every channel, never positive.
        beta (`torch.Tensor` of shape `(batch, nodes, heads)`):
            Strength of the update.
        state (`torch.Tensor` of shape `(batch, heads, key_size, value_size)`):
            The state the roots continue.
        ancestor_mask (`torch.BoolTensor` of shape `(batch, nodes, nodes)`):
            Whether a node sees another: its ancestors and itself.

    Returns:
        `tuple[torch.Tensor, ProductTerms]`: The output, `(batch, nodes, heads, value_size)`, and the nodes' terms.

    Source: arXiv 2510.26692.
    """
    size = key.shape[3]
    value, log_decay, beta = (part.float().transpose(1, 2) for part in (value, log_decay, beta))
    rows = torch.stack([key, query]).float().transpose(2, 3)  # (2, batch, heads, nodes, key_size)
    rows = rows / torch.sqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)
    # In float64, as long sums of log decays lose digits and a product of floats may be rounded to TF32.
    decays = (ancestor_mask[:, None].double() @ log_decay.double()).float()  # (batch, heads, nodes, key_size)
    against_keys, against_queries = _decayed_products(rows, decays, ancestor_mask)
    decay, beta = decays.exp(), beta[..., None]
    read = (rows * decay) @ state.float()  # (2, batch, heads, nodes, value_size)
    updates = torch.linalg.solve_triangular(
        against_keys * beta, beta * (value - read[0]), upper=False, unitriangular=True
    )
    output = (read[1] + against_queries @ updates) * size**-0.5
    return output.to(query.dtype).transpose(1, 2), ProductTerms(rows[0], updates, decays)


def _decayed_products(rows: torch.Tensor, decays: torch.Tensor, ancestor_mask: torch.Tensor) -> torch.Tensor:
    """Return products of keys and of queries with their ancestors' decayed keys, `(2, batch, heads, nodes, nodes)`.

    The decays do not factor into those of either node: what a node's own path has lost may overflow when inverted.
    """
    _, batch, heads, nodes, size = rows.shape
    products = rows.new_empty(2, batch, heads, nodes, nodes)
    step = max(1, ELEMENTS // (batch * heads * nodes * size))
    for first in range(0, nodes, step):
        here = slice(first, first + step)
        sees = ancestor_mask[:, None, here, :, None]
        # Masked before the exponential: differences off a node's path may be positive and overflow.
        ratios = (decays[:, :, here, None] - decays[:, :, None]).masked_fill_(~sees, float("-inf")).exp_()
        ratios *= rows[0, :, :, None]  # (batch, heads, step, nodes, key_size)
        pair = rows[:, :, :, here].movedim(0, -1)  # (batch, heads, step, key_size, 2)
        products[..., here, :] = (ratios @ pair).movedim(-1, 0)
    return products


__all__ = ["kimi_delta"]
