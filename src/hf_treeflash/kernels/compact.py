"""
K5, compact: keeps the accepted path's rows of a key/value cache, all layers in one launch.

Verification writes one slot per tree node behind the prefix; the rows of the accepted path are moved to the front of
that region. A table of addresses lets one kernel reach the separate tensors of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ._launch import LazyKernel, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl

# Elements a program keeps in registers between reading and writing.
PROGRAM_ELEMENTS = 4096


@LazyKernel
def _compact_kernel(
    POINTERS, LIKE, PATH, LENGTH, PREFIX, heads, head_dim, path_width, batch_stride, head_stride, slot_stride,
    PATH_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    base = tl.load(POINTERS + tensor).to(tl.pointer_type(LIKE.dtype.element_ty))
    base += batch * batch_stride + head * head_stride
    place = tl.arange(0, PATH_BLOCK)
    dim = tl.program_id(2) * DIM_BLOCK + tl.arange(0, DIM_BLOCK)
    prefix = tl.load(PREFIX + batch)
    node = tl.load(PATH + batch * path_width + place, mask=place < path_width, other=-1)
    moves = (place < tl.load(LENGTH + batch)) & (place < path_width) & (node != place)
    mask = moves[:, None] & (dim < head_dim)[None, :]
    rows = tl.load(base + ((prefix + node) * slot_stride)[:, None] + dim[None, :], mask=mask)
    # A slot may be both source and destination: everything is read before anything is written.
    tl.debug_barrier()
    tl.store(base + ((prefix + place) * slot_stride)[:, None] + dim[None, :], rows, mask=mask)


def pointer_table(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Returns the addresses of `tensors` on their device, int64 of shape `(len(tensors),)`.

    Copying the table to the device waits for it, so callers that keep their cache tensors build it once.
    """
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64).to(tensors[0].device)


def compact_reference(
    tensors: Sequence[torch.Tensor],
    path: torch.Tensor,
    path_length: torch.Tensor,
    prefix_length: torch.Tensor,
    pointers: torch.Tensor | None = None,
) -> None:
    """Plain torch oracle of [`compact`]; needs no `pointers`."""
    place = torch.arange(path.shape[1], device=path.device)
    moves = place < path_length.unsqueeze(1)
    # Places behind the path write the root's slot onto itself, as the first place does.
    source = prefix_length.unsqueeze(1) + torch.where(moves, path, 0)
    target = prefix_length.unsqueeze(1) + torch.where(moves, place, 0)
    batch = torch.arange(path.shape[0], device=path.device).unsqueeze(1)
    for tensor in tensors:
        slots_first = tensor.transpose(1, 2)
        slots_first[batch, target] = slots_first[batch, source]


def compact(
    tensors: Sequence[torch.Tensor],
    path: torch.Tensor,
    path_length: torch.Tensor,
    prefix_length: torch.Tensor,
    pointers: torch.Tensor | None = None,
) -> None:
    """
    Moves slot `prefix + path[i]` to slot `prefix + i` for every place `i` of the path, in place, in every tensor.

    Args:
        tensors (`Sequence[torch.Tensor]`, each of shape `(batch, kv_heads, slots, head_dim)`):
            Keys and values of all layers: one shape, dtype, device and set of strides; `head_dim` contiguous.
        path (`torch.LongTensor` of shape `(batch, width)`):
            Accepted nodes, ascending, starting with the root (node 0), padded with -1; `width` is at most the number
            of nodes.
        path_length (`torch.LongTensor` of shape `(batch,)`):
            Accepted nodes per row, at least 1.
        prefix_length (`torch.LongTensor` of shape `(batch,)`):
            Slot of node 0.
        pointers (`torch.LongTensor` of shape `(len(tensors),)`, *optional*):
            [`pointer_table`] of the tensors, if the caller keeps one.

    Raises:
        ValueError: if the tensors differ in shape, strides, dtype or device, or `head_dim` is not contiguous.
    """
    like = tensors[0]
    for tensor in tensors:
        same = tensor.shape == like.shape and tensor.stride() == like.stride() and tensor.dtype == like.dtype
        if not (same and tensor.device == like.device and tensor.stride(3) == 1):
            raise ValueError("all tensors must share shape, strides, dtype and device, with a contiguous head_dim")
    if not use_triton(like):
        return compact_reference(tensors, path, path_length, prefix_length)
    batch, heads, _, head_dim = like.shape
    path_block = next_power_of_2(path.shape[1])
    dim_block = min(next_power_of_2(head_dim), max(PROGRAM_ELEMENTS // path_block, 16))
    table = pointer_table(tensors) if pointers is None else pointers
    _compact_kernel[(len(tensors) * heads, batch, -(-head_dim // dim_block))](
        table, like, path.contiguous(), path_length.contiguous(), prefix_length.contiguous(),
        heads, head_dim, path.shape[1], *like.stride()[:3],
        PATH_BLOCK=path_block, DIM_BLOCK=dim_block, num_warps=4,
    )  # fmt: skip
