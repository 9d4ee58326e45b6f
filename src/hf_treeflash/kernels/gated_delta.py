"""
K6, gated delta: a linear-attention layer over the nodes of a draft tree, each continuing its own path.

A tree is a sequence in which "earlier" means "ancestor". What the chunked form of the gated delta rule (arXiv
2412.06464) does with the causal triangle it can do with the ancestor mask, which is lower triangular too, as parents
stand before their children. All nodes start from the one stored state; none gets a state of its own.

Longer than 300 lines: kernel, launch and oracle of one operation stand together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ._launch import LazyKernel, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl

MAX_KEY_SIZE = 256


class GatedDelta(NamedTuple):
    """What [`gated_delta`] returns: the layer's output, and the nodes' terms of the state, in fp32.

    Attributes:
        output (`torch.Tensor` of shape `(batch, nodes, heads, value_size)`):
            The layer's output, in the type of `query`.
        keys (`torch.FloatTensor` of shape `(batch, key_heads, nodes, key_size)`):
            Keys of length 1.
        updates (`torch.FloatTensor` of shape `(batch, heads, nodes, value_size)`):
            What a node writes under its key.
        decays (`torch.Tensor` of shape `(batch, heads, nodes, 1)`):
            Log decays, summed over a node and its ancestors.
    """

    output: torch.Tensor
    keys: torch.Tensor
    updates: torch.Tensor
    decays: torch.Tensor


@LazyKernel
def _prepare_kernel(
    Q, K, G, MASK, QUERIES, KEYS, DECAYS,
    q_batch, q_node, q_head, k_batch, k_node, k_head, g_batch, g_node, nodes, heads, key_size, scale,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and queries of length 1, and log decays summed over a node and its ancestors; a block of nodes."""
    pair = tl.program_id(0).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    node = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = node < nodes
    sees_base = MASK + batch * nodes * nodes + node[:, None] * nodes
    decays = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tl.program_id(1) * BLOCK + 1, BLOCK):
        other = first + tl.arange(0, BLOCK)
        sees = tl.load(sees_base + other[None, :], mask=used[:, None] & (other < nodes)[None, :], other=0) != 0
        log_decay = tl.load(G + batch * g_batch + head + other * g_node, mask=other < nodes, other=0.0)
        # By adding: a matrix product would round log decays.
        decays += tl.sum(tl.where(sees, log_decay.to(tl.float32)[None, :], 0.0), 1)
    tl.store(DECAYS + pair * nodes + node, decays, mask=used)
    if head % GROUP == 0:
        dim = tl.arange(0, KEY_BLOCK)
        here = used[:, None] & (dim < key_size)[None, :]
        place = pair // GROUP * nodes * key_size + node[:, None] * key_size + dim[None, :]
        q_place = Q + batch * q_batch + head // GROUP * q_head + node[:, None] * q_node + dim[None, :]
        q = tl.load(q_place, mask=here, other=0.0).to(tl.float32)
        tl.store(QUERIES + place, q * (tl.rsqrt(tl.sum(q * q, 1) + 1e-6) * scale)[:, None], mask=here)
        k_place = K + batch * k_batch + head // GROUP * k_head + node[:, None] * k_node + dim[None, :]
        k = tl.load(k_place, mask=here, other=0.0).to(tl.float32)
        tl.store(KEYS + place, k * tl.rsqrt(tl.sum(k * k, 1) + 1e-6)[:, None], mask=here)


