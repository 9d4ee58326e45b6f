"""The recurrences of the layers, written plainly: float64, one node after another, each from its parent's state."""

from collections.abc import Callable

import torch


def along_tree(parents: torch.Tensor, state: torch.Tensor, step: Callable) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a recurrence over every node of one tree.

    Args:
        parents (`torch.LongTensor` of shape `(nodes,)`):
            Parent of each node, -1 for the root.
        state (`torch.Tensor`):
            State before the root.
        step (`Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]`):
            Given a node and its parent's state, returns the node's output and state.

    Returns:
        `tuple[torch.Tensor, list[torch.Tensor]]`: The outputs, stacked, and every node's state.
    """
    outputs, states = [], []
    for node, parent in enumerate(parents.tolist()):
        output, own = step(node, state if parent < 0 else states[parent])
        outputs.append(output)
        states.append(own)
    return torch.stack(outputs), states


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_rule(query, key, value, log_decay, beta, state, parents):
    """The gated delta rule, and with a decay per channel Kimi's; one row, arguments as the walkers take them.

    Args:
        query, key (`(nodes, heads, key_size)`), value (`(nodes, heads, value_size)`), beta (`(nodes, heads)`):
            As the layer computes them.
        log_decay (`(nodes, heads)` or `(nodes, heads, key_size)`):
            Log decay.
        state (`(heads, key_size, value_size)`), parents (`(nodes,)`):
            See [`along_tree`].
    """
    query, key, value, log_decay, beta, state = (x.double() for x in (query, key, value, log_decay, beta, state))
    query, key = unit(query) * query.shape[-1] ** -0.5, unit(key)
    log_decay = log_decay if log_decay.ndim == 3 else log_decay[..., None]

    def step(node, before):
        decayed = before * log_decay[node].exp()[..., None]
        known = torch.einsum("hkv,hk->hv", decayed, key[node])
        learnt = (value[node] - known) * beta[node][:, None]
        after = decayed + torch.einsum("hk,hv->hkv", key[node], learnt)
        return torch.einsum("hkv,hk->hv", after, query[node]), after

    return along_tree(parents, state, step)


def mamba2(hidden, dt, a, b, c, d, state, parents):
    """Mamba-2, one row.

    Args:
        hidden (`(nodes, heads, head_dim)`), dt (`(nodes, heads)`), a (`(heads,)`), d (`(heads,)`):
            Input, time step after its softplus, rate and skip weight.
        b, c (`(nodes, heads, state_size)`):
            Input and output weights, repeated to the heads.
        state (`(heads, head_dim, state_size)`), parents (`(nodes,)`):
            See [`along_tree`].
    """
    hidden, dt, a, b, c, d, state = (x.double() for x in (hidden, dt, a, b, c, d, state))

    def step(node, before):
        written = torch.einsum("h,hp,hs->hps", dt[node], hidden[node], b[node])
        after = before * (a * dt[node]).exp()[:, None, None] + written
        return torch.einsum("hps,hs->hp", after, c[node]) + d[:, None] * hidden[node], after

    return along_tree(parents, state, step)


def mamba1(hidden, dt, a, b, c, d, state, parents):
    """Mamba-1, one row.

    Args:
        hidden, dt (`(nodes, channels)`), a (`(channels, state_size)`), d (`(channels,)`):
            Input, time step after its softplus, rates and skip weight.
        b, c (`(nodes, state_size)`):
            Input and output weights.
        state (`(channels, state_size)`), parents (`(nodes,)`):
            See [`along_tree`].
    """
    hidden, dt, a, b, c, d, state = (x.double() for x in (hidden, dt, a, b, c, d, state))

    def step(node, before):
        written = (dt[node] * hidden[node])[:, None] * b[node]
        after = before * (a * dt[node][:, None]).exp() + written
        return after @ c[node] + d * hidden[node], after

    return along_tree(parents, state, step)


def convolution(columns, stored: int, weight, bias, parents):
    """A causal convolution, one row: the window of a node ends with it and reaches back over its ancestors.

    Args:
        columns (`(channels, stored + nodes)`):
            Stored columns, then those of the nodes.
        stored (`int`):
            How many are stored.
        weight (`(channels, kernel)`), bias (`(channels,)`), parents (`(nodes,)`):
            Of the layer, and see [`along_tree`].
    """
    columns, weight, bias = columns.double(), weight.double(), bias.double()

    def step(node, before):
        window = torch.cat([before[:, 1:], columns[:, stored + node, None]], dim=1)
        return (window * weight).sum(1) + bias, window

    return along_tree(parents, columns[:, stored - weight.shape[1] : stored], step)
