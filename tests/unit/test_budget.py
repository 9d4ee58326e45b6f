"""The automatic budget against machines with known round times: no clock is read."""

import pytest
import torch

from hf_treeflash.budget import PLAIN, auto_budget
from hf_treeflash.knobs import AUTO_SIZES
from hf_treeflash.tree import NodeTable, root_only, tree_from_tables
from hf_treeflash.verify import Verdict

# In plain rounds: a GPU, which has compute to spare, and a small CPU at three batch sizes.
GPU = {1: 1.0, 8: 1.25, 16: 1.26, 32: 1.3, 64: 1.35}
CPU = {1: 1.0, 8: 1.7, 16: 2.0, 32: 2.8, 64: 4.4}
CPU_4 = {1: 1.0, 8: 3.0, 16: 4.2, 32: 6.8, 64: 12.0}
CPU_8 = {1: 1.0, 8: 4.5, 16: 6.5, 32: 11.0, 64: 20.0}
ROOT = root_only(torch.tensor([0]))


def chain(probability):
    """Return a chain of 64 nodes of which each is this likely, given those before it."""
    scores = [node * torch.tensor(probability).log().item() for node in range(64)]
    ancestors = [(2 << node) - 1 for node in range(64)]
    return tree_from_tables([NodeTable(list(range(64)), list(range(-1, 63)), list(range(64)), scores, ancestors)])


def accepted(probability, nodes, luck):
    """Return how far into a chain a round gets that lucky."""
    depth = 0
    while depth + 1 < nodes and probability ** (depth + 1) > luck:
        depth += 1
    return depth


def call(budget, seconds, probability, tokens=64, size=None, batch=1):
    """Emit tokens with the controller or a fixed size; return the sizes and the time per token of a row."""
    tree, chosen, emitted, elapsed = chain(probability), [], 0.0, 0.0
    while emitted < tokens:
        drafted = ROOT
        if size is not None:
            drafted = tree.first(size)
        elif budget.drafts():
            drafted = tree.first(budget.size(tree))
        nodes = drafted.token_ids.shape[1]
        # Luck goes round evenly, over the rows and, the golden ratio's way, over rounds.
        lucks = [(0.5 + 0.618034 * len(chosen) + row / batch) % 1 for row in range(batch)]
        verdicts = [Verdict(list(range(accepted(probability, nodes, luck) + 1)), [], False) for luck in lucks]
        if size is None:
            budget.observe(drafted, verdicts, seconds[nodes])
        emitted += sum(len(verdict.path) for verdict in verdicts) / batch
        elapsed += seconds[nodes]
        chosen.append(nodes)
    return chosen, elapsed / emitted


def new_budget(batch=1):
    return auto_budget(torch.nn.Linear(1, 1), batch)


def test_a_call_costs_little_where_drafting_does_not_pay():
    for batch, seconds in ((8, CPU_8), (4, CPU_4)):
        drafter = torch.nn.Linear(1, 1)
        per_token = [call(auto_budget(drafter, batch), seconds, 0.6, batch=batch)[1] for _ in range(6)]
        assert per_token[0] <= 1.15
        assert max(per_token[1:]) <= 1.05


@pytest.mark.parametrize(
    ("seconds", "probability", "batch"),
    [
        *((GPU, 0.9, 1), (GPU, 0.6, 1), (GPU, 0.3, 1), (CPU, 0.9, 1), (CPU, 0.7, 1), (CPU, 0.5, 1)),
        *((CPU_4, 0.9, 4), (CPU_4, 0.8, 4), (CPU_8, 0.9, 8)),
    ],
)
def test_it_keeps_up_with_the_best_fixed_size(seconds, probability, batch):
    best = min(call(None, seconds, probability, 1000, size, batch)[1] for size in (PLAIN, *AUTO_SIZES))
    budget = new_budget(batch)
    call(budget, seconds, probability, batch=batch)
    assert call(budget, seconds, probability, 1000, batch=batch)[1] <= 1.05 * best


def test_sizes_are_tried_upwards_and_only_while_they_promise_more():
    steep = {1: 1.0, 8: 1.3, 16: 2.4, 32: 5.0, 64: 10.0}
    chosen, _ = call(new_budget(), GPU, 0.95, 300)
    assert chosen[:5] == [1, 8, 16, 32, 64] and chosen[-1] == 64
    chosen, _ = call(new_budget(), steep, 0.8, 300)
    assert max(chosen) <= 16 and chosen[-1] == 8


def test_it_retreats_after_one_or_two_rounds_and_tries_again():
    chosen, _ = call(new_budget(8), CPU_8, 0.3, 300, batch=8)
    assert chosen[:2] == [PLAIN, 8] and chosen[3:30].count(PLAIN) == 27
    assert chosen[100:].count(8) >= 1 and set(chosen) == {PLAIN, 8}


def test_it_recovers_when_drafting_pays_again():
    budget = new_budget()
    call(budget, CPU, 0.1, 300)
    chosen, _ = call(budget, CPU, 0.9, 1000)
    assert chosen[-30:].count(PLAIN) == 0


def test_a_slow_first_round_is_not_held_against_a_size():
    budget = new_budget()
    call(budget, {**GPU, 16: 30.0}, 0.95, 12)  # as when a kernel is compiled for it
    chosen, _ = call(budget, GPU, 0.95, 3000)
    assert chosen[-1] == 64


def test_measurements_go_with_the_drafter_and_the_batch_size():
    drafter = torch.nn.Linear(1, 1)
    call(auto_budget(drafter, 1), CPU, 0.9)
    assert {1, 8, 16} <= set(auto_budget(drafter, 1).seconds)
    assert not auto_budget(drafter, 2).seconds
    assert auto_budget(drafter, 2).learnt is auto_budget(drafter, 1).learnt  # trust in the drafter, cost of a node
    assert auto_budget(torch.nn.Linear(1, 1), 1).learnt is not auto_budget(drafter, 1).learnt