@LazyKernel
def _decayed_products(
    left_base, right_base, sees_base, decays_base, decays, node, other, nodes, key_size,
    BLOCK: tl.constexpr, KEY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of a block of nodes with the decayed keys of another, 0 where a node does not see the other."""
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    used, other_used = (node < nodes)[:, None], (other < nodes)[:, None]
    for first in range(0, key_size, KEY_STEP):
        dim = (first + tl.arange(0, KEY_STEP))[None, :]
        left = tl.load(left_base + node[:, None] * key_size + dim, mask=used & (dim < key_size), other=0.0)
        right = tl.load(right_base + other[:, None] * key_size + dim, mask=other_used & (dim < key_size), other=0.0)
        products = tl.dot(left, tl.trans(right), products, input_precision=PRECISION)
    both = used & (other < nodes)[None, :]
    sees = tl.load(sees_base + node[:, None] * nodes + other[None, :], mask=both, other=0) != 0
    other_decays = tl.load(decays_base + other, mask=other < nodes, other=0.0)
    # Masked before the exponential: differences off a node's path may be positive and overflow.
    return products * tl.exp(tl.where(sees, decays[:, None] - other_decays[None, :], float("-inf"))), sees


@LazyKernel
def _times_state(
    base, state_base, node, column, nodes, key_size, value_size,
    BLOCK: tl.constexpr, KEY_STEP: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of a block of nodes with some columns of the state."""
    result = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for first in range(0, key_size, KEY_STEP):
        dim = first + tl.arange(0, KEY_STEP)
        here = (node < nodes)[:, None] & (dim < key_size)[None, :]
        left = tl.load(base + node[:, None] * key_size + dim[None, :], mask=here, other=0.0)
        cells = (dim < key_size)[:, None] & (column < value_size)[None, :]
        state = tl.load(state_base + dim[:, None] * value_size + column[None, :], mask=cells, other=0.0)
        result = tl.dot(left, state.to(tl.float32), result, input_precision=PRECISION)
    return result


@LazyKernel
def _gated_delta_kernel(
    QUERIES, KEYS, V, BETA, STATE, MASK, DECAYS, OUT, UPDATES,
    v_batch, v_node, v_head, b_batch, b_node, nodes, heads, key_size, value_size,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, KEY_STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All nodes for some columns of the values, a block at a time: parents stand before their children."""
    pair = tl.program_id(0).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    keys = KEYS + pair // GROUP * nodes * key_size
    queries = QUERIES + pair // GROUP * nodes * key_size
    states = STATE + pair * key_size * value_size
    sees_base = MASK + batch * nodes * nodes
    decays_base = DECAYS + pair * nodes
    v_base = V + batch * v_batch + head * v_head
    updates_base = UPDATES + pair * nodes * value_size + column[None, :]
    out_base = OUT + (batch * nodes * heads + head) * value_size + column[None, :]

    for first in range(0, nodes, BLOCK):
        node = first + tl.arange(0, BLOCK)
        here = (node < nodes)[:, None] & (column < value_size)[None, :]
        decays = tl.load(decays_base + node, mask=node < nodes, other=0.0)
        beta = tl.load(BETA + batch * b_batch + head + node * b_node, mask=node < nodes, other=0.0).to(tl.float32)
        v = tl.load(v_base + node[:, None] * v_node + column[None, :], mask=here, other=0.0).to(tl.float32)
        # What nodes write: a triangular system, solved for the blocks before this one.
        known = _times_state(
            keys, states, node, column, nodes, key_size, value_size, BLOCK, KEY_STEP, BLOCK_V, PRECISION
        )  # fmt: skip
        known = known * tl.exp(decays)[:, None]
        for before in range(0, first, BLOCK):
            other = before + tl.arange(0, BLOCK)
            weights, _ = _decayed_products(
                keys, keys, sees_base, decays_base, decays, node, other, nodes, key_size, BLOCK, KEY_STEP, PRECISION
            )  # fmt: skip
            cells = (other < nodes)[:, None] & (column < value_size)[None, :]
            written = tl.load(updates_base + other[:, None] * value_size, mask=cells, other=0.0)
            known = tl.dot(weights, written, known, input_precision=PRECISION)
        right = beta[:, None] * (v - known)
        weights, sees = _decayed_products(
            keys, keys, sees_base, decays_base, decays, node, node, nodes, key_size, BLOCK, KEY_STEP, PRECISION
        )  # fmt: skip
        system = tl.where(node[:, None] > node[None, :], weights * beta[:, None], 0.0)
        # Within a block by levels. Deeper nodes wait as zeros: half-done ones grow from level to level.
        level = tl.sum(sees.to(tl.int32), 1)
        updates = tl.where(level[:, None] <= 1, right, 0.0)
        for depth in range(2, tl.max(level, 0) + 1):
            solved = right - tl.dot(system, updates, input_precision=PRECISION)
            updates = tl.where(level[:, None] <= depth, solved, 0.0)
        tl.store(updates_base + node[:, None] * value_size, updates, mask=here)
        tl.debug_barrier()  # other threads read them
        # What nodes read.
        output = _times_state(
            queries, states, node, column, nodes, key_size, value_size, BLOCK, KEY_STEP, BLOCK_V, PRECISION
        )  # fmt: skip
        output = output * tl.exp(decays)[:, None]
        for before in range(0, first + 1, BLOCK):
            other = before + tl.arange(0, BLOCK)
            weights, _ = _decayed_products(
                queries, keys, sees_base, decays_base, decays, node, other, nodes, key_size, BLOCK, KEY_STEP, PRECISION
            )  # fmt: skip
            cells = (other < nodes)[:, None] & (column < value_size)[None, :]
            written = tl.load(updates_base + other[:, None] * value_size, mask=cells, other=0.0)
            output = tl.dot(weights, written, output, input_precision=PRECISION)
        tl.store(out_base + node[:, None] * (heads * value_size), output.to(OUT.dtype.element_ty), mask=here)


def path_decays(log_decay: torch.Tensor, ancestor_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns what is left at every node of the state at the root's parent and of what its ancestors wrote.

    Args:
        log_decay (`torch.Tensor` of shape `(batch, heads, nodes)`):
            Log decay of every node.
        ancestor_mask (`torch.BoolTensor` of shape `(batch, nodes, nodes)`):
            True where the node of the row sees the node of the column (ancestors and itself).

    Returns:
        `tuple` of the log decays summed over a node and its ancestors, float64 of the shape of `log_decay`; and of the
        ratios, float32 of shape `(batch, heads, nodes, nodes)`: what is left at one node of what another wrote, 0 off
        its path.
    """
    sees = ancestor_mask[:, None]
    # In float64: where TF32 is allowed a product of floats would round log decays to 10 bits, and long sums cancel.
    sums = log_decay.double() @ ancestor_mask.mT.double()  # (batch, heads, nodes)
    # Masked before the exponential: differences off a node's path may be positive and overflow.
    ratios = (sums[..., None] - sums[:, :, None]).float().masked_fill_(~sees, float("-inf")).exp_()
    return sums, ratios


def gated_delta_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> GatedDelta:
    """Plain torch oracle of [`gated_delta`]."""
    nodes, size = query.shape[1], query.shape[3]
    groups = value.shape[2] // query.shape[2]
    # Keys and queries meet the state and the keys in one product each.
    rows = torch.cat([key, query], dim=1).float().transpose(1, 2)  # (batch, key_heads, 2 * nodes, key_size)
    rows = rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)
    keys = rows[:, :, :nodes]
    value, log_decay, beta = (part.float().transpose(1, 2) for part in (value, log_decay, beta))
    decays, ratios = path_decays(log_decay, ancestor_mask)
    products = (rows @ keys.mT).repeat_interleave(groups, dim=1)  # (batch, heads, 2 * nodes, nodes)
    read = (rows[:, :, None] @ state.float().unflatten(1, (-1, groups))).flatten(1, 2)  # (..., 2 * nodes, value_size)
    decay, beta = decays.exp().float()[..., None], beta[..., None]
    # The diagonal is taken as ones, and nothing above it is read.
    updates = torch.linalg.solve_triangular(
        products[:, :, :nodes] * ratios * beta,
        beta * (value - read[:, :, :nodes] * decay),
        upper=False,
        unitriangular=True,
    )
    output = read[:, :, nodes:] * decay + (products[:, :, nodes:] * ratios) @ updates
    output = (output * size**-0.5).to(query.dtype).transpose(1, 2)  # (batch, nodes, heads, value_size)
    return GatedDelta(output, keys, updates, decays[..., None])


def gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    ancestor_mask: torch.Tensor,
) -> GatedDelta:
    """
    Runs the gated delta rule over the nodes of trees, all from one state, which stays as it is.

    At a node the state decays, `S <- exp(log_decay) S`, then learns `S <- S + beta k (v - k^T S)^T`, then is read,
    `q^T S`. A node's state is that of its parent; the root's parent is `state`.

    Args:
        query, key (`torch.Tensor` of shape `(batch, nodes, key_heads, key_size)`):
            Brought to length 1 here, and queries scaled by `key_size ** -0.5`.
        value (`torch.Tensor` of shape `(batch, nodes, heads, value_size)`):
            `heads` is a multiple of `key_heads`; consecutive heads share a key.
        log_decay, beta (`torch.Tensor` of shape `(batch, nodes, heads)`):
            Log decay, never positive, and strength of the update, 0 to 2.
        state (`torch.Tensor` of shape `(batch, heads, key_size, value_size)`):
            The state the roots continue.
        ancestor_mask (`torch.BoolTensor` of shape `(batch, nodes, nodes)`):
            True where the node of the row sees the node of the column (ancestors and itself); parents stand before
            their children.

    Returns:
        [`GatedDelta`]

    Raises:
        ValueError: if shapes do not fit each other.

    Source: arXiv 2412.06464 for the chunked form.
    """
    batch, nodes, key_heads, key_size = key.shape
    heads, value_size = value.shape[2:]
    if (
        query.shape != key.shape
        or value.shape[:2] != (batch, nodes)
        or heads % key_heads
        or not log_decay.shape == beta.shape == (batch, nodes, heads)
        or state.shape != (batch, heads, key_size, value_size)
        or ancestor_mask.shape != (batch, nodes, nodes)
    ):
        shapes = [tuple(t.shape) for t in (query, key, value, log_decay, beta, state, ancestor_mask)]
        raise ValueError(f"the inputs of the gated delta rule do not fit each other: {shapes}")
    inputs = (query, key, value, log_decay, beta, state, ancestor_mask)
    if not use_triton(query) or key_size > MAX_KEY_SIZE:
        return gated_delta_reference(*inputs)
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    log_decay, beta = (part if part.stride(2) == 1 else part.contiguous() for part in (log_decay, beta))
    ancestor_mask, group = ancestor_mask.contiguous(), heads // key_heads
    queries, keys = state.new_empty(2, batch, key_heads, nodes, key_size, dtype=torch.float32)
    updates = state.new_empty(batch, heads, nodes, value_size, dtype=torch.float32)
    decays = state.new_empty(batch, heads, nodes, 1, dtype=torch.float32)
    output = query.new_empty(batch, nodes, heads, value_size)
    config = gated_delta_config(nodes, value_size)
    _prepare_kernel[(batch * heads, -(-nodes // config["BLOCK"]))](
        query, key, log_decay, ancestor_mask, queries, keys, decays,
        *query.stride()[:3], *key.stride()[:3], *log_decay.stride()[:2], nodes, heads, key_size, key_size**-0.5,
        GROUP=group, BLOCK=config["BLOCK"], KEY_BLOCK=next_power_of_2(key_size), num_warps=4,
    )  # fmt: skip
    _gated_delta_kernel[(batch * heads, -(-value_size // config["BLOCK_V"]))](
        queries, keys, value, beta, state.contiguous(), ancestor_mask, decays, output, updates,
        *value.stride()[:3], *beta.stride()[:2], nodes, heads, key_size, value_size, GROUP=group, **config,
    )  # fmt: skip
    return GatedDelta(output, keys, updates, decays)


def gated_delta_config(nodes: int, value_size: int) -> dict:
    """
    Returns tile sizes and launch options.

    Args:
        nodes (`int`):
            Nodes of a tree.
        value_size (`int`):
            Size of a head's values.
    """
    return {
        "BLOCK": 16 if nodes <= 16 else 32,
        "BLOCK_V": min(32, max(16, next_power_of_2(value_size))),
        "KEY_STEP": 32,
        "PRECISION": "tf32x3",  # three products on the matrix units, which together are as exact as fp32
        "num_warps": 4,
        "num_stages": 1,
    }
