"""Products of a few rows: the same whichever way they are computed, chosen by time, and gone after the call."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_treeflash import products as module
from hf_treeflash.decoding import TreeDecoding
from hf_treeflash.products import Products, quick_products, ways
from tests.helpers.batches import padded
from tests.helpers.tiny import keeping, prompt, tiny_drafter, tiny_target, with_knobs

ALL_WAYS = [F.linear, module.turned, module.padded, module.by_onednn, module.in_blocks, module.turned_in_blocks]
WAYS = pytest.mark.parametrize("way", ALL_WAYS, ids=[way.__name__ for way in ALL_WAYS])
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


@WAYS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2,), (16,), (17,), (1, 5), (2, 3)], ids=str)
def test_every_way_gives_the_product(monkeypatch, way, bias, shape):
    monkeypatch.setattr(module, "ways", lambda weight: [way])
    torch.manual_seed(0)
    layer, states = nn.Linear(40, 96, bias=bias), torch.randn(*shape, 40)
    chosen = Products()
    with torch.no_grad():
        for _ in range(5):  # tried, then taken as the fastest
            result = chosen(layer, states)
            torch.testing.assert_close(result, layer(states), atol=1e-5, rtol=1e-5)
            assert result.is_contiguous()


@WAYS
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_are_plain_generates(monkeypatch, way, batch):
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "products", Products())
    used = []

    def counted(rows, weight):
        used.append(way)
        return way(rows, weight)

    monkeypatch.setattr(module, "ways", lambda weight: [counted])
    target, drafter = tiny_target(), with_knobs(keeping(tiny_drafter(), *range(1, 20)), tree_budget=12)
    output = target.generate(**padded(batch), **GREEDY, assistant_model=drafter)
    assert torch.equal(output, target.generate(**padded(batch), **GREEDY)) and len(used) > 100


def test_one_row_and_many_are_left_to_the_library(monkeypatch):
    monkeypatch.setattr(module, "ways", lambda weight: pytest.fail("no way was to be chosen"))
    layer = nn.Linear(8, 48)
    for rows in (1, module.MOST_ROWS + 1):
        states = torch.randn(rows, 8)
        assert torch.equal(Products()(layer, states), layer(states))


@pytest.mark.parametrize("gain", [0.5, 0.99])
def test_the_fastest_way_is_taken_if_it_is_worth_it(monkeypatch, gain):
    clock, costs = [0.0], [1.0, gain, 2.0]

    def timed_way(number):
        def way(rows, weight):
            clock[0] += costs[number] + 5 * (number not in calls)  # the first time costs more
            calls.append(number)
            return rows @ weight.T

        return way

    calls: list[int] = []
    listed = [timed_way(number) for number in range(3)]
    monkeypatch.setattr(module, "ways", lambda weight: listed)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    chosen, layer = Products(), nn.Linear(8, 48, bias=False)
    for _ in range(3 * module.TRIALS + 2):
        chosen(layer, torch.randn(5, 8))
    usual, other = 0, 1
    assert calls == [0, 1, 2] * module.TRIALS + [other if gain < 0.9 else usual] * 2


def test_a_way_that_fails_is_not_taken_again(monkeypatch):
    def fails(rows, weight):
        raise RuntimeError("not built with it")

    monkeypatch.setattr(module, "ways", lambda weight: [F.linear, fails])
    chosen, layer = Products(), nn.Linear(8, 48)
    for _ in range(module.TRIALS + 2):
        states = torch.randn(5, 8)
        torch.testing.assert_close(chosen(layer, states), layer(states))
    assert list(chosen.fastest.values()) == [F.linear]


def test_layers_are_as_they_were_after_a_call_that_breaks(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    target, drafter = tiny_target(), tiny_drafter()
    own, seen = target.model.layers[1].mlp.down_proj, []
    own.forward = lambda states: F.linear(states, own.weight)  # of somebody else

    def breaks(self, state, tree):
        seen.extend(part for part in target.modules() if "forward" in vars(part))
        raise KeyboardInterrupt

    monkeypatch.setattr(TreeDecoding, "verify", breaks)
    with pytest.raises(KeyboardInterrupt):
        target.generate(prompt(), **GREEDY, assistant_model=drafter)
    assert len(seen) > 20
    assert [part for part in target.modules() if "forward" in vars(part)] == [own]
    assert not any("forward" in vars(part) for part in drafter.modules())


@pytest.mark.parametrize("change", ["small", "half precision", "a kind of its own", "autocast", "deterministic"])
def test_what_is_left_alone(monkeypatch, change):
    layer = nn.Linear(512, 512)
    if change == "small":
        layer = nn.Linear(64, 512)
    elif change == "half precision":
        layer.bfloat16()
    elif change == "a kind of its own":
        layer = type("Own", (nn.Linear,), {})(512, 512)
    elif change == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with torch.autocast("cpu", enabled=change == "autocast"), quick_products(nn.Sequential(layer)):
        assert "forward" not in vars(layer)


def test_a_weight_that_cannot_be_cut_has_fewer_ways():
    assert module.in_blocks in ways(torch.zeros(96, 4)) and module.in_blocks not in ways(torch.zeros(97, 4))


def test_other_threads_see_the_layers_own_products(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "products", lambda layer, states: states * 0)
    layer, states, seen = nn.Linear(8, 8), torch.randn(4, 8), []
    with quick_products(layer):
        other = threading.Thread(target=lambda: seen.append(layer(states)))
        other.start()
        other.join()
        assert not layer(states).any()
    assert torch.equal(seen[0], layer(states))
