"""What a pass over recurrent layers allocates: never a state per node."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_treeflash.recurrent.gated_delta import gated_delta
from hf_treeflash.recurrent.kimi_delta import kimi_delta
from hf_treeflash.recurrent.levels import levels_of
from hf_treeflash.recurrent.mamba1 import mamba1
from hf_treeflash.recurrent.mamba2 import mamba2
from tests.kernels.trees import ancestor_mask
from tests.recurrent.trees import paths_of, shaped_tree

NODES = 64


class Largest(TorchDispatchMode):
    """Notes the size of the largest storage that any operation returns, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
        return result


def randn(*shape):
    return torch.randn(shape)


def delta_inputs(heads: int, size: int, channels: bool):
    parts = [randn(1, NODES, heads, size) for _ in range(3)]
    log_decay = -torch.rand(1, NODES, heads, *([size] if channels else []))
    return [*parts, log_decay, torch.rand(1, NODES, heads), randn(1, heads, size, size)]


def mamba2_inputs(heads: int, head_dim: int, state_size: int):
    b, c = randn(1, NODES, 1, state_size), randn(1, NODES, 1, state_size)
    inputs = [randn(1, NODES, heads, head_dim), torch.rand(1, NODES, heads), -torch.rand(heads), b, c, randn(heads)]
    return [*inputs, randn(1, heads, head_dim, state_size)]


def mamba1_inputs(channels: int, state_size: int):
    b, c = randn(1, state_size, NODES), randn(1, state_size, NODES)
    inputs = [randn(1, channels, NODES), torch.rand(1, channels, NODES), -torch.rand(channels, state_size)]
    return [*inputs, b, c, randn(channels), randn(1, channels, state_size)]


CASES = {
    "gated delta": (gated_delta, delta_inputs(8, 128, False)),
    "Kimi delta": (kimi_delta, delta_inputs(8, 128, True)),
    "Mamba-2": (mamba2, mamba2_inputs(16, 64, 128)),
    "Mamba-1": (mamba1, mamba1_inputs(4096, 16)),
}


@pytest.mark.parametrize("shape", ["chain", "star", "random"])
@pytest.mark.parametrize("name", CASES)
def test_no_state_per_node_is_ever_there(name, shape):
    walker, inputs = CASES[name]
    parents = shaped_tree(shape, NODES, torch.Generator().manual_seed(0))[None]
    tree = levels_of(parents) if walker is mamba1 else ancestor_mask(parents)
    state = inputs[-1].clone()
    with Largest() as largest:
        _, terms = walker(*inputs[:-1], state, tree)
        terms.add_path(state, paths_of(parents))
    per_node = NODES * state.numel()
    assert largest.elements <= per_node // 2, f"{largest.elements / state.numel():.1f} states at once"


@pytest.mark.parametrize("name", CASES)
def test_what_waits_for_the_commit_is_small(name):
    """The terms of all nodes of a pass, to a sixth of what their states would take."""
    walker, inputs = CASES[name]
    parents = shaped_tree("random", NODES, torch.Generator().manual_seed(0))[None]
    _, terms = walker(*inputs, levels_of(parents) if walker is mamba1 else ancestor_mask(parents))
    kept = sum(part.untyped_storage().nbytes() for part in terms if isinstance(part, torch.Tensor))
    assert kept < NODES / 6 * inputs[-1].nbytes, f"{kept / inputs[-1].nbytes:.1f} states"
