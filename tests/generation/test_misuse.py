"""Misuse, one line each: refused by name before anything runs, and everything is as it was."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    StaticCache,
)

from hf_treeflash import TreeFlashDraftModel
from tests.helpers.misuse import filled_cache, refuse
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs


@pytest.fixture(scope="module")
def shared():
    return tiny_target()


def edited(**fields):
    """Return a drafter whose config was changed after it was built."""
    drafter = tiny_drafter()
    for name, value in fields.items():
        object.__setattr__(drafter.config, name, value)
    return drafter


def knobs(**values):
    return {"drafter": lambda: with_knobs(tiny_drafter(), **values)}


def on_meta(model):
    return model.to("meta")


def encoder_decoder():
    sizes = {"encoder_layers": 1, "decoder_layers": 4, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return AutoModelForSeq2SeqLM.from_config(BartConfig(vocab_size=24, d_model=32, **sizes))


def bert_decoder():
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "is_decoder": True}
    return BertLMHeadModel(BertConfig(vocab_size=24, hidden_size=32, **sizes))


def config_object(**fields):
    return {"generation_config": GenerationConfig(max_new_tokens=8, **fields)}


# What is refused: how the target and the drafter are made, settings of the call, and words of the message.
REFUSED = {
    "budget of none": (knobs(tree_budget=0), "`tree_budget` must be .* 0"),
    "negative budget": (knobs(tree_budget=-4), "`tree_budget` must be .* -4"),
    "budget as text": (knobs(tree_budget="64"), "`tree_budget` must be .* '64'"),
    "budget as float": (knobs(tree_budget=16.0), "`tree_budget` must be .* 16.0"),
    "budget of None": (knobs(tree_budget=None), "`tree_budget` must be .* None"),
    "budget as truth": (knobs(tree_budget=True), "`tree_budget` must be .* True"),
    "budget of one": (knobs(tree_budget=1), "`tree_budget` must be an integer from 2 to 4096, or 'auto', got 1"),
    "budget as a word": (knobs(tree_budget="large"), "`tree_budget` must be .* 'auto', got 'large'"),
    "candidates of none": (knobs(num_candidates=0), "`num_candidates` must be an integer from 1 to 1024, got 0"),
    "branching of None": (knobs(branching=None), "`branching` must be .* None"),
    "window of none": (knobs(draft_window=0), "`draft_window` must be an integer from 1 to"),
    "temperature of zero": (knobs(draft_temperature=0.0), "`draft_temperature` must be .* 0.0"),
    "temperature that is no number": (knobs(draft_temperature=float("nan")), "`draft_temperature` must be .* nan"),
    "temperature as a word": (knobs(draft_temperature="hot"), "`draft_temperature` must be .* 'hot'"),
    "candidates as truth": (knobs(num_candidates=True), "`num_candidates` must be .* True"),
    "negative branching": (knobs(branching=-3), "`branching` must be .* -3"),
    "infinite temperature": (knobs(draft_temperature=float("inf")), "`draft_temperature` must be .* inf"),
    "negative temperature": (knobs(draft_temperature=-1.0), "`draft_temperature` must be .* -1.0"),
    "no temperature": (knobs(draft_temperature=None), "`draft_temperature` must be .* None"),
    "misspelt knob": (knobs(treebudget=8), "Unknown drafting knob `treebudget`"),
    "drafter of a wider target": (
        {"drafter": lambda: tiny_drafter(hidden_size=64)},
        "`hidden_size` is 64, the target's is 32",
    ),
    "drafter of another tokenizer": (
        {"drafter": lambda: tiny_drafter(vocab_size=30)},
        "`vocab_size` is 30, the target's is 24",
    ),
    "drafter of a deeper target": (
        {"drafter": lambda: tiny_drafter(num_target_layers=9, target_layer_ids=[1, 8])},
        "layer 8 .* has 4 layers",
    ),
    "drafter of a target of other depth": (
        {"drafter": lambda: tiny_drafter(num_target_layers=6)},
        "target of 6 layers .* has 4",
    ),
    "mask token beyond the vocabulary": ({"drafter": lambda: edited(mask_token_id=24)}, "`mask_token_id`.* found 24"),
    "negative mask token": ({"drafter": lambda: edited(mask_token_id=-1)}, "`mask_token_id`.* found -1"),
    "block of one": ({"drafter": lambda: edited(block_size=1)}, "`block_size`.* found 1"),
    "negative layer": ({"drafter": lambda: edited(target_layer_ids=[-2, 2])}, r"`target_layer_ids\[0\]`.* found -2"),
    "no layers": ({"drafter": lambda: edited(target_layer_ids=[])}, "`target_layer_ids`"),
    "more layers than it was built for": (
        {"drafter": lambda: edited(target_layer_ids=[0, 1, 2])},
        "3 target layers .*`target_layer_ids`.* built for 2",
    ),
    "windows without a size": (
        {"drafter": lambda: edited(layer_types=["sliding_attention"] * 2)},
        "`sliding_window`.* found none",
    ),
    "drafter without weights": ({"drafter": lambda: on_meta(tiny_drafter())}, "drafter .*meta"),
    "target without weights": ({"target": lambda: on_meta(tiny_target())}, "target .*meta"),
    "encoder-decoder target": ({"target": encoder_decoder}, "encoder-decoder"),
    "target of another build": (
        {"target": bert_decoder},
        "BertLMHeadModel does not keep its decoder layers in `layers` or `h`",
    ),
    "beams": ({"num_beams": 3}, "`num_beams=1`"),
    "no cache": ({"use_cache": False}, "use_cache=True"),
    "n-grams of none": ({"prompt_lookup_num_tokens": 0}, "`prompt_lookup_num_tokens` must be"),
    "beams in a config object": (config_object(num_beams=2), "`num_beams=1`"),
    "sequences in a config object": (config_object(num_return_sequences=2, do_sample=True), "num_return_sequences"),
    "no cache in a config object": (config_object(use_cache=False), "use_cache=True"),
    "another vocabulary with both tokenizers": (
        {"drafter": lambda: tiny_drafter(vocab_size=30), "tokenizer": object(), "assistant_tokenizer": object()},
        "`vocab_size` is 30",
    ),
    "another tokenizer": ({"assistant_tokenizer": object(), "tokenizer": object()}, "`assistant_tokenizer`"),
    "synced devices": ({"synced_gpus": True}, "synced_gpus"),
    "early exit": ({"assistant_early_exit": 2}, "`assistant_early_exit`"),
    "static cache object": (
        {"cache": lambda target: StaticCache(config=target.config, max_cache_len=40)},
        "StaticLayer",
    ),
    "cache longer than the prompt": (
        {"cache": lambda target: filled_cache(target, length=12)},
        "holds 12 columns and the prompt has 7",
    ),
    "cache of the whole prompt": (
        {"cache": lambda target: filled_cache(target, length=7)},
        "holds 7 columns and the prompt has 7",
    ),
    "ids of three dimensions": ({"input_ids": prompt()[None]}, r"`input_ids` .* \(1, 1, 7\)"),
    "empty prompt": ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "prompt is empty"),
    "mask too short": ({"attention_mask": torch.tensor([[0, 1, 1]])}, "`attention_mask` has 3 columns.* 7"),
    "mask too long": ({"attention_mask": torch.tensor([[0] + [1] * 9])}, "`attention_mask` has 10 columns.* 7"),
    "knob as an argument": ({"tree_budget": 8}, "tree_budget"),
    "unknown argument": ({"max_new_token": 8}, "max_new_token"),
}


@pytest.mark.parametrize(("case", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_runs(shared, case, message):
    case = dict(case)
    target = case.pop("target")() if "target" in case else shared
    drafter = case.pop("drafter", tiny_drafter)()
    if "cache" in case:
        case["past_key_values"] = case.pop("cache")(target)
    weights = {key: value.clone() for key, value in target.state_dict().items()}
    refuse(target, drafter, message, **case)
    assert not any(module._forward_hooks for module in target.modules())
    for key, value in target.state_dict().items():
        assert value.device == weights[key].device and (value.is_meta or torch.equal(value, weights[key]))


def test_a_drafter_does_not_generate_by_itself():
    with pytest.raises((AttributeError, TypeError), match="generate"):
        tiny_drafter().generate(prompt())


@pytest.mark.parametrize("wrong", ["path/to/drafter", TreeFlashDraftModel, object()], ids=["name", "class", "object"])
def test_what_is_no_model_is_refused_as_by_transformers(shared, wrong):
    with pytest.raises((AttributeError, OSError, TypeError, ValueError)):
        shared.generate(prompt(), assistant_model=wrong, max_new_tokens=4)


def test_a_refused_call_leaves_a_given_cache_alone(shared):
    cache = filled_cache(shared)
    keys = [layer.keys.clone() for layer in cache.layers]
    refuse(shared, with_knobs(tiny_drafter(), tree_budget=1), "tree_budget", past_key_values=cache)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(keys, cache.layers, strict=True))


def test_a_drafter_that_never_helps_is_reported_once(shared, caplog):
    from transformers.utils import logging as hf_logging

    useless = with_knobs(tiny_drafter(), tree_budget=2)
    logging.Logger.warning_once.cache_clear()  # another test may have been told the same
    hf_logging.get_logger("hf_treeflash.candidate_generator").propagate = True
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            shared.generate(prompt(), assistant_model=useless, max_new_tokens=80, do_sample=False, eos_token_id=None)
    hf_logging.disable_propagation()
    told = [record.getMessage() for record in caplog.records if "hardly helps" in record.getMessage()]
    assert len(told) == 1 and "chat template" in told[0]
