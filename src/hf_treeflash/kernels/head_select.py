"""
K2, head select: the most likely tokens of every row of logits with their log-probabilities.

Batches the output head of the AR approximation (TreeFlash, arXiv 2606.03819). The logits are read once, for the
log-sum-exp and the maximum of every tile; every element of the top k lies in one of the k tiles with the largest
maxima, so the selection itself reads only those.

With a table of noise, rows are ranked by the sum of both: what the target's coming draw of a slot's token adds to its
logits is known beforehand, and the same for all rows of the slot.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ._launch import LazyKernel, next_power_of_2, use_triton

if TYPE_CHECKING:
    import triton.language as tl

TILE = 128
CHUNK = 4096
# Larger selections keep too many candidates per row in registers; they take the torch path.
MAX_KERNEL_K = 64


@LazyKernel
def _tile_maxima_kernel(
    LOGITS, NOISE, SLOTS, TILE_MAX, CHUNK_MAX, CHUNK_SUM,
    row_stride, rows, slots, vocab, tiles, chunks, inverse_temperature,
    NOISY: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(LOGITS + row * row_stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    if NOISY:
        slot = row // rows * slots + tl.load(SLOTS + row % rows)
        x += tl.load(NOISE + slot * vocab + column, mask=column < vocab, other=0.0)
    x = tl.where(x == x, x, float("-inf"))
    per_chunk: tl.constexpr = CHUNK // TILE
    tile_max = tl.max(tl.reshape(x, [per_chunk, TILE]), 1)
    tile = chunk * per_chunk + tl.arange(0, per_chunk)
    tl.store(TILE_MAX + row * tiles + tile, tile_max, mask=tile < tiles)
    top = tl.max(tile_max, 0)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    tl.store(CHUNK_MAX + row * chunks + chunk, top)
    tl.store(CHUNK_SUM + row * chunks + chunk, tl.sum(tl.exp((x - safe_top) * inverse_temperature), 0))


@LazyKernel
def _select_kernel(
    LOGITS, NOISE, SLOTS, TILE_MAX, CHUNK_MAX, CHUNK_SUM, TOKEN_IDS, LOG_PROBS,
    row_stride, rows, slots, vocab, tiles, chunks, inverse_temperature,
    NOISY: tl.constexpr, NUM_TILES: tl.constexpr, TOP_K: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
    TILES_BLOCK: tl.constexpr, CHUNKS_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    neg_inf = float("-inf")
    chunk = tl.arange(0, CHUNKS_BLOCK)
    chunk_max = tl.load(CHUNK_MAX + row * chunks + chunk, mask=chunk < chunks, other=neg_inf)
    chunk_sum = tl.load(CHUNK_SUM + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    top = tl.max(chunk_max, 0)
    safe_top = tl.where(top == neg_inf, 0.0, top)
    total = tl.sum(chunk_sum * tl.exp((chunk_max - safe_top) * inverse_temperature), 0)
    log_total = tl.log(tl.where(total == 0.0, 1.0, total))

    # Key of a selection: order-preserving bits of the value above, inverted index below, so that one integer maximum
    # means "larger value first, then smaller index". Minus zero counts as zero.
    lane = tl.arange(0, LANES)
    tile = tl.arange(0, TILES_BLOCK)
    x = tl.load(TILE_MAX + row * tiles + tile, mask=tile < tiles, other=neg_inf)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = (ordered << 32) | (0x7FFFFFFF - tile).to(tl.int64)
    chosen = tl.zeros([LANES], tl.int32)
    for i in range(NUM_TILES):
        best = tl.max(key, 0)
        chosen = tl.where(lane == i, (0x7FFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32), chosen)
        key = tl.where(key == best, -0x7FFFFFFFFFFFFFFF, key)

    column = chosen[:, None] * TILE + tl.arange(0, TILE)[None, :]
    valid = (column < vocab) & (lane < NUM_TILES)[:, None]
    x = tl.load(LOGITS + row * row_stride + column, mask=valid, other=neg_inf).to(tl.float32)
    if NOISY:
        slot = row // rows * slots + tl.load(SLOTS + row % rows)
        x += tl.load(NOISE + slot * vocab + column, mask=valid, other=0.0)
    x = tl.where((x == x) & (x != 0.0), x, tl.where(x == 0.0, 0.0, neg_inf))
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = (ordered << 32) | (0x7FFFFFFF - column).to(tl.int64)
    key = tl.where(valid, key, -0x7FFFFFFFFFFFFFFF)
    token = tl.zeros([LANES], tl.int64)
    value = tl.zeros([LANES], tl.int32)
    for i in range(TOP_K):
        best = tl.max(tl.max(key, 1), 0)
        token = tl.where(lane == i, 0x7FFFFFFF - (best & 0xFFFFFFFF), token)
        value = tl.where(lane == i, (best >> 32).to(tl.int32), value)
        key = tl.where(key == best, -0x7FFFFFFFFFFFFFFF, key)
    value = tl.where(value < 0, value ^ 0x7FFFFFFF, value)
    logit = value.to(tl.float32, bitcast=True)
    log_prob = tl.where(logit == neg_inf, neg_inf, (logit - safe_top) * inverse_temperature - log_total)
    tl.store(TOKEN_IDS + row * TOP_K + lane, token, mask=lane < TOP_K)
    tl.store(LOG_PROBS + row * TOP_K + lane, log_prob, mask=lane < TOP_K)


def head_select_reference(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    noise: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch oracle of [`head_select`], and what runs where the kernel does not."""
    logits = logits.float()
    if noise is not None:
        logits = logits + (noise if slots is None else noise.index_select(1, slots))
    logits = logits.masked_fill(logits.isnan(), float("-inf")) + 0.0  # minus zero counts as zero
    log_total = (logits / temperature).logsumexp(-1, keepdim=True)
    # `topk` leaves the order of ties open. In these keys, as in the kernel's, there are none: order-preserving bits of
    # the value above, inverted token id below.
    bits = logits.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) | (0x7FFFFFFF - torch.arange(logits.shape[-1], device=logits.device))
    token_ids = 0x7FFFFFFF - (keys.topk(k, dim=-1).values & 0x7FFFFFFF)
    values = logits.gather(-1, token_ids)
    log_probs = (values / temperature - log_total).masked_fill(values == float("-inf"), float("-inf"))
    return token_ids, log_probs


