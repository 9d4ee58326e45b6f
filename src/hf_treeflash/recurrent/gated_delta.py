"""The gated delta rule over trees: Qwen3-Next, Qwen3.5, OLMo-hybrid."""

import torch

from ..kernels import gated_delta as over_nodes
from .terms import ProductTerms


def gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> tuple[torch.Tensor, ProductTerms]:
    """Run the rule over the nodes, see [`kernels.gated_delta`]; return the output and the nodes' terms."""
    result = over_nodes(query, key, value, log_decay, beta, state, ancestor_mask)
    return result.output, ProductTerms(result.keys, result.updates, result.decays)


__all__ = ["gated_delta"]
