"""A target with int8 weights keeps its own text: that of the quantised model, token for token."""

import pytest
from transformers import TorchAoConfig

from tests.families.checks import check_greedy, check_sampling
from tests.helpers.batches import padded
from tests.helpers.tiny import tiny_drafter, tiny_target, with_knobs


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    quantization = pytest.importorskip("torchao.quantization")
    folder = tmp_path_factory.mktemp("target")
    full = tiny_target()
    full.save_pretrained(folder)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantised = type(full).from_pretrained(folder, quantization_config=config).eval()
    assert type(quantised.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
    return quantised


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(target, batch):
    check_greedy(target, with_knobs(tiny_drafter(), tree_budget=16), padded(batch))


def test_same_seed(target):
    check_sampling(target, with_knobs(tiny_drafter(), tree_budget=16), padded(1), seeds=range(2))
