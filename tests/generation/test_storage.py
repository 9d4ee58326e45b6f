"""Storages of one text: they grow, trim and give every layer back as plain decoding leaves it."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_treeflash import storage
from hf_treeflash.choice import Choice
from tests.families.checks import assert_same_cache, drafter_for
from tests.helpers.tiny import prompt, tiny_target

SETTINGS = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "return_dict_in_generate": True}


@pytest.fixture(params=[(256, 8), (3, 8), (1, 2)], ids=["roomy", "tight", "several"])
def sizes(request, monkeypatch):
    """Storages that hold all, that are copied every few rounds, and that hold two layers each."""
    monkeypatch.setattr(storage, "ROOM", request.param[0])
    monkeypatch.setattr(storage, "LAYERS", request.param[1])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_sliding"])
def test_the_returned_cache_is_its_own_and_as_plain(sizes, family, window):
    target = tiny_target(family)
    drafter = drafter_for(target)
    drafter.generation_config.draft_window = window
    ids, given = prompt(12), DynamicCache(config=target.config)
    layers = list(given.layers)
    plain = target.generate(ids, **SETTINGS)
    tree = target.generate(ids, assistant_model=drafter, past_key_values=given, **SETTINGS)
    assert torch.equal(plain.sequences, tree.sequences)
    assert tree.past_key_values is given and all(a is b for a, b in zip(given.layers, layers, strict=True))
    assert all(layer.keys.is_contiguous() for layer in layers if type(layer) is DynamicLayer)
    assert_same_cache(given, plain.past_key_values, torch.ones_like(ids))


def test_a_broken_call_gives_the_layers_back(sizes):
    target = tiny_target()
    ids, given = prompt(12), DynamicCache(config=target.config)

    def broken(input_ids, scores, **kwargs):
        if input_ids.shape[1] >= 30:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        target.generate(
            ids, assistant_model=drafter_for(target), past_key_values=given, stopping_criteria=[broken], **SETTINGS
        )
    assert {type(layer) for layer in given.layers} == {DynamicLayer}
    expected = DynamicCache(config=target.config)
    text = target.generate(ids, **SETTINGS).sequences[:, : given.get_seq_length()]
    with torch.no_grad():
        target(text, past_key_values=expected)
    for own, other in zip(given.layers, expected.layers, strict=True):
        torch.testing.assert_close((own.keys, own.values), (other.keys, other.values))


def test_layers_of_different_shapes_get_storages_of_their_own():
    cache = DynamicCache()
    shapes = [(2, 8), (2, 8), (4, 8), (2, 8)]
    before = [torch.randn(1, heads, 5, size) for heads, size in shapes]
    for place, states in enumerate(before):
        cache.update(states, -states, place)
    storages = storage.share(cache)
    assert all(layer.layer.keys is None and layer.layer.values is None for layer in cache.layers)  # not held twice
    assert [len(own.lengths) for own in storages] == [3, 1]
    storage.release(cache)
    for layer, states in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, states) and torch.equal(layer.values, -states)


def test_passes_see_what_was_kept_and_trimmed(sizes):
    """Against plain tensors: what a drafter reads never shows in a text."""
    torch.manual_seed(0)
    cache, length = DynamicCache(), 6
    expected = [torch.randn(1, 2, length, 8) for _ in range(3)]
    for place, states in enumerate(expected):
        cache.update(states, -states, place)
    storages = storage.share(cache)
    for _ in range(12):
        new = [torch.randn(1, 2, 4, 8) for _ in expected]
        for place, (before, states) in enumerate(zip(expected, new, strict=True)):
            keys, values = cache.update(states, -states, place)
            whole = torch.cat([before, states], dim=2)
            assert torch.equal(keys, whole) and torch.equal(values, -whole)
        for part in storages:
            part.commit(Choice([[0, 2]], length, 4))
            part.trim(length + 1)
        expected = [
            torch.cat([before, states[:, :, [0, 2]]], dim=2)[:, :, 1:]
            for before, states in zip(expected, new, strict=True)
        ]
        length += 1
        for layer, states in zip(cache.layers, expected, strict=True):
            assert layer.get_seq_length() == length
            assert torch.equal(layer.keys, states) and torch.equal(layer.values, -states)


def test_memory_is_freed_with_the_last_use_and_not_by_the_garbage_collector():
    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0)
    alive = weakref.ref(storage.share(cache)[0])
    gc.disable()
    try:
        storage.release(cache)
        assert alive() is None
    finally:
        gc.enable()
