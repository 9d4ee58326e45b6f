"""K1: the kernel against its oracle, and the oracle against SDPA with a dense mask."""

from __future__ import annotations

import pytest
import torch

from hf_treeflash.kernels import (
    default_num_splits,
    new_arrivals,
    pack_ancestor_words,
    tree_attention,
    tree_attention_reference,
    unpack_ancestor_words,
)
from hf_treeflash.kernels._launch import LazyKernel

from .conftest import kernel_module
from .trees import ancestor_mask, random_parents, random_words

# nodes, heads, kv_heads, head_dim, slots before the tail per row, left padding per row, splits, spare slots
CASES = {
    "one node": (1, 4, 2, 16, [7], [0], 1, 0),
    "no prefix": (16, 2, 1, 16, [0], [0], 1, 0),
    "no prefix, split": (33, 2, 2, 16, [0, 0], [0, 0], 3, 0),
    "empty splits": (16, 4, 1, 32, [5], [2], 4, 0),
    "padding": (33, 4, 4, 16, [70, 65], [3, 0], 2, 0),
    "all padding": (16, 2, 1, 16, [9, 9], [9, 4], 2, 0),
    "one word": (64, 4, 2, 32, [131, 67], [0, 5], 2, 0),
    "two words": (100, 2, 1, 16, [66], [1], 2, 0),
    "two full words": (128, 4, 2, 16, [40], [0], 1, 0),
    "diverging rows, static cache": (33, 4, 2, 16, [20, 70], [4, 0], 4, 37),
    "many splits": (33, 2, 1, 16, [700, 300], [0, 5], 32, 3),
    "group of three": (16, 6, 2, 16, [33], [0], 1, 0),
    "three rows, several tiles": (9, 4, 2, 16, [70, 0, 260], [3, 0, 7], 8, 5),
}  # fmt: skip


def make_case(name: str, dtype: torch.dtype, device: str, transposed: bool = False) -> tuple:
    nodes, heads, kv_heads, dim, prefix, start, splits, spare = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    batch = len(prefix)
    slots = max(prefix) + nodes + spare

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype=dtype, device=device)

    query = randn(batch, nodes, heads, dim).transpose(1, 2)
    if transposed:
        key, value = (randn(batch, slots, kv_heads, dim).transpose(1, 2) for _ in range(2))
    else:
        key, value = randn(batch, kv_heads, slots, dim), randn(batch, kv_heads, slots, dim)
    for row in range(batch):  # nobody may read what lies outside
        for tensor in (key, value):
            tensor[row, :, : start[row]] = float("nan")
            tensor[row, :, prefix[row] + nodes :] = float("nan")
    words = random_words(batch, nodes, generator).to(device)
    lengths = (torch.tensor(prefix, device=device), torch.tensor(start, device=device))
    return query, key, value, words, *lengths, dim**-0.5, splits


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_oracle(triton_kernels, device, name, transposed):
    case = make_case(name, torch.float32, device, transposed)
    torch.testing.assert_close(tree_attention(*case), tree_attention_reference(*case), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["padding", "one word"])
