"""How many operations a round launches, which is what its time on the host and the gaps in a graph hang on."""

import pytest

from hf_treeflash import kernels
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
