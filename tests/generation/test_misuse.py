"""Misuse raises before any forward, says what is wrong, and leaves everything as it was."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache, T5Config

from tests.tiny import prompt, tiny_drafter, tiny_target, with_knobs


def refuse(target, drafter, message, **settings):
    """Call generate, expect the message, and check that no forward ran and no random number was drawn."""
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda *args: calls.append(1))
        for model in (target, drafter)
        for module in model.modules()
    ]
    state = torch.get_rng_state()
    settings = {"do_sample": False, "max_new_tokens": 8, **settings}
    ids = settings.pop("input_ids", prompt())
    try:
        with pytest.raises(ValueError, match=message):
            target.generate(ids, assistant_model=drafter, **settings)
    finally:
        for handle in handles:
            handle.remove()
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tree_budget": 1}, "`tree_budget` must be an integer of at least 2, or 'auto', got 1"),
        ({"tree_budget": 2.5}, "`tree_budget`"),
        ({"tree_budget": True}, "`tree_budget`"),
        ({"num_candidates": 0}, "`num_candidates` must be an integer of at least 1, got 0"),
        ({"branching": 0}, "`branching`"),
        ({"branching": None}, "`branching`"),
        ({"tree_budget": "large"}, "`tree_budget` must be an integer of at least 2, or 'auto', got 'large'"),
        ({"draft_window": 0}, "`draft_window` must be an integer of at least 1"),
        ({"draft_temperature": 0.0}, "`draft_temperature` must be a positive number, got 0.0"),
        ({"draft_temperature": float("nan")}, "`draft_temperature`"),
        ({"draft_temperature": "hot"}, "`draft_temperature`"),
        ({"tree_budgett": 8}, "Unknown drafting knob `tree_budgett`"),
    ],
    ids=str,
)
def test_impossible_knobs_are_named(target, knobs, message):
    refuse(target, with_knobs(tiny_drafter(), **knobs), message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beam_search; set `num_beams=1`"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache=True"),
        ({"assistant_early_exit": 2}, "`assistant_early_exit`"),
        ({"prompt_lookup_num_tokens": 0}, "`prompt_lookup_num_tokens` must be"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"tree_budget": 16}, "tree_budget"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_that_do_not_go_together(target, settings, message):
    refuse(target, tiny_drafter(), message, **settings)


def test_static_cache_objects_are_refused(target):
    cache = StaticCache(config=target.config, max_cache_len=64)
    refuse(target, tiny_drafter(), "StaticLayer", past_key_values=cache)


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (lambda: tiny_drafter(hidden_size=16), "`hidden_size` is 16, the target's is 32"),
        (lambda: tiny_drafter(num_target_layers=9, target_layer_ids=[1, 8]), "reads target layer 8"),
        (lambda: tiny_drafter(num_target_layers=6), "made for a target of 6 layers"),
        (lambda: tiny_drafter(vocab_size=30), "`vocab_size` is 30, the target's is 24"),
    ],
    ids=["hidden size", "tap depth", "layer count", "vocabulary"],
)
def test_a_drafter_of_another_target(target, drafter, message):
    refuse(target, drafter(), message)


def test_another_vocabulary_with_both_tokenizers_is_refused_too(target):
    refuse(target, tiny_drafter(vocab_size=30), "`vocab_size` is 30", tokenizer=object(), assistant_tokenizer=object())


def test_encoder_decoder_targets():
    config = T5Config(
        vocab_size=24, d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    refuse(AutoModelForSeq2SeqLM.from_config(config), tiny_drafter(), "(?i)encoder")


def test_recurrent_targets_are_refused_by_layer_type():
    from transformers import MambaConfig, Qwen3NextConfig

    hybrid = Qwen3NextConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    refuse(AutoModelForCausalLM.from_config(hybrid), tiny_drafter(), "'linear_attention' layers|stateful")
    mamba = MambaConfig(vocab_size=24, hidden_size=32, num_hidden_layers=4, state_size=4)
    refuse(AutoModelForCausalLM.from_config(mamba), tiny_drafter(), "'linear_attention' layers|stateful")


def test_a_refused_call_leaves_a_given_cache_alone(target):
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(prompt(), past_key_values=cache)
    keys = [layer.keys.clone() for layer in cache.layers]
    refuse(target, with_knobs(tiny_drafter(), tree_budget=1), "tree_budget", past_key_values=cache)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(keys, cache.layers, strict=True))


def test_a_drafter_that_never_helps_is_reported_once(target, caplog):
    from transformers.utils import logging as hf_logging

    useless = with_knobs(tiny_drafter(), tree_budget=2)
    hf_logging.get_logger("hf_treeflash.candidate_generator").propagate = True
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            target.generate(prompt(), assistant_model=useless, max_new_tokens=80, do_sample=False, eos_token_id=None)
    hf_logging.disable_propagation()
    told = [record.getMessage() for record in caplog.records if "hardly helps" in record.getMessage()]
    assert len(told) == 1 and "chat template" in told[0]
