"""Caches and attention implementations: what works leaves a plain forward's cache, the rest is refused by name."""

import shutil
import threading
import time
from unittest import mock

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_treeflash import TreeFlashCandidateGenerator
from hf_treeflash.attention import GROUPED, grouped_sdpa, masked_attention, replaced_attention
from tests.families.checks import assert_same_cache, check_greedy, drafter_for
from tests.helpers.batches import padded
from tests.helpers.misuse import refuse
from tests.helpers.tiny import prompt, tiny_target

LAYERS = {
    "full": ["full_attention"] * 4,
    "sliding": ["sliding_attention"] * 4,
    "hybrid": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "hybrid, sliding first": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}


def layered(kind: str, window: int, implementation: str = "sdpa"):
    target = tiny_target("qwen3", use_sliding_window=True, sliding_window=window, layer_types=LAYERS[kind])
    target.set_attn_implementation(implementation)
    return target


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "window"), [("full", 13), *((kind, window) for kind in list(LAYERS)[1:] for window in (2, 5, 13, 64))]
)
def test_windows_shorter_and_longer_than_block_prompt_and_text(kind, window, implementation):
    target = layered(kind, window, implementation)
    for head, batch in ((True, 1), (False, 4)):
        check_greedy(target, drafter_for(target, head), padded(batch), max_new_tokens=30)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 9])
def test_short_texts_from_short_prompts(new_tokens):
    target = layered("hybrid", 5)
    inputs = {"input_ids": prompt(1), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    check_greedy(target, drafter_for(target), inputs, max_new_tokens=new_tokens)


def test_a_given_cache_turn_after_turn():
    target = layered("hybrid", 9)
    drafter = drafter_for(target)
    ours, theirs = DynamicCache(config=target.config), DynamicCache(config=target.config)
    ids, settings = prompt(), {"do_sample": False, "max_new_tokens": 11, "eos_token_id": None}
    for turn in range(3):
        mask = torch.ones_like(ids)
        plain = target.generate(
            ids, attention_mask=mask, past_key_values=theirs, return_dict_in_generate=True, **settings
        )
        tree = target.generate(ids, attention_mask=mask, past_key_values=ours, assistant_model=drafter, **settings)
        assert torch.equal(plain.sequences, tree)
        assert_same_cache(ours, theirs, mask)
        ids = torch.cat([tree, prompt(3 + turn, seed=turn)], dim=1)


@pytest.mark.parametrize("cut", [0, 2, 9, 20])
@pytest.mark.parametrize("window", [None, 16])
def test_a_drafter_remembers_what_a_cut_cache_still_holds(cut, window):
    """Templates may write the last answer in another way: the caches go back to where the texts part."""
    target = tiny_target("qwen3")
    drafter = drafter_for(target)
    drafter.generation_config.draft_window = window
    settings = {"assistant_model": drafter, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    cache, ids = DynamicCache(config=target.config), prompt(24)
    first = target.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    if cut:
        cache.crop(-cut)
    ids = torch.cat([first[:, : cache.get_seq_length()], prompt(5, seed=3)], dim=1)
    read = []
    draft = TreeFlashCandidateGenerator.draft_tree

    def reading(self, anchors, context, *args, **kwargs):
        before = 0 if self.prefix is None else self.prefix.length
        read.append((before, context.position_ids[0].tolist()))
        return draft(self, anchors, context, *args, **kwargs)

    with mock.patch.object(TreeFlashCandidateGenerator, "draft_tree", reading):
        again = target.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), **{**settings, "assistant_model": None})
    assert torch.equal(again, plain)
    columns, positions = read[0]
    expected = list(range(ids.shape[1]))
    if window is None:
        assert [*range(columns), *positions] == expected
    else:  # it has forgotten what came before its window
        assert positions == expected[-len(positions) :] and columns + len(positions) <= len(expected)


def test_a_cache_without_windows_under_a_sliding_target():
    """A bare `DynamicCache()` keeps every column; the windows are then the mask's business alone."""
    target = layered("hybrid", 9)
    for batch in (1, 3):
        settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
        plain = target.generate(**padded(batch), past_key_values=DynamicCache(), **settings)
        tree = target.generate(
            **padded(batch), past_key_values=DynamicCache(), assistant_model=drafter_for(target), **settings
        )
        assert torch.equal(plain, tree)


