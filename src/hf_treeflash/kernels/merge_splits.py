"""
The second half of K1: partial results of the splits of a prefix become one, in the same launch or in one of its own.

Either way splits are added up in their order, so that results do not depend on which program was faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._launch import LazyKernel, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

# Partial results that the last program of a tile reads by itself, some two microseconds of one multiprocessor. More of
# them are spread over the programs of a launch of their own.
MERGED_INSIDE = 64 * 1024
# Partial results that a program of that launch holds.
MERGE_ELEMENTS = 8192


@LazyKernel
def _merge_tile(
    PARTIAL, LSE, OUT, rows, out_rows, in_rows, split_rows,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up all splits of one tile, in the program that saw them all arrive."""
    dim = tl.arange(0, DIM)
    # Other multiprocessors wrote these: `.cg` reads past this one's own cache.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(SPLITS):
        lse = tl.load(LSE + split * split_rows + rows, mask=in_rows, other=float("-inf"), cache_modifier=".cg")
        top = tl.maximum(top, lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for split in range(SPLITS):
        place = split * split_rows + rows
        lse = tl.load(LSE + place, mask=in_rows, other=float("-inf"), cache_modifier=".cg")
        partial = tl.load(
            PARTIAL + place[:, None] * DIM + dim[None, :], mask=in_rows[:, None], other=0.0, cache_modifier=".cg"
        )
        weight = tl.exp2(lse - top)
        total += weight
        acc += partial * weight[:, None]
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out_rows[:, None] * DIM + dim[None, :]
    tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=in_rows[:, None])


@LazyKernel
def _merge_kernel(
    PARTIAL, LSE, OUT, nodes, kv_heads, splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0).to(tl.int64)
    batch = batch_head // kv_heads
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, SPLITS_BLOCK)
    node = rows // GROUP
    in_rows = node < nodes
    dim = tl.arange(0, DIM)
    # All splits at once: their loads do not wait for each other.
    place = (batch_head * splits + split)[None, :] * (nodes * GROUP) + rows[:, None]
    valid = in_rows[:, None] & (split < splits)[None, :]
    lse = tl.load(LSE + place, mask=valid, other=float("-inf"))
    top = tl.max(lse, 1)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top)[:, None])
    partial = tl.load(PARTIAL + place[:, :, None] * DIM + dim[None, None, :], mask=valid[:, :, None], other=0.0)
    total = tl.sum(weight, 1)
    out = tl.sum(partial * weight[:, :, None], 1) / tl.where(total == 0.0, 1.0, total)[:, None]
    out_base = OUT + (batch * nodes * kv_heads + batch_head % kv_heads) * GROUP * DIM
    out_row = node * (kv_heads * GROUP) + rows % GROUP
    tl.store(out_base + out_row[:, None] * DIM + dim[None, :], out.to(OUT.dtype.element_ty), mask=in_rows[:, None])


def merge_splits(partial: torch.Tensor, lse: torch.Tensor, output: torch.Tensor) -> None:
    """
    Launches the merge by itself.

    Args:
        partial (`torch.FloatTensor` of shape `(batch * kv_heads, splits, nodes * group, head_dim)`):
            Results of each split alone.
        lse (`torch.FloatTensor` of shape `(batch * kv_heads, splits, nodes * group)`):
            Logarithms (base 2) of what each of them weighs.
        output (`torch.Tensor` of shape `(batch, nodes, heads, head_dim)`):
            Where the result goes; contiguous.
    """
    batch_heads, splits, rows, head_dim = partial.shape
    nodes = output.shape[1]
    splits_block, block_m = merge_tile(splits, head_dim)
    _merge_kernel[(batch_heads, -(-rows // block_m))](
        partial, lse, output, nodes, batch_heads // output.shape[0], splits,
        GROUP=rows // nodes, DIM=head_dim, SPLITS_BLOCK=splits_block, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip


def merge_tile(num_splits: int, head_dim: int) -> tuple[int, int]:
    """Returns how many splits and how many rows a program of the merge takes."""
    splits_block = next_power_of_2(num_splits)
    return splits_block, max(MERGE_ELEMENTS // (splits_block * head_dim), 1)


def splits_inside(block_m: int, head_dim: int) -> int:
    """Returns how many splits of a tile its last program merges by itself, a power of two."""
    return MERGED_INSIDE // (block_m * head_dim)
