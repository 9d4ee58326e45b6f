"""Mamba-2 over trees: Bamba, Granite-4-hybrid, Nemotron-H, Falcon-H1, Zamba2."""

import torch

from ..kernels import path_decays
from .terms import ProductTerms


def mamba2(
    hidden_states: torch.Tensor,
    time_step: torch.Tensor,
    rate: torch.Tensor,
    input_weights: torch.Tensor,
    output_weights: torch.Tensor,
    skip: torch.Tensor,
    state: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> tuple[torch.Tensor, ProductTerms]:
    """Run the layer over the nodes of trees, all from one state, which stays as it is.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, nodes, heads, head_dim)`):
            Inputs.
        time_step (`torch.FloatTensor` of shape `(batch, nodes, heads)`):
            Positive time steps.
        rate (`torch.Tensor` of shape `(heads,)`):
            Negative rates of decay ("A").
        input_weights, output_weights (`torch.Tensor` of shape `(batch, nodes, groups, state_size)`):
            "B" and "C"; consecutive heads share a group.
        skip (`torch.Tensor` of shape `(heads,)`):
            Weight of the input in the output ("D").
        state (`torch.Tensor` of shape `(batch, heads, head_dim, state_size)`):
            The state the roots continue.
        ancestor_mask (`torch.BoolTensor` of shape `(batch, nodes, nodes)`):
            Whether a node sees another: its ancestors and itself.

    Returns:
        `tuple[torch.Tensor, ProductTerms]`: The output, `(batch, nodes, heads, head_dim)`, and the nodes' terms.

    Source: arXiv 2405.21060 for the chunked form.
    """
    heads, groups = hidden_states.shape[2], input_weights.shape[2]
    inputs = hidden_states.float().transpose(1, 2)  # (batch, heads, nodes, head_dim)
    time_step = time_step.transpose(1, 2)  # (batch, heads, nodes)
    b, c = (part.float().transpose(1, 2) for part in (input_weights, output_weights))
    decays, ratios = path_decays(rate.float()[:, None] * time_step, ancestor_mask)
    updates = inputs * time_step[..., None]
    weights = (c @ b.mT).repeat_interleave(heads // groups, dim=1) * ratios  # (batch, heads, nodes, nodes)
    read = (c[:, :, None] @ state.float().unflatten(1, (groups, -1)).mT).flatten(1, 2)  # as inputs
    output = read * decays.exp().float()[..., None] + weights @ updates + inputs * skip.float()[:, None, None]
    terms = ProductTerms(b, updates, decays[..., None], transposed=True)
    return output.to(hidden_states.dtype).transpose(1, 2).contiguous(), terms  # layers may call `view`


__all__ = ["mamba2"]