class FakeQuantizedLayer(QuantizedLayer):
    """Stands for the quantized layers, whose libraries are optional."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


@pytest.mark.parametrize("start", [0, 2])
def test_quantized_caches_are_refused_by_name(start):
    target = tiny_target()
    cache = DynamicCache(config=target.config)
    cache.layers[start:] = [FakeQuantizedLayer() for _ in cache.layers[start:]]
    refuse(target, drafter_for(target), f"layer {start} of the target's cache, a FakeQuantizedLayer.*`DynamicCache`",
           past_key_values=cache)  # fmt: skip


def test_given_static_and_offloaded_caches_are_refused():
    target = tiny_target()
    static = StaticCache(config=target.config, max_cache_len=64)
    refuse(target, drafter_for(target), "StaticLayer", past_key_values=static)
    offloaded = DynamicCache(config=target.config)
    offloaded.offloading = True  # its constructor needs a device to load from
    refuse(target, drafter_for(target), "offloaded cache.*`DynamicCache`", past_key_values=offloaded)


@pytest.fixture
def maskless(monkeypatch):
    """An attention that, like FlashAttention, cannot take a 4D mask."""
    seen = []

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        assert attention_mask is None
        seen.append(query.shape[2])
        causal = query.shape[2] > 1
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("stub_flash", attention)
    AttentionMaskInterface.register("stub_flash", lambda *args, **kwargs: None)
    yield seen
    AttentionInterface._global_mapping.pop("stub_flash")
    AttentionMaskInterface._global_mapping.pop("stub_flash")


def test_maskless_attention_prefills_and_leaves_the_trees_to_another(maskless, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    target = tiny_target()
    plain = target.generate(prompt(), do_sample=False, max_new_tokens=20, eos_token_id=None)
    # Not by its setter, which looks names with "flash" up among the kernels on the Hub.
    target.config._attn_implementation_internal = "stub_flash"
    for probe in (2, 0):  # the first call also takes two steps of plain decoding, to compare a tree with
        maskless.clear()
        settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
        assert torch.equal(plain, target.generate(prompt(), assistant_model=drafter_for(target), **settings))
        assert maskless == [7] * 4 + [1] * 4 * probe  # the prompt, in four layers
        assert target.config._attn_implementation == "stub_flash"
    logging.disable_propagation()
    told = [record.getMessage() for record in caplog.records if "stub_flash" in record.getMessage()]
    assert len(told) == 1 and "sdpa" in told[0]


def test_the_choice_of_attention_is_restored_whatever_happens():
    target = tiny_target()
    config = target.config
    for own in ("flash_attention_2", "flex_attention", "kernels-community/flash-attn3"):
        config._attn_implementation_internal = own
        with pytest.raises(KeyboardInterrupt), masked_attention(target):
            assert config._attn_implementation == GROUPED
            raise KeyboardInterrupt
        assert config._attn_implementation == own
    target._supports_sdpa = False
    with masked_attention(target):
        assert config._attn_implementation == "eager"
    target._supports_sdpa = True
    for own, meanwhile in (("sdpa", GROUPED), ("eager", "eager"), ("tree_attention", "tree_attention")):
        config._attn_implementation_internal = own
        with masked_attention(target):
            assert config._attn_implementation == meanwhile
        assert config._attn_implementation == own


def test_threads_share_a_replaced_attention_and_take_turns_for_another():
    target = tiny_target()
    config = target.config
    config._attn_implementation_internal = "flash_attention_2"
    wrong = []

    def work(number):
        for _ in range(50):
            with masked_attention(target) if number % 2 else replaced_attention(config, "eager"):
                before = config._attn_implementation
                time.sleep(1e-4)
                if not before == config._attn_implementation == (GROUPED if number % 2 else "eager"):
                    wrong.append(before)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_sdpa_is_transformers_sdpa(groups):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    query, key, value = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 4 // groups, 9, 8)
    for mask in (torch.randn(2, 1, 5, 9), torch.rand(2, 1, 5, 9) > 0.3, None):
        ours, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.7)
        theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.7)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled on first use")
def test_a_target_on_flex_attention_keeps_its_text():
    """Plain passes run FlexAttention itself; verify passes, whose shapes change, another attention."""
    target = tiny_target()
    target.set_attn_implementation("flex_attention")
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    plain = target.generate(prompt(), **settings)
    assert torch.equal(plain, target.generate(prompt(), assistant_model=drafter_for(target), **settings))
    assert target.config._attn_implementation == "flex_attention"
