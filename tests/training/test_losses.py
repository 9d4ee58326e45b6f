import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hf_treeflash.training.losses import score_rows, slot_weights, weighted_mean
from hf_treeflash.training.metrics import MetricSums, add_block_metrics

PROCESS = SimpleNamespace(reduce=lambda tensor, reduction: tensor, device="cpu")


def rows(count: int):
    generator = torch.Generator().manual_seed(0)
    states, teacher = (torch.randn(*shape, 8, generator=generator) for shape in ((2, count), (count,)))
    return states.requires_grad_(), torch.randint(0, 12, (count,), generator=generator), teacher


@pytest.mark.parametrize("kind", ["kl", "cross_entropy"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_chunks_change_nothing(kind, chunk_rows):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 12).requires_grad_(False)
    states, labels, teacher = rows(7)
    weights = slot_weights(torch.tensor([1, 2, 3, 1, 2, 3, 1]), 2.0)
    scores = score_rows(
        head, states, labels, teacher if kind == "kl" else None, num_candidates=4, chunk_rows=chunk_rows
    )
    (gradient,) = torch.autograd.grad(weighted_mean(scores.loss, weights), states)

    logits = head(states)
    if kind == "kl":
        p = head(teacher).softmax(-1)
        loss = (p * (p.log() - logits.log_softmax(-1))).sum(-1)
    else:
        loss = torch.stack([F.cross_entropy(draft, labels, reduction="none") for draft in logits])
    (expected,) = torch.autograd.grad((loss * weights).sum() / weights.sum(), states)
    torch.testing.assert_close(scores.loss, loss)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(scores.correct, logits.argmax(-1) == labels)
    assert torch.equal(scores.recalled, (logits.topk(4).indices == labels[:, None]).any(-1))


def test_only_a_chunk_of_logits_exists_at_a_time():
    largest = 0

    def head(states):
        nonlocal largest
        largest = max(largest, states.shape[1])
        return states @ torch.ones(8, 12)

    states, labels, teacher = rows(50)
    score_rows(head, states, labels, teacher, num_candidates=4, chunk_rows=16).loss.sum().backward()
    assert largest == 16


def test_no_rows_give_no_loss_and_a_gradient_of_zero():
    states, labels, _ = rows(3)
    scores = score_rows(torch.nn.Linear(8, 12), states[:, :0], labels[:0], None, num_candidates=4, chunk_rows=16)
    loss = weighted_mean(scores.loss, torch.ones(0))
    loss.backward()
    assert loss.item() == 0.0 and not states.grad.any()


def test_slots_weigh_less_the_later_they_are():
    weights = slot_weights(torch.tensor([1, 2, 8]), 7.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-1 / 7), math.exp(-1)]))


def test_a_count_follows_its_sum_to_the_device():
    sums = MetricSums()
    sums.add("candidate_recall", torch.ones((), device="meta"), torch.tensor(3))
    assert sums._pairs["candidate_recall"].device.type == "meta"


def test_metrics_are_ratios_of_sums():
    sums = MetricSums()
    supervised = torch.tensor([[[True, True, True], [True, True, False]]])
    add_block_metrics(sums, "", torch.tensor([True, True, False, True, False]), supervised, per_slot=True)
    add_block_metrics(sums, "", torch.tensor([True, True, True]), supervised[:, :1], per_slot=True)
    metrics = sums.pop(PROCESS)
    assert metrics["accuracy"] == 6 / 8
    # Whole blocks accept 2 and 3 tokens; the target's own comes on top.
    assert metrics["simulated_block_efficiency"] == (3 + 4) / 2
    assert metrics["accuracy_slot_1"] == 1.0 and metrics["accuracy_slot_3"] == 1 / 2
    assert sums.pop(PROCESS) == {}
