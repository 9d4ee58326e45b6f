"""
K1, tree attention: the nodes of a draft tree attend to a dense prefix and to their ancestors.

The verification step of tree speculative decoding (TreeFlash, arXiv 2606.03819). The kernel combines split-KV decoding
(FlashDecoding), packing of the query heads that share a key/value head, and ancestor masks of one bit per node pair.

Longer than 300 lines: kernels, launch and oracle of one operation stand together.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from ._launch import LazyKernel, next_power_of_2, use_triton
from .ancestor_words import dense_tree_mask, num_words
from .merge_splits import _merge_tile, merge_splits, splits_inside

if TYPE_CHECKING:
    import triton.language as tl

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
# Two programs for each multiprocessor of an H100.
PROGRAMS = 264
MIN_SPLIT_SLOTS, MAX_SPLITS = 128, 32


@LazyKernel
def _attend(
    q, k_base, v_base, k_slot, v_slot, slots, in_slots, visible, scale_log2e, top, total, acc,
    DIM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys and values in the online softmax (base 2): running maximum, sum and weighted values."""
    dim = tl.arange(0, DIM)
    k = tl.load(k_base + slots[:, None] * k_slot + dim[None, :], mask=in_slots[:, None], other=0.0)
    if UPCAST:  # the interpreter has no bfloat16 arithmetic
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2e
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row may have seen nothing yet: keep the exponents finite.
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp2(top - safe_top)
    p = tl.exp2(scores - safe_top[:, None])
    total = total * decay + tl.sum(p, 1)
    v = tl.load(v_base + slots[:, None] * v_slot + dim[None, :], mask=in_slots[:, None], other=0.0)
    p = p.to(v.dtype)
    if UPCAST:
        p = p.to(tl.float32)
        v = v.to(tl.float32)
    acc = tl.dot(p, v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@LazyKernel
def _tree_attention_kernel(
    Q, K, V, NEW_K, NEW_V, WORDS, PREFIX, START, PARTIAL, LSE, ARRIVALS, OUT, scale_log2e,
    q_batch, q_head, q_node, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    n_k_batch, n_k_head, n_k_node, n_v_batch, n_v_head, n_v_node, w_batch, w_node, nodes, kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    SPLITS: tl.constexpr, MERGE: tl.constexpr, APPEND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0).to(tl.int64)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    # The query heads of one key/value head are packed into the rows, so that they share every key/value load.
    node = rows // GROUP
    head = rows % GROUP
    in_rows = node < nodes
    dim = tl.arange(0, DIM)
    q_base = Q + batch * q_batch + kv_head * GROUP * q_head
    q_ptr = q_base + head[:, None] * q_head + node[:, None] * q_node + dim[None, :]
    q = tl.load(q_ptr, mask=in_rows[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)

    # Lengths are read on the device: one captured graph serves every context length.
    prefix = tl.load(PREFIX + batch).to(tl.int32)
    start = tl.load(START + batch).to(tl.int32)
    per_split = tl.cdiv(tl.cdiv(prefix - start, SPLITS), BLOCK_N) * BLOCK_N
    low = start + split * per_split
    high = tl.minimum(low + per_split, prefix)
    k_base = K + batch * k_batch + kv_head * k_head
    v_base = V + batch * v_batch + kv_head * v_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)

    for first in range(low, high, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        in_slots = slots < high
        top, total, acc = _attend(
            q, k_base, v_base, k_slot, v_slot, slots, in_slots, in_slots[None, :], scale_log2e, top, total, acc,
            DIM, UPCAST,
        )  # fmt: skip

    if split == SPLITS - 1:
        column = tl.arange(0, TAIL_N)
        tail_k, tail_v = k_base + prefix * k_slot, v_base + prefix * v_slot
        if APPEND:  # nobody reads their slots of the cache while one program writes there
            new_k = NEW_K + batch * n_k_batch + kv_head * n_k_head
            new_v = NEW_V + batch * n_v_batch + kv_head * n_v_head
            if tl.program_id(1) == 0:
                for first in range(0, nodes, TAIL_N):
                    place = first + column
                    in_tail = (place < nodes)[:, None]
                    k = tl.load(new_k + place[:, None] * n_k_node + dim[None, :], mask=in_tail)
                    tl.store(tail_k + place[:, None] * k_slot + dim[None, :], k, mask=in_tail)
                    v = tl.load(new_v + place[:, None] * n_v_node + dim[None, :], mask=in_tail)
                    tl.store(tail_v + place[:, None] * v_slot + dim[None, :], v, mask=in_tail)
        for first in range(0, nodes, TAIL_N):
            word = tl.load(WORDS + batch * w_batch + node * w_node + first // 64, mask=in_rows, other=0)
            sees = ((word[:, None] >> (first % 64 + column)[None, :].to(tl.int64)) & 1) != 0
            in_slots = first + column < nodes
            if APPEND:
                top, total, acc = _attend(
                    q, new_k, new_v, n_k_node, n_v_node, first + column, in_slots, sees & in_slots[None, :],
                    scale_log2e, top, total, acc, DIM, UPCAST,
                )  # fmt: skip
            else:
                top, total, acc = _attend(
                    q, tail_k, tail_v, k_slot, v_slot, first + column, in_slots, sees & in_slots[None, :],
                    scale_log2e, top, total, acc, DIM, UPCAST,
                )  # fmt: skip

    safe_total = tl.where(total == 0.0, 1.0, total)
    out = acc / safe_total[:, None]
    out_base = OUT + (batch * nodes * kv_heads + kv_head) * GROUP * DIM
    out_row = node * (kv_heads * GROUP) + head
    if SPLITS == 1:
        tl.store(out_base + out_row[:, None] * DIM + dim[None, :], out.to(OUT.dtype.element_ty), mask=in_rows[:, None])
    else:
        first_row = batch_head * SPLITS * (nodes * GROUP)
        place = first_row + split * (nodes * GROUP) + rows
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(safe_total))
        tl.store(LSE + place, lse, mask=in_rows)
        tl.store(PARTIAL + place[:, None] * DIM + dim[None, :], out, mask=in_rows[:, None])
        if MERGE:
            tl.debug_barrier()  # one thread tells of the stores of all
            arrivals = ARRIVALS + batch_head * tl.num_programs(1) + tl.program_id(1)
            if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
                _merge_tile(
                    PARTIAL + first_row * DIM, LSE + first_row, out_base, rows, out_row, in_rows, nodes * GROUP,
                    DIM, BLOCK_M, SPLITS,
                )  # fmt: skip
                tl.store(arrivals, 0)  # as the next launch expects it


def tree_attention_config(
    dtype: torch.dtype, head_dim: int, packed_rows: int, capability: tuple[int, int]
) -> dict[str, int]:
    """
    Returns tile sizes and launch options.

    Args:
        dtype (`torch.dtype`):
            Type of query, key and value.
        head_dim (`int`):
            Size of a head.
        packed_rows (`int`):
            Nodes times query heads per key/value head.
        capability (`tuple[int, int]`):
            Compute capability of the device. 64 rows are what Hopper's warp-group matrix unit needs.
    """
    full = dtype == torch.float32
    block_m = 16 if full or packed_rows <= 16 else 64
    block_n = 32 if full or head_dim > 128 else 64
    if full:  # no matrix unit: more warps, or the tile spills
        num_warps = 8
    elif block_m == 16 or (capability >= (9, 0) and head_dim <= 128):
        num_warps = 4
    else:
        num_warps = 8
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "TAIL_N": 32 if block_m == 16 else block_n,
        "num_warps": num_warps,
        "num_stages": 1 if full else 2,
    }


def is_tileable(head_dim: int) -> bool:
    """Returns whether the kernel knows a head size; for others its oracle answers."""
    return next_power_of_2(head_dim) == head_dim and MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _config_of(query: torch.Tensor, key: torch.Tensor) -> dict[str, int]:
    capability = _capability(query.device) if query.is_cuda else (0, 0)
    packed_rows = query.shape[2] * (query.shape[1] // key.shape[1])
    return tree_attention_config(query.dtype, query.shape[3], packed_rows, capability)


def _tiles(query: torch.Tensor, key: torch.Tensor) -> int:
    """Returns into how many tiles the rows of a key/value head are cut."""
    packed_rows = query.shape[2] * (query.shape[1] // key.shape[1])
    return -(-packed_rows // _config_of(query, key)["BLOCK_M"])


def default_num_splits(query: torch.Tensor, key: torch.Tensor, at_least: int = MIN_SPLIT_SLOTS) -> int:
    """
    Returns into how many parts to cut the prefix: programs for every multiprocessor, none with too little to do.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, nodes, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, slots, head_dim)`):
            Keys. The number of slots bounds the prefix, whose length the device alone knows.
        at_least (`int`, *optional*, defaults to 128):
            Slots of a part.
    """
    batch, kv_heads, slots, _ = key.shape
    wanted = min(PROGRAMS // (batch * kv_heads * _tiles(query, key)), slots // at_least, MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)  # few values: each is compiled


def new_arrivals(device: torch.device) -> torch.Tensor:
    """
    Returns counters by which the programs of a tile find out which of them is the last.

    Every launch finds them at zero and leaves them there, so that launches of one stream, and replays of a recorded
    graph, can share them without anyone writing zeros in between. Launches that may overlap need counters each: they
    belong to whoever launches in order, such as one call.

    Args:
        device (`torch.device`):
            Where the kernel runs.

    Returns:
        `torch.IntTensor` of shape `(tiles,)`, for all tiles that [`default_num_splits`] would split.
    """
    return torch.zeros(PROGRAMS // 2, dtype=torch.int32, device=device)


def merges_inside(query: torch.Tensor, key: torch.Tensor, num_splits: int, arrivals: torch.Tensor | None) -> bool:
    """Returns whether [`tree_attention`] merges splits as it computes them: few, and with a counter for each tile."""
    if arrivals is None or key.shape[0] * key.shape[1] * _tiles(query, key) > len(arrivals):
        return False
    return 1 < num_splits <= splits_inside(_config_of(query, key)["BLOCK_M"], query.shape[3])


def tree_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ancestor_words: torch.Tensor,
    prefix_length: torch.Tensor,
    kv_start: torch.Tensor,
    scaling: float,
    num_splits: int,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Plain torch oracle of [`tree_attention`]; `num_splits` does not change the result."""
    batch, heads, nodes, head_dim = query.shape
    if new is not None:
        rows = torch.arange(batch, device=query.device)[:, None]
        slots = prefix_length[:, None] + torch.arange(nodes, device=query.device)
        for cached, states in zip((key, value), new, strict=True):
            cached[rows, :, slots] = states.transpose(1, 2)
    kv_heads = key.shape[1]
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    mask = dense_tree_mask(ancestor_words, prefix_length, kv_start, key.shape[2]).unsqueeze(2)
    packed = query.reshape(batch, kv_heads, heads // kv_heads, nodes, head_dim).to(compute_dtype)
    scores = packed @ key.to(compute_dtype).mT.unsqueeze(2) * scaling
    scores = scores.masked_fill(~mask, float("-inf"))
    # A row without a visible slot would be 0 / 0; slots nobody wrote may hold anything, so they are zeroed too.
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    values = value.to(compute_dtype).masked_fill(~mask.any(3).any(2).unsqueeze(-1), 0.0)
    output = weights @ values.unsqueeze(2)
    return output.reshape(batch, heads, nodes, head_dim).transpose(1, 2).to(query.dtype).contiguous()


def _check(query, key, value, words, num_splits: int, new: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    batch, heads, nodes, head_dim = query.shape
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != head_dim:
        shapes = [tuple(t.shape) for t in (query, key, value)]
        raise ValueError(f"query, key and value do not fit each other: {shapes}")
    if heads % key.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {key.shape[1]} key/value heads")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if words.dtype != torch.int64 or words.shape != (batch, nodes, num_words(nodes)):
        expected = (batch, nodes, num_words(nodes))
        raise ValueError(f"ancestor_words must be int64 of shape {expected}, got {words.dtype} {tuple(words.shape)}")
    if new is not None and any(
        states.shape != (batch, key.shape[1], nodes, head_dim) or states.dtype != key.dtype for states in new
    ):
        raise ValueError(f"new keys and values do not fit the nodes: {[(t.dtype, tuple(t.shape)) for t in new]}")
    if new is not None and not key.stride(3) == value.stride(3) == 1:
        raise ValueError("keys and values that are written to must have a contiguous head_dim")
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ancestor_words: torch.Tensor,
    prefix_length: torch.Tensor,
    kv_start: torch.Tensor,
    scaling: float,
    num_splits: int,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attention of the tree nodes to the prefix and to their ancestors, softmax in fp32.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, nodes, head_dim)`):
            bf16, fp16 or fp32; any strides.
        key (`torch.Tensor` of shape `(batch, kv_heads, slots, head_dim)`):
            Same dtype. Slots `prefix_length .. prefix_length + nodes - 1` hold the nodes; later ones are not read.
        value (`torch.Tensor`):
            Shape and dtype of `key`.
        ancestor_words (`torch.LongTensor` of shape `(batch, nodes, ceil(nodes / 64))`):
            Bit `j % 64` of word `j // 64` says that the node sees node `j`.
        prefix_length (`torch.LongTensor` of shape `(batch,)`):
            Slots before node 0, padding included.
        kv_start (`torch.LongTensor` of shape `(batch,)`):
            First valid slot, which is the left padding of the row.
        scaling (`float`):
            Factor of the scores before the softmax.
        num_splits (`int`):
            Into how many parts the prefix is cut; more parts fill the device at long contexts.
        new (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Keys and values of the nodes, `(batch, kv_heads, nodes, head_dim)`, to be written to their slots of `key`
            and `value`, which need a contiguous `head_dim`; by default they are there already.
        arrivals (`torch.IntTensor`, *optional*):
            Of [`new_arrivals`]: with it few splits are merged in the same launch, otherwise in one of its own.

    Returns:
        `torch.Tensor` of shape `(batch, nodes, heads, head_dim)`, the layout transformers expects. Rows that see
        nothing are 0.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.
    """
    _check(query, key, value, ancestor_words, num_splits, new)
    batch, heads, nodes, head_dim = query.shape
    if not (use_triton(query) and is_tileable(head_dim)):
        return tree_attention_reference(
            query, key, value, ancestor_words, prefix_length, kv_start, scaling, num_splits, new
        )
    query, key, value, new_key, new_value = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, *(new or (key, value)))
    )
    words = ancestor_words if ancestor_words.stride(-1) == 1 else ancestor_words.contiguous()
    kv_heads = key.shape[1]
    group = heads // kv_heads
    config = _config_of(query, key)
    output = query.new_empty(batch, nodes, heads, head_dim)
    partial = lse = output
    if num_splits > 1:
        partial = query.new_empty(batch * kv_heads, num_splits, nodes * group, head_dim, dtype=torch.float32)
        lse = query.new_empty(batch * kv_heads, num_splits, nodes * group, dtype=torch.float32)
    merge = merges_inside(query, key, num_splits, arrivals)
    _tree_attention_kernel[(batch * kv_heads, _tiles(query, key), num_splits)](
        query, key, value, new_key, new_value, words, prefix_length.contiguous(), kv_start.contiguous(),
        partial, lse, output if arrivals is None else arrivals, output, scaling * math.log2(math.e),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *new_key.stride()[:3], *new_value.stride()[:3],
        *words.stride()[:2], nodes, kv_heads,
        GROUP=group, DIM=head_dim, SPLITS=num_splits, MERGE=merge, APPEND=new is not None, UPCAST=not query.is_cuda,
        **config,
    )  # fmt: skip
    if num_splits > 1 and not merge:
        merge_splits(partial, lse, output)
    return output
