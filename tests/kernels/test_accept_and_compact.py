"""K4 and K5: the accepted path and the cache that keeps it, against loops on the host."""

from __future__ import annotations

import pytest
import torch

from hf_treeflash.kernels import (
    accept,
    accept_reference,
    compact,
    compact_reference,
    pack_ancestor_words,
    pointer_table,
)

from .trees import ancestor_mask, random_parents


def make_tree(batch: int, nodes: int, seed: int) -> tuple:
    """A tree with distinct siblings, some nodes unused, and target choices that often follow it."""
    generator = torch.Generator().manual_seed(seed)
    parents = random_parents(batch, nodes, generator)
    num_nodes = torch.randint(max(nodes // 2, 1), nodes + 1, (batch,), generator=generator)
    token_ids = torch.zeros(batch, nodes, dtype=torch.int64)
    targets = torch.randint(0, 40, (batch, nodes), generator=generator)
    for row in range(batch):
        for parent in range(nodes):
            children = (parents[row, : num_nodes[row]] == parent).nonzero().flatten()
            token_ids[row, children] = torch.randperm(40, generator=generator)[: len(children)]
            if len(children) and torch.rand((), generator=generator) < 0.9:
                pick = children[torch.randint(len(children), (), generator=generator)]
                targets[row, parent] = token_ids[row, pick]
    # Unused nodes look like the child that the target wants: they must not be taken.
    used = torch.arange(nodes) < num_nodes[:, None]
    token_ids, parents = torch.where(used, token_ids, targets[:, :1]), torch.where(used, parents, 0)
    return token_ids, parents, pack_ancestor_words(ancestor_mask(parents)), num_nodes, targets


def walk(token_ids, parents, num_nodes, targets) -> tuple[list[int], int]:
    path = [0]
    while True:
        choice = int(targets[path[-1]])
        matching = [n for n in range(1, int(num_nodes)) if parents[n] == path[-1] and token_ids[n] == choice]
        if not matching:
            return path, choice
        path.append(matching[0])


@pytest.mark.parametrize("implementation", ["kernel", "oracle"])
@pytest.mark.parametrize("nodes", [1, 2, 16, 33, 64, 65, 100, 128, 200])
def test_accept_equals_walk(request, device, nodes, implementation):
    if implementation == "kernel":
        request.getfixturevalue("triton_kernels")
    function = accept if implementation == "kernel" else accept_reference
    tree = make_tree(6, nodes, seed=nodes)
    path, length, next_token = (part.cpu() for part in function(*(part.to(device) for part in tree)))
    token_ids, parents, _, num_nodes, targets = tree
    assert path.dtype == length.dtype == next_token.dtype == torch.int64
    for row in range(6):
        expected, choice = walk(token_ids[row], parents[row], num_nodes[row], targets[row])
        assert path[row].tolist() == expected + [-1] * (nodes - len(expected))
        assert length[row] == len(expected)
        assert next_token[row] == choice


def test_accept_follows_a_chain_to_its_end(triton_kernels, device):
    nodes = 70
    parents = torch.arange(-1, nodes - 1)[None].to(device)
    words = pack_ancestor_words(torch.ones(nodes, nodes, dtype=torch.bool).tril())[None].to(device)
    token_ids = torch.arange(100, 100 + nodes)[None].to(device)
    num_nodes = torch.tensor([nodes], device=device)
    path, length, next_token = accept(token_ids, parents, words, num_nodes, token_ids + 1)
    assert path[0].tolist() == list(range(nodes))
    assert (int(length), int(next_token)) == (nodes, 100 + nodes)


def test_accept_refuses_misfits():
    token_ids, parents, words, num_nodes, targets = make_tree(2, 70, seed=0)
    with pytest.raises(ValueError):
        accept(token_ids, parents, words[..., :1], num_nodes, targets)


def make_cache(dtype: torch.dtype, layout: str, slots: int, dim: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(slots)
    if layout == "stacked":  # views of one tensor
        return list(torch.randn(6, 3, 2, slots, dim, generator=generator).to(dtype=dtype, device=device).unbind())
    tensors = [torch.randn(3, slots, 2, dim, generator=generator).to(dtype=dtype, device=device) for _ in range(4)]
    return [tensor.transpose(1, 2) for tensor in tensors]


@pytest.mark.parametrize("implementation", ["kernel", "oracle"])
@pytest.mark.parametrize("layout", ["stacked", "transposed"])
@pytest.mark.parametrize(("dtype", "dim", "width"), [(torch.float32, 16, 16), (torch.bfloat16, 24, 70)])
def test_compact_equals_a_loop(request, device, dtype, dim, width, layout, implementation):
    if implementation == "kernel":
        request.getfixturevalue("triton_kernels")
    prefix, paths = [3, 0, 9], [[0, 1, 3, 4, 12], [0], [0, 2, 3, 5, 6, 7, 11]]
    cache = make_cache(dtype, layout, 9 + width, dim, device)
    expected = [tensor.clone() for tensor in cache]
    for tensor, before in zip(expected, cache, strict=True):
        for row, path in enumerate(paths):
            for place, node in enumerate(path):
                tensor[row, :, prefix[row] + place] = before[row, :, prefix[row] + node]
    padded = torch.tensor([path + [-1] * (width - len(path)) for path in paths], device=device)
    lengths = torch.tensor([len(path) for path in paths], device=device)
    function = compact if implementation == "kernel" else compact_reference
    function(cache, padded, lengths, torch.tensor(prefix, device=device), pointers=pointer_table(cache))
    for tensor, wanted in zip(cache, expected, strict=True):
        assert torch.equal(tensor, wanted)


def test_compact_refuses_unequal_tensors(device):
    cache = make_cache(torch.float32, "stacked", 20, 16, device)
    path = torch.zeros(3, 4, dtype=torch.int64, device=device)
    lengths = torch.ones(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError):
        compact([*cache, cache[0].half()], path, lengths, lengths)
