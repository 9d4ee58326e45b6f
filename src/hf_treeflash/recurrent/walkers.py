"""The functions by which transformers' recurrent layers walk along a text, each with what stands for it over trees.

Layers look these functions up by name in their modelling module, whatever implements them: plain torch, `fla`,
`mamba-ssm`, `causal-conv1d` or a kernel of the Hub. All else (projections, gates, norms) stays in the layer. Arguments
are transformers'; those that only say how to compute, or concern other lengths than a pass has, are not looked at.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .convolution import convolution
from .gated_delta import gated_delta
from .kimi_delta import kimi_delta
from .mamba1 import mamba1
from .mamba2 import mamba2
from .tree_pass import TreePass


def convolve(run: TreePass, hidden_states, weight, bias=None, activation=None, **kwargs):
    """Convolve the columns a layer's cache holds, those of the nodes last."""
    run.begin_layer(hidden_states)
    output = convolution(hidden_states, weight, bias, run.reached(weight.shape[-1], hidden_states.device))
    return (output if activation is None else ACT2FN[activation](output)).to(hidden_states.dtype)


def convolve_bare_root(run: TreePass, hidden_states, conv_state, weight, bias=None, activation=None):
    """Convolve a single node for a layer that hands it in beside what its cache holds."""
    columns = torch.cat([conv_state, hidden_states], dim=-1)  # (batch, channels, stored + 1)
    for layer in run.kept:
        if layer.conv_states[0] is conv_state:
            layer.conv_states[0] = columns
    return convolve(run, columns, weight, bias, activation)


def delta_rule(run: TreePass, query, key, value, g, beta, **kwargs):
    """Run the gated delta rule."""
    output, terms = gated_delta(query, key, value, g, beta, run.state, run.mask.on(query.device))
    return output, run.end_layer(terms)


def kimi_delta_rule(run: TreePass, query, key, value, g, beta, **kwargs):
    """Run Kimi's delta rule."""
    output, terms = kimi_delta(query, key, value, g, beta, run.state, run.mask.on(query.device))
    return output, run.end_layer(terms)


def mamba2_scan(run: TreePass, hidden_states, dt, A, B, C, *args, D, dt_bias, **kwargs):
    """Run Mamba-2. Time steps are not clamped: plain decoding does not clamp them, only prompts are."""
    time_step = F.softplus(dt.float() + dt_bias.float())
    mask = run.mask.on(hidden_states.device)
    output, terms = mamba2(hidden_states, time_step, A, B, C, D, run.state, mask)
    return output, run.end_layer(terms)


def mamba2_step(run: TreePass, state, hidden_states, dt, A, B, C, D, z=None, dt_bias=None, **kwargs):
    """Run Mamba-2 over a single node, whose weights come expanded to the state's shape."""
    # (batch, 1, ...): the node becomes a text of one.
    node = hidden_states[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None]
    output = mamba2_scan(run, *node, D=D[:, 0], dt_bias=dt_bias[:, 0])[0][:, 0]
    return output if z is None else output * F.silu(z)


def mamba1_scan(run: TreePass, hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, **kwargs):
    """Run Mamba-1, from the cache's state: transformers' own function starts from zero."""
    time_step = F.softplus(dt.float() + delta_bias.float()[:, None])
    output, terms = mamba1(hidden_states, time_step, A, B, C, D, run.state, run.levels)
    return output * F.silu(z), run.end_layer(terms)


def mamba1_step(run: TreePass, state, hidden_states, dt, A, B, C, D=None, z=None, dt_bias=None, **kwargs):
    """Run Mamba-1 over a single node."""
    node = hidden_states[..., None], dt[..., None], A, B[..., None], C[..., None]  # (batch, ..., 1)
    return mamba1_scan(run, *node, D=D, z=z[..., None], delta_bias=dt_bias)[0][..., 0]


OVER_TREES: dict[str, Callable] = {
    "causal_conv1d_fn": convolve,
    "causal_conv1d_update": convolve_bare_root,
    "torch_chunk_gated_delta_rule": delta_rule,
    "torch_recurrent_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": kimi_delta_rule,
    "recurrent_kimi_delta_attention": kimi_delta_rule,
    "mamba2_chunk_scan": mamba2_scan,
    "mamba2_selective_state_update": mamba2_step,
    "mamba_selective_scan": mamba1_scan,
    "mamba_selective_state_update": mamba1_step,
}

__all__ = ["OVER_TREES"]