def test_kernel_equals_oracle_in_half_precision(triton_kernels, device, name, dtype, tolerance):
    case = make_case(name, dtype, device)
    output = tree_attention(*case)
    assert output.dtype == dtype
    torch.testing.assert_close(output, tree_attention_reference(*case), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_new_keys_and_values_are_written_and_read(triton_kernels, device, name):
    query, key, value, *rest = make_case(name, torch.float32, device)
    prefix, nodes = rest[1].tolist(), query.shape[2]
    expected = tree_attention_reference(query, key, value, *rest)

    def at_nodes(states: torch.Tensor) -> torch.Tensor:
        return torch.stack([states[row, :, first : first + nodes] for row, first in enumerate(prefix)])

    new = tuple(at_nodes(states).transpose(1, 2).contiguous().transpose(1, 2) for states in (key, value))
    for function in (tree_attention, tree_attention_reference):
        caches = key.clone(), value.clone()
        for row, first in enumerate(prefix):
            for cache in caches:
                cache[row, :, first : first + nodes] = float("nan")
        torch.testing.assert_close(function(query, *caches, *rest, new), expected, atol=1e-5, rtol=1e-5)
        for cache, states in zip(caches, (key, value), strict=True):
            torch.testing.assert_close(cache, states, equal_nan=True, atol=0, rtol=0)


def test_rows_that_see_nothing_are_zero(triton_kernels, device):
    query, key, value, words, prefix, start, scaling, _ = make_case("no prefix", torch.float32, device)
    words[:, 3] = 0
    case = query, key, value, words, prefix, start, scaling
    outputs = [tree_attention(*case, 2, arrivals=new_arrivals(device))]
    outputs += [
        function(*case, splits) for splits in (1, 2) for function in (tree_attention, tree_attention_reference)
    ]
    for output in outputs:
        assert not output[:, 3].any()
        assert output.isfinite().all()


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels launched since."""
    names, launch = [], LazyKernel.__getitem__
    monkeypatch.setattr(
        LazyKernel, "__getitem__", lambda kernel, grid: names.append(kernel.function.__name__) or launch(kernel, grid)
    )
    return names


@pytest.mark.parametrize("splits", [1, 2, 3, 8, 32])
def test_launches_that_merge_share_their_arrivals(triton_kernels, device, launched, splits):
    arrivals = new_arrivals(device)
    for name in ("three rows, several tiles", "empty splits", "one node", "three rows, several tiles"):
        *case, _ = make_case(name, torch.float32, device)
        output = tree_attention(*case, splits, arrivals=arrivals)
        torch.testing.assert_close(output, tree_attention_reference(*case, splits), atol=1e-5, rtol=1e-5)
        assert not arrivals.any()
    assert launched == ["_tree_attention_kernel"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_launch_that_merges_and_writes(triton_kernels, device, dtype):
    query, key, value, *rest = make_case("diverging rows, static cache", dtype, device)
    first, nodes, arrivals = rest[1].tolist(), query.shape[2], new_arrivals(device)
    new = [torch.stack([states[row, :, at : at + nodes] for row, at in enumerate(first)]) for states in (key, value)]
    expected = tree_attention_reference(query, key, value, *rest)
    for row, at in enumerate(first):
        key[row, :, at : at + nodes] = value[row, :, at : at + nodes] = float("nan")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(2):
        output = tree_attention(query, key, value, *rest, new, arrivals)
        torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
        assert not arrivals.any()
    for row, at in enumerate(first):
        assert torch.equal(key[row, :, at : at + nodes], new[0][row])
        assert torch.equal(value[row, :, at : at + nodes], new[1][row])


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter lets us choose the order of programs")
def test_whichever_split_comes_last_merges_all_in_one_order(triton_kernels, device, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    case, arrivals = make_case("three rows, several tiles", torch.float32, device), new_arrivals(device)
    first = tree_attention(*case, arrivals=arrivals)
    place = interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: place(x, y, (5 - 3 * z) % 8))
    assert torch.equal(tree_attention(*case, arrivals=arrivals), first)
    assert not arrivals.any()


@pytest.mark.parametrize("few", ["no counters", "few counters", "few splits"])
def test_merges_of_much_are_launches_of_their_own(triton_kernels, device, launched, monkeypatch, few):
    case = make_case("padding", torch.float32, device)
    arrivals = None if few == "no counters" else new_arrivals(device)
    if few == "few counters":  # more tiles than there are counters
        arrivals = arrivals[:5]
    elif few == "few splits":
        monkeypatch.setattr(kernel_module("merge_splits"), "MERGED_INSIDE", 16 * 16)
    output = tree_attention(*case, arrivals=arrivals)
    torch.testing.assert_close(output, tree_attention_reference(*case), atol=1e-5, rtol=1e-5)
    assert launched == ["_tree_attention_kernel", "_merge_kernel"]


@pytest.mark.parametrize("name", CASES)
def test_oracle_equals_sdpa(name):
    query, key, value, words, prefix, start, scaling, splits = make_case(name, torch.float32, "cpu")
    batch, heads, nodes, _ = query.shape
    mask = torch.zeros(batch, 1, nodes, key.shape[2], dtype=torch.bool)
    ancestors = unpack_ancestor_words(words, nodes)
    for row in range(batch):
        mask[row, :, :, start[row] : prefix[row]] = True
        mask[row, 0, :, prefix[row] : prefix[row] + nodes] = ancestors[row]
    groups = heads // key.shape[1]
    key, value = (t.nan_to_num().repeat_interleave(groups, dim=1) for t in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    output = tree_attention_reference(query, key.nan_to_num(), value, words, prefix, start, scaling, splits)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("nodes", [1, 33, 64, 100, 128])
def test_words_hold_the_mask(nodes):
    mask = ancestor_mask(random_parents(2, nodes, torch.Generator().manual_seed(nodes)))
    words = pack_ancestor_words(mask)
    assert words.shape == (2, nodes, -(-nodes // 64))
    assert torch.equal(unpack_ancestor_words(words, nodes), mask)


def test_head_sizes_without_a_tile_take_the_oracle(triton_kernels, device):
    query = torch.randn(1, 2, 3, 24, device=device)
    words = random_words(1, 3, torch.Generator()).to(device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    case = (query, query, query, words, zero, zero, 1.0, 1)
    torch.testing.assert_close(tree_attention(*case), tree_attention_reference(*case))


@pytest.mark.parametrize("problem", ["words", "dtype", "heads", "value", "splits"])
def test_misfits_raise(problem):
    query, key, value, words, prefix, start, scaling, splits = make_case("padding", torch.float32, "cpu")
    if problem == "words":
        words = words[:, :-1]
    elif problem == "dtype":
        key = key.half()
    elif problem == "heads":
        query = query[:, :3]
    elif problem == "value":
        value = value[..., :8]
    else:
        splits = 0
    with pytest.raises(ValueError):
        tree_attention(query, key, value, words, prefix, start, scaling, splits)


def test_tiles():
    config = kernel_module("tree_attention").tree_attention_config
    assert config(torch.bfloat16, 128, 256, (9, 0))["BLOCK_M"] == 64
    assert config(torch.bfloat16, 128, 4, (9, 0))["BLOCK_M"] == 16


@pytest.mark.parametrize(
    ("batch", "nodes", "slots", "splits"),
    [(1, 64, 2304, 8), (1, 64, 33000, 8), (1, 64, 300, 2), (1, 64, 100, 1), (1, 16, 2304, 16), (1, 16, 33000, 32),
     (1, 1, 33000, 32), (8, 64, 33000, 1), (4, 16, 33000, 8)],
)  # fmt: skip
def test_splits_fill_the_device_and_have_enough_to_do(batch, nodes, slots, splits):
    query, key = torch.empty(batch, 32, nodes, 128, dtype=torch.bfloat16), torch.empty(batch, 8, slots, 128)
    assert default_num_splits(query, key) == splits


@pytest.mark.parametrize(
    ("dtype", "dim", "rows", "inside"),
    [(torch.bfloat16, 128, 256, 8), (torch.bfloat16, 64, 256, 16), (torch.bfloat16, 256, 256, 4),
     (torch.bfloat16, 128, 4, 32), (torch.float32, 128, 256, 32)],
)  # fmt: skip
def test_splits_that_merge_inside(dtype, dim, rows, inside):
    config = kernel_module("tree_attention").tree_attention_config(dtype, dim, rows, (9, 0))
    assert kernel_module("merge_splits").splits_inside(config["BLOCK_M"], dim) == inside
