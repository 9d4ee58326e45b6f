"""What stands around the two models of a round, as it is and compiled."""

import shutil

import pytest
import torch
from torch._inductor import metrics

from hf_treeflash.static.steps import Steps

# Three rows: one goes on, one reaches its limit, one ended earlier.
LENGTHS, COUNTS, LIMITS = torch.tensor([[10, 20, 30], [2, 3, 1], [50, 22, 30]])
ACTIVE = torch.tensor([True, True, False])
PATH = torch.tensor([[0, 2, -1], [0, 1, 3], [0, -1, -1]])
CHOICES, STATES = torch.arange(12).view(3, 4), torch.arange(12.0).view(3, 4, 1)


def state() -> list[torch.Tensor]:
    """Lengths, anchors, counts and states of the last path, what is active, what was emitted."""
    integers = [LENGTHS.clone(), torch.tensor([7, 8, 9]), torch.tensor([4, 4, 4])]
    return [*integers, torch.zeros(3, 4, 1), ACTIVE.clone(), torch.zeros(3, 5, dtype=torch.long)]


def results(steps: Steps) -> list[torch.Tensor]:
    """Return all that the steps around the models compute."""
    zeros, own = torch.zeros(3, dtype=torch.long), state()
    placed = steps.place_block(LENGTHS, COUNTS, zeros - 1, 4, 3)
    nodes = steps.place_tree(torch.zeros_like(CHOICES), CHOICES, zeros + 6, LENGTHS, LIMITS, zeros - 1, zeros + 2)
    steps.follow(PATH, COUNTS, CHOICES, STATES, LIMITS, *own)
    return [*placed, *nodes, *own]


def test_rows_follow_their_paths_and_those_that_ended_stand_still():
    lengths, anchors, counts, pending, active, emitted = own = state()
    Steps().follow(PATH, COUNTS, CHOICES, STATES, LIMITS, *own)
    assert lengths.tolist() == [12, 23, 30]
    assert anchors.tolist() == [2, 7, 9]
    assert counts.tolist() == [2, 3, 0]
    assert active.tolist() == [True, False, False]
    assert emitted[0, :2].tolist() == [0, 2] and emitted[1, :3].tolist() == [4, 5, 7]
    assert emitted[:, -1].tolist() == [2, 3, 0]
    assert pending[1, :3, 0].tolist() == [4, 5, 7]


def test_filler_goes_behind_the_block():
    slots, positions = Steps().place_block(LENGTHS, COUNTS, LENGTHS - LENGTHS, 4, 3)
    assert slots[0].tolist() == [8, 9, 13, 14, 10, 11, 12]
    assert positions[0].tolist() == [8, 9, 10, 11, 10, 11, 12]


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_few_kernels_once_compiled():
    """In place of 36 launches."""
    expected = results(Steps())
    torch._dynamo.reset()
    metrics.reset()
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):  # a cached graph is not counted
        compiled = results(Steps().compiled({"fullgraph": True, "dynamic": False}))
    assert 0 < metrics.generated_kernel_count <= 11
    for one, other in zip(compiled, expected, strict=True):
        assert torch.equal(one, other)
