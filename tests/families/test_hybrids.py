"""Targets with recurrent layers: each node of a tree is where plain decoding would be at the end of its path."""

import pytest
import torch

from tests.families import hybrids
from tests.families.matrix import check_hybrid
from tests.families.passes import leaves, prefilled, step_logits, tree_logits, tree_of
from tests.recurrent.trees import shaped_tree

HYBRIDS = [family for family in hybrids.HYBRIDS if family.exists]
TREES = [("chain", 16), ("comb", 15), ("random", 24)]


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
def test_node_logits_are_those_of_the_path_alone(family):
    """Two left-padded rows, trees of their own; and without the walkers the same pass is far off."""
    target, generator = family.build(), torch.Generator().manual_seed(0)
    inputs = family.inputs(2, seed=3)
    mask = inputs["attention_mask"]
    cache, positions = prefilled(target, inputs)
    worst, control = 0.0, 0.0
    for shape, nodes in TREES:
        parents = torch.stack([shaped_tree(shape, nodes, generator) for _ in range(2)])
        tree = tree_of(parents, torch.tensor([5, 6]), generator)
        logits, _ = tree_logits(target, cache, mask, positions, tree)
        without, _ = tree_logits(target, cache, mask, positions, tree, walkers=False)
        for row in range(2):
            for path in leaves(parents[row])[:4]:
                steps = step_logits(target, cache, mask, positions, tree, row, path)
                worst = max(worst, float((logits[row, path] - steps).abs().max()))
                control = max(control, float((without[row, path] - steps).abs().max()))
    assert worst < 1e-3
    assert control > 1


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: family.name)
def test_texts_seeds_caches_and_turns_are_those_of_plain_generate(family):
    check_hybrid(family)
