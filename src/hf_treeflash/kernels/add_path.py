"""
K7, add path: moves recurrent states along accepted paths.

What a node of a tree adds to the state of a linear-attention layer is the product of two vectors. The state behind a
path is the old state decayed, and the terms of its nodes, each decayed by what came after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._launch import LazyKernel, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl


@LazyKernel
def _add_path_kernel(
    STATE, KEYS, UPDATES, DECAYS, PATH, s_batch, s_head, s_key, s_value, nodes, length, heads, key_size, value_size,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    batch = pair // heads
    dim = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_dim = dim < key_size
    in_columns = column < value_size
    step = tl.arange(0, LENGTH)
    path = tl.load(PATH + batch * length + step, mask=step < length, other=-1)
    # One decay per head, or one per channel of the keys.
    channel = dim % CHANNELS
    decays = DECAYS + pair * nodes * CHANNELS + channel
    end = tl.load(decays + tl.max(path, 0) * CHANNELS, mask=in_dim, other=0.0)
    base = STATE + batch * s_batch + (pair % heads) * s_head
    cell = base + dim[:, None] * s_key + column[None, :] * s_value
    here = in_dim[:, None] & in_columns[None, :]
    state = tl.load(cell, mask=here, other=0.0).to(tl.float32) * tl.exp(end)[:, None]
    for place in range(0, length):
        node = tl.load(PATH + batch * length + place)
        kept = node >= 0
        node = tl.maximum(node, 0)
        since = end - tl.load(decays + node * CHANNELS, mask=in_dim, other=0.0)
        weight = tl.exp(tl.where(kept, since, float("-inf")))
        k = tl.load(KEYS + (pair // GROUP * nodes + node) * key_size + dim, mask=in_dim, other=0.0)
        u = tl.load(UPDATES + (pair * nodes + node) * value_size + column, mask=in_columns, other=0.0)
        state += (weight * k)[:, None] * u[None, :]
    tl.store(cell, state.to(STATE.dtype.element_ty), mask=here)


def add_path_reference(
    state: torch.Tensor, keys: torch.Tensor, updates: torch.Tensor, decays: torch.Tensor, path: torch.Tensor
) -> None:
    """Plain torch oracle of [`add_path`]."""
    groups = state.shape[1] // keys.shape[1]
    used = path >= 0

    def at(values: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        index = nodes[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        return values.gather(2, index)  # (batch, heads, chosen, size)

    nodes = path.clamp(min=0)
    end = at(decays, nodes.amax(1, keepdim=True))  # parents stand before children: the last is the greatest
    weights = (end - at(decays, nodes)).masked_fill(~used[:, None, :, None], float("-inf")).exp().float()
    left = at(keys, nodes).repeat_interleave(groups, dim=1) * weights  # (batch, heads, length, key_size)
    moved = state.float().mul_(end.exp().float().mT)  # in place where states are fp32, as they are
    moved += left.mT @ at(updates, nodes)
    state.copy_(moved)


def add_path(
    state: torch.Tensor, keys: torch.Tensor, updates: torch.Tensor, decays: torch.Tensor, path: torch.Tensor
) -> None:
    """
    Moves states along accepted paths, in place.

    Args:
        state (`torch.Tensor` of shape `(batch, heads, key_size, value_size)`):
            The states the roots continued.
        keys (`torch.FloatTensor` of shape `(batch, key_heads, nodes, key_size)`):
            First vector of each node's term; `heads / key_heads` consecutive heads share it.
        updates (`torch.FloatTensor` of shape `(batch, heads, nodes, value_size)`):
            Second vector of each node's term.
        decays (`torch.Tensor` of shape `(batch, heads, nodes, 1 or key_size)`):
            Log decays, summed over a node and its ancestors: one per head, or one per channel of the keys.
        path (`torch.LongTensor` of shape `(batch, length)`):
            Accepted nodes from the root down, padded with -1.
    """
    if not use_triton(state):
        return add_path_reference(state, keys, updates, decays, path)
    (batch, heads, key_size, value_size), length = state.shape, path.shape[1]
    blocks = {"BLOCK_K": min(32, next_power_of_2(key_size)), "BLOCK_V": min(64, next_power_of_2(value_size))}
    grid = (batch * heads, -(-key_size // blocks["BLOCK_K"]), -(-value_size // blocks["BLOCK_V"]))
    _add_path_kernel[grid](
        state, *(part.contiguous() for part in (keys, updates, decays.float(), path)), *state.stride(),
        keys.shape[2], length, heads, key_size, value_size,
        GROUP=heads // keys.shape[1], CHANNELS=decays.shape[3], LENGTH=next_power_of_2(length), **blocks, num_warps=4,
    )  # fmt: skip
