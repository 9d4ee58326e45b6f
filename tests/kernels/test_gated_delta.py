"""K6 and K7: the gated delta rule over trees and what paths add to states, the kernels against their oracles."""

from __future__ import annotations

import pytest
import torch

from hf_treeflash.kernels import add_path, add_path_reference, gated_delta, gated_delta_reference

from .conftest import kernel_module
from .trees import ancestor_mask, random_parents

# nodes, key heads, heads, key size, value size, rows
CASES = {
    "a bare root": (1, 1, 1, 16, 16, 1),
    "one head per key": (7, 2, 2, 32, 16, 2),
    "shared keys": (16, 2, 4, 32, 32, 2),
    "sizes that fill no tile": (33, 1, 2, 24, 40, 1),
    "64 nodes, as Qwen3.5": (64, 1, 2, 128, 128, 1),
    "100 nodes": (100, 1, 1, 32, 32, 2),
    "128 nodes, wide heads": (128, 1, 1, 256, 64, 1),
    "150 nodes": (150, 1, 1, 16, 16, 1),
}


def make_case(name: str, device: str, dtype: torch.dtype = torch.float32, parallel: bool = False) -> tuple:
    nodes, key_heads, heads, key_size, value_size, batch = CASES[name]
    generator = torch.Generator().manual_seed(nodes)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # Views of one projection, as the layers hand them in.
    widths = [key_heads * key_size, key_heads * key_size, heads * value_size]
    query, key, value = randn(batch, sum(widths), nodes).transpose(1, 2).contiguous().split(widths, dim=2)
    query, key = (part.unflatten(2, (key_heads, key_size)) for part in (query, key))
    if parallel:
        key = key[:, :1] + 0.01 * key
    value = value.unflatten(2, (heads, value_size))
    log_decay = -2 * torch.rand(batch, nodes, heads, generator=generator)
    beta = torch.rand(batch, nodes, heads, generator=generator)
    state = randn(batch, heads, key_size, value_size).to(device)
    parents = random_parents(batch, nodes, generator)
    inputs = (part.to(device=device, dtype=dtype) for part in (query, key, value))
    return *inputs, log_decay.to(device), beta.to(device, dtype), state, ancestor_mask(parents).to(device)


def chain(nodes: int, device: str) -> torch.Tensor:
    return torch.ones(1, nodes, nodes, dtype=torch.bool, device=device).tril()


def assert_close(actual, expected, atol: float = 2e-5) -> None:
    for name, mine, theirs in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), atol=atol, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("parallel", [False, True], ids=["random keys", "parallel keys"])
def test_kernel_equals_oracle(triton_kernels, device, name, parallel):
    case = make_case(name, device, parallel=parallel)
    before = case[5].clone()
    assert_close(gated_delta(*case), gated_delta_reference(*case))
    assert torch.equal(case[5], before)


def test_half_precision_in_fp32_inside(triton_kernels, device):
    case = make_case("shared keys", device, torch.bfloat16)
    actual, expected = gated_delta(*case), gated_delta_reference(*case)
    assert actual.output.dtype == torch.bfloat16 and actual.updates.dtype == torch.float32
    torch.testing.assert_close(actual.output, expected.output, atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(actual.updates, expected.updates, atol=2e-5, rtol=1e-4)


def test_a_long_chain_of_overshooting_updates_stays_finite(triton_kernels, device):
    """Levels that are not solved yet must not be multiplied up."""
    query, key, value, _, beta, state, _ = make_case("128 nodes, wide heads", device, parallel=True)
    case = (query, key, value, torch.zeros_like(beta), torch.full_like(beta, 1.9), state, chain(128, device))
    actual, expected = gated_delta(*case), gated_delta_reference(*case)
    assert all(part.isfinite().all() for part in actual)
    torch.testing.assert_close(actual.output, expected.output, atol=2e-4, rtol=1e-4)


def test_decays_that_forget_everything(triton_kernels, device):
    """Off a node's path differences of log decays are positive and beyond what an exponential holds."""
    *rest, log_decay, beta, state, mask = make_case("64 nodes, as Qwen3.5", device)
    case = (*rest, log_decay * 50, beta, state, mask)
    actual = gated_delta(*case)
    assert all(part.isfinite().all() for part in actual)
    assert_close(actual, gated_delta_reference(*case), atol=1e-3)


@pytest.mark.parametrize("channels", [False, True], ids=["a decay per head", "a decay per channel"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("key_size", "value_size", "groups"), [(16, 16, 1), (24, 72, 3), (128, 128, 2)])
def test_add_path_kernel_equals_oracle(triton_kernels, device, key_size, value_size, groups, channels, transposed):
    generator = torch.Generator().manual_seed(key_size)
    nodes, key_heads = 20, 2

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    heads = key_heads * groups
    state = randn(2, heads, value_size, key_size).mT if transposed else randn(2, heads, key_size, value_size)
    keys, updates = randn(2, key_heads, nodes, key_size), randn(2, heads, nodes, value_size)
    decays = -randn(2, heads, nodes, key_size if channels else 1).abs()
    path = torch.tensor([[0, 2, 5, 19], [0, 7, -1, -1]], device=device)
    moved, expected = state.clone(), state.clone()
    add_path(moved, keys, updates, decays, path)
    add_path_reference(expected, keys, updates, decays, path)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(moved, state)


def test_keys_without_a_tile_take_the_oracle(triton_kernels, device):
    query, key, value = torch.randn(3, 1, 5, 1, 300, device=device)
    beta, state = torch.rand(1, 5, 1, device=device), torch.randn(1, 1, 300, 300, device=device)
    case = (query, key, value, -beta, beta, state, chain(5, device))
    assert_close(gated_delta(*case), gated_delta_reference(*case))


@pytest.mark.parametrize("place", range(7))
def test_misfits_raise(place):
    case = list(make_case("shared keys", "cpu"))
    case[place] = case[place][:, 1:]
    with pytest.raises(ValueError, match="do not fit each other"):
        gated_delta(*case)


def test_tiles():
    config = kernel_module("gated_delta").gated_delta_config
    assert config(1, 128)["BLOCK"] == 16 and config(65, 128)["BLOCK"] == 32
    assert config(64, 128)["BLOCK_V"] == 32 and config(8, 12)["BLOCK_V"] == 16
