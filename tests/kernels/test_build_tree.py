"""K3: the kernel and the oracle against an independent heap on the host."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import torch

from hf_treeflash.kernels import Tree, build_tree, build_tree_reference, pack_ancestor_words

from .trees import ancestor_mask, make_transitions


def best_first(token_ids, log_probs, next_row, budget: int) -> list[tuple]:
    """Nodes of one row as (score, depth, rank path, token), best first, by a heap over all unexpanded children."""
    levels, _, branching = token_ids.shape
    heap: list[tuple] = []

    def push(score: np.float32, depth: int, path: tuple, row: int) -> None:
        for rank in range(branching):
            step = log_probs[depth, row, rank]
            if np.isfinite(step):
                total = np.float32(score + step)
                heapq.heappush(heap, (-total, depth + 1, (*path, rank), row))

    push(np.float32(0.0), 0, (), 0)
    nodes = []
    while heap and len(nodes) < budget - 1:
        negative, depth, path, row = heapq.heappop(heap)
        entry = (depth - 1, row, path[-1])
        nodes.append((-negative, depth, path, int(token_ids[entry])))
        if depth < levels and next_row[entry] >= 0:
            push(-negative, depth, path, int(next_row[entry]))
    return nodes


def check(tree: Tree, transitions: tuple, budget: int) -> None:
    tree = Tree(*(part.cpu() for part in tree))
    token_ids, log_probs, next_row = (part.numpy() for part in transitions)
    assert tree.ancestor_words.shape == (len(token_ids), budget, -(-budget // 64))
    assert torch.equal(tree.ancestor_words, pack_ancestor_words(ancestor_mask(tree.parents)))
    for row in range(len(token_ids)):
        nodes = best_first(token_ids[row], log_probs[row], next_row[row], budget)
        used = len(nodes) + 1
        places = {path: place + 1 for place, (_, _, path, _) in enumerate(nodes)} | {(): 0}
        assert tree.num_nodes[row] == used
        assert tree.path_log_probs[row, :used].tolist() == [0.0, *(float(score) for score, *_ in nodes)]
        assert tree.depths[row, :used].tolist() == [0, *(depth for _, depth, _, _ in nodes)]
        assert tree.token_ids[row, :used].tolist() == [0, *(token for *_, token in nodes)]
        assert tree.parents[row, :used].tolist() == [-1, *(places[path[:-1]] for _, _, path, _ in nodes)]
        for part, unused in zip(tree[:3], (0, -1, 0), strict=True):
            assert (part[row, used:] == unused).all()
        assert (tree.path_log_probs[row, used:] == float("-inf")).all()


KINDS = ["random", "ties", "certain", "masked"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("levels", "rows", "branching", "budget"), [(5, 4, 4, 16), (15, 8, 6, 33), (3, 2, 3, 64)])
def test_kernel_equals_heap(triton_kernels, device, kind, levels, rows, branching, budget):
    transitions = make_transitions(2, levels, rows, branching, kind, seed=budget)
    check(build_tree(*(part.to(device) for part in transitions), budget), transitions, budget)


@pytest.mark.parametrize(("kind", "budget"), [("random", 64), ("ties", 100), ("certain", 128), ("ties", 1)])
def test_kernel_equals_heap_at_full_size(triton_kernels, device, kind, budget):
    transitions = make_transitions(1, 15, 16, 16, kind, seed=budget)
    check(build_tree(*(part.to(device) for part in transitions), budget), transitions, budget)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 2, 16, 33, 64, 100, 128])
@pytest.mark.parametrize(("levels", "branching"), [(1, 4), (4, 1), (7, 5), (15, 16)])
def test_oracle_equals_heap(kind, budget, levels, branching):
    transitions = make_transitions(3, levels, 6, branching, kind, seed=levels * budget)
    check(build_tree_reference(*transitions, budget), transitions, budget)


def test_equal_scores_follow_the_rank_path(triton_kernels, device):
    """The later subtree was opened first and holds the better parent, yet the smaller rank path comes first."""
    log_probs = torch.tensor([[[-1.0, -2.0], [0, 0]], [[-2.0, -4.0], [-1.0, -1.0]]])[None]
    next_row = torch.tensor([[[0, 1], [-1, -1]], [[-1, -1], [-1, -1]]])[None]
    token_ids = torch.arange(8).view(1, 2, 2, 2)
    for function in (build_tree, build_tree_reference):
        tree = function(token_ids.to(device), log_probs.to(device), next_row.to(device), 6)
        # -1 (0), -2 (1), then three paths of score -3: (0, 0), (1, 0), (1, 1)
        assert tree.token_ids[0].tolist() == [0, 0, 1, 4, 6, 7]
        check(tree, (token_ids, log_probs, next_row), 6)


@pytest.mark.parametrize("problem", ["shape", "budget", "dimensions"])
def test_misfits_raise(problem):
    token_ids, log_probs, next_row = make_transitions(1, 2, 2, 2, "random", seed=0)
    budget = 0 if problem == "budget" else 4
    if problem == "shape":
        log_probs = log_probs[..., :1]
    elif problem == "dimensions":
        token_ids, log_probs, next_row = token_ids[0], log_probs[0], next_row[0]
    with pytest.raises(ValueError):
        build_tree(token_ids, log_probs, next_row, budget)