def head_select(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    noise: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Selects the `k` most likely tokens of every row. Equal logits are ordered by token id; NaN counts as minus
    infinity.

    Args:
        logits (`torch.Tensor` of shape `(batch, rows, vocab)`):
            bf16, fp16 or fp32; without noise any leading dimensions will do.
        k (`int`):
            Tokens per row, `1 <= k <= vocab`.
        temperature (`float`):
            Positive divisor of the logits, noise included.
        noise (`torch.Tensor` of shape `(batch, slots, vocab)`, *optional*):
            fp32, what is added to the logits.
        slots (`torch.Tensor` of shape `(rows,)`, *optional*):
            int64, the slot whose noise each row takes; by default there is one row per slot.

    Returns:
        `tuple` of token ids, int64 of shape `(batch, rows, k)`, most likely first, and their log-probabilities under
        `softmax((logits + noise) / temperature)`, fp32 of the same shape (natural logarithm).

    Raises:
        ValueError: if `k` or `temperature` is out of range, or the noise does not fit the logits.
    """
    vocab = logits.shape[-1]
    if not 1 <= k <= vocab:
        raise ValueError(f"k must be between 1 and the vocabulary size {vocab}, got {k}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if noise is not None:
        wanted = (logits.shape[0], logits.shape[1] if slots is None else noise.shape[1], vocab)
        if logits.ndim != 3 or noise.dtype != torch.float32 or tuple(noise.shape) != wanted:
            raise ValueError(f"noise must be fp32 of shape {wanted}, got {noise.dtype} of {tuple(noise.shape)}")
    # Whether the kernel runs is found out within the operator, where `torch.compile` does not look.
    select = head_select_op if logits.is_cuda else _head_select
    return select(logits, k, temperature, noise, slots)


def _head_select(
    logits: torch.Tensor, k: int, temperature: float, noise: torch.Tensor | None, slots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if k > MAX_KERNEL_K or not use_triton(logits):
        return head_select_reference(logits, k, temperature, noise, slots)
    vocab = logits.shape[-1]
    flat = logits.reshape(-1, vocab)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, tiles, chunks = flat.shape[0], -(-vocab // TILE), -(-vocab // CHUNK)
    tile_max = flat.new_empty(rows, tiles, dtype=torch.float32)
    chunk_max, chunk_sum = flat.new_empty(2, rows, chunks, dtype=torch.float32).unbind()
    token_ids = flat.new_empty(rows, k, dtype=torch.int64)
    log_probs = flat.new_empty(rows, k, dtype=torch.float32)
    if rows:
        # Without noise its pointers stand for nothing.
        table, places = (flat, token_ids) if noise is None else (noise.contiguous(), slots)
        if places is None:
            places = torch.arange(logits.shape[1], device=flat.device)
        own, given = (1, 1) if noise is None else (logits.shape[1], noise.shape[1])
        sizes = (flat.stride(0), own, given, vocab, tiles, chunks, 1.0 / temperature)
        noisy = noise is not None
        _tile_maxima_kernel[(rows, chunks)](
            flat, table, places, tile_max, chunk_max, chunk_sum, *sizes, NOISY=noisy, TILE=TILE, CHUNK=CHUNK,
            num_warps=4,
        )  # fmt: skip
        _select_kernel[(rows,)](
            flat, table, places, tile_max, chunk_max, chunk_sum, token_ids, log_probs, *sizes, NOISY=noisy,
            NUM_TILES=min(k, tiles), TOP_K=k, LANES=next_power_of_2(k), TILE=TILE,
            TILES_BLOCK=next_power_of_2(tiles), CHUNKS_BLOCK=next_power_of_2(chunks), num_warps=select_warps(k),
        )  # fmt: skip
    shape = (*logits.shape[:-1], k)
    return token_ids.view(shape), log_probs.view(shape)


@torch.library.custom_op("hf_treeflash::head_select", mutates_args=())
def head_select_op(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    noise: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`head_select`] as an operator that `torch.compile` does not look into."""
    return _head_select(logits, k, temperature, noise, slots)


@head_select_op.register_fake
def _(logits, k, temperature, noise=None, slots=None):
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


def select_warps(k: int) -> int:
    """Returns the number of warps of the selection: its candidates, 128 per selected token, live in registers."""
    return 4 if k <= 16 else 8 if k <= 32 else 16
