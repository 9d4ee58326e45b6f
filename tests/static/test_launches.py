"""How many operations a round launches, which is what its time on the host and the gaps in a graph hang on."""

import shutil

import pytest
import torch
from torch._inductor import metrics

from hf_treeflash import kernels
from hf_treeflash.static.steps import Steps
from tests.helpers.tiny import tiny_target
from tests.static.calls import drafter_of, generate, running
from tests.static.launches import launches_of_a_round


@pytest.fixture
def launches(monkeypatch):
    """Return totals of the parts of a round, for numbers of layers of the target and the drafter."""
    monkeypatch.setattr(kernels, "use_triton", lambda tensor: True)

    def count(target_layers: int, drafter_layers: int) -> dict[str, int]:
        target = tiny_target(head_dim=16, num_hidden_layers=target_layers)
        drafter = drafter_of(head_dim=16, num_hidden_layers=drafter_layers, block_size=16)
        generate(target, drafter)
        parts = launches_of_a_round(running(target, drafter), monkeypatch)
        return {name: sum(counts.values()) for name, counts in parts.items()}

    return count


def test_launches_of_36_and_5_layers(launches):
    few, more = launches(4, 2), launches(5, 3)
    verify = few["verify"] + 32 * (more["verify"] - few["verify"])
    draft = few["draft"] + 3 * (more["draft"] - few["draft"])
    assert few["commit"] == more["commit"] <= 18
    assert verify + draft + few["commit"] <= 2080


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_kernels_around_the_models_once_compiled():
    """In place of 36 launches."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.ones(1, *shape, dtype=torch.long)

    def integers(count: int) -> list[torch.Tensor]:
        return [rows() for _ in range(count)]

    state = [*integers(3), torch.zeros(1, 16, 8), torch.ones(1, dtype=torch.bool), rows(17)]
    around, compiled = Steps(), Steps().compiled({"fullgraph": True, "dynamic": False})
    copies = [tensor.clone() for tensor in state]
    choices, states, limits = torch.arange(64)[None], torch.randn(1, 64, 8), torch.tensor([9])
    metrics.reset()
    with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):  # a cached graph is not counted
        block = [steps.place_block(*integers(3), 16, 16) for steps in (around, compiled)]
        nodes = [steps.place_tree(rows(64), rows(64), *integers(5)) for steps in (around, compiled)]
        for steps, own in ((around, copies), (compiled, state)):
            steps.follow(rows(16), rows(), choices, states, limits, *own)
    assert 0 < metrics.generated_kernel_count <= 11
    for plain, fused in (*zip(*block, strict=True), *zip(*nodes, strict=True), *zip(copies, state, strict=True)):
        assert torch.equal(plain, fused)
