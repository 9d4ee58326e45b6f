"""The tree is the brute-force top-(B-1) set, in a deterministic order, from both builders."""

import itertools

import pytest
import torch

from hf_treeflash import tree as tree_module
from hf_treeflash.transitions import NextTokens, Transitions
from hf_treeflash.tree import build_on_device, build_tables, build_tree
from tests.helpers.drafting import random_transitions


def every_node(transitions, row):
    """Yield (score, depth, rank path, token path) of every node a row's transitions describe."""
    tokens, log_probs, next_row = (table[row].tolist() for table in transitions)
    open_nodes = [((), 0.0, (), 0)]
    for depth in range(len(tokens)):
        grown = []
        for (ranks, score, path, at), rank in itertools.product(open_nodes, range(len(tokens[0][0]))):
            if log_probs[depth][at][rank] == float("-inf"):
                continue
            node = ((*ranks, rank), score + log_probs[depth][at][rank], (*path, tokens[depth][at][rank]))
            yield node[1], depth + 1, node[0], node[2]
            if next_row[depth][at][rank] >= 0:
                grown.append((*node, next_row[depth][at][rank]))
        open_nodes = grown


def paths(tree, row):
    """Return each used node's token path, root excluded, in node order."""
    result = []
    for node in range(tree.token_ids.shape[1]):
        if node == 0 or tree.parents[row, node] >= 0:
            chain = tree.ancestor_mask[row, node].nonzero().flatten()
            result.append(tuple(tree.token_ids[row, chain[1:]].tolist()))
    return result


@pytest.mark.parametrize("builder", [build_tree, build_on_device], ids=["host", "device"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("budget", [2, 5, 16, 400])
def test_tree_is_the_brute_force_top_set_in_order(builder, quantised, budget):
    for seed in range(12):
        transitions = random_transitions(seed, quantised=quantised, batch=2, holes=0.2 if seed % 3 == 0 else 0.0)
        tree = builder(transitions, torch.tensor([7, 8]), budget)
        for row in range(2):
            nodes = sorted(every_node(transitions, row), key=lambda node: (-node[0], node[1], node[2]))[: budget - 1]
            assert paths(tree, row)[1:] == [node[3] for node in nodes]
            count = len(nodes) + 1
            torch.testing.assert_close(
                tree.path_log_probs[row, 1:count], torch.tensor([node[0] for node in nodes], dtype=torch.float32)
            )
            assert tree.depths[row, 1:count].tolist() == [node[1] for node in nodes]
        assert tree.token_ids[:, 0].tolist() == [7, 8]


@pytest.mark.parametrize("budget", [2, 9, 64, 100])
def test_both_builders_agree(budget):
    for seed in range(10):
        transitions = random_transitions(seed, depth=7, rows=8, branching=8, batch=3, quantised=seed % 2 == 0)
        host = build_tree(transitions, torch.arange(3), budget)
        device = build_on_device(transitions, torch.arange(3), budget)
        for field in ("token_ids", "parents", "depths", "ancestor_mask", "path_log_probs"):
            a, b = getattr(host, field), getattr(device, field)
            nodes = a.shape[1]
            torch.testing.assert_close(a, b[:, :nodes, :nodes] if field == "ancestor_mask" else b[:, :nodes])


def test_tables_on_a_device_are_built_there_where_kernels_are_at_hand(monkeypatch):
    transitions, anchors, built = random_transitions(1), torch.tensor([7]), []
    build = tree_module.build_on_device
    monkeypatch.setattr(tree_module, "build_on_device", lambda *args: built.append(args) or build(*args))
    host = build_tree(transitions, anchors, 9)
    assert not built
    monkeypatch.setattr(Transitions, "device_tables", lambda self: self)
    assert torch.equal(build_tree(transitions, anchors, 9).token_ids, host.token_ids) and len(built) == 1
    monkeypatch.setattr(tree_module, "kernels", None)  # a repository's code, without the package
    assert torch.equal(build_tree(transitions, anchors, 9).token_ids, host.token_ids) and len(built) == 1


class RowPerNode:
    """A head that looks at the whole path: every node has a row of its own, computed in the round after it was met."""

    def __init__(self, depth: int, branching: int):
        self.depth, self.branching = depth, branching
        self.paths: list[tuple[int, ...]] = [()]
        self.known: set[int] = set()
        self.asked: set[int] = set()

    def after(self, path: tuple[int, ...]) -> list[tuple[float, int]]:
        generator = torch.Generator().manual_seed(hash(path) % 2**31)
        log_probs = torch.randn(50, generator=generator).mul(2).log_softmax(-1).topk(self.branching)
        return list(zip(log_probs.values.tolist(), log_probs.indices.tolist(), strict=True))

    def read(self, text: int, depth: int, row: int) -> NextTokens:
        if row not in self.known:
            self.asked.add(row)
            return NextTokens([], [], {})
        children, next_rows = self.after(self.paths[row]), {}
        for _, token in children if depth + 1 < self.depth else []:
            path = (*self.paths[row], token)
            if path not in self.paths:
                self.paths.append(path)
            next_rows[token] = self.paths.index(path)
        return NextTokens([token for _, token in children], [score for score, _ in children], next_rows)

    def compute_guessed(self) -> list[int]:
        found, self.asked = [0] if self.asked else [], set()
        self.known |= set(range(len(self.paths)))
        return found


@pytest.mark.parametrize("budget", [2, 7, 30])
def test_rows_may_stand_for_whole_paths(budget):
    rows = RowPerNode(depth=3, branching=4)
    (table,) = build_tables(rows, torch.tensor([7]), budget)
    nodes = [(0.0, ())]
    for score, path in nodes:
        if len(path) < rows.depth:
            nodes += [(score + step, (*path, token)) for step, token in rows.after(path)]
    best = sorted(nodes, key=lambda node: (-node[0], len(node[1])))[:budget]
    built = [()]
    for parent, token in zip(table.parents[1:], table.token_ids[1:], strict=True):
        built.append((*built[parent], token))
    assert built == [path for _, path in best]


def test_structure_is_consistent():
    tree = build_tree(random_transitions(3, depth=6, rows=6, branching=6), torch.tensor([1]), 40)
    parents, depths, mask = tree.parents[0], tree.depths[0], tree.ancestor_mask[0]
    assert parents[0] == -1 and depths[0] == 0 and mask.diagonal().all()
    for node in range(1, 40):
        parent = int(parents[node])
        assert parent < node and depths[node] == depths[parent] + 1
        expected = mask[parent].clone()
        expected[node] = True
        assert torch.equal(mask[node], expected)
    assert all(tree.children[0][int(parents[n]), int(tree.token_ids[0, n])] == n for n in range(1, 40))


def test_short_rows_are_padded_with_nodes_that_see_only_themselves():
    transitions = random_transitions(0, depth=1, rows=1, branching=4, batch=2)
    transitions.log_probs[1, :, :, 1:] = float("-inf")
    tree = build_tree(transitions, torch.tensor([5, 6]), 64)
    assert tree.token_ids.shape == (2, 5)
    assert tree.parents[1].tolist() == [-1, 0, -1, -1, -1]
    assert torch.equal(tree.ancestor_mask[1, 2:], torch.eye(5, dtype=torch.bool)[2:])
    assert tree.path_log_probs[1, 2:].isinf().all()


def test_nan_log_probs_are_never_drafted():
    transitions = random_transitions(0)
    transitions.log_probs.fill_(float("nan"))
    for builder in (build_tree, build_on_device):
        tree = builder(transitions, torch.tensor([5]), 8)
        assert (tree.parents == -1).all()
