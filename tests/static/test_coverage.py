"""What the static path does not cover is decoded with dynamic caches after a warning, or refused by name."""

import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.families.models import FAMILIES
from tests.helpers.misuse import refuse
from tests.helpers.tiny import prompt, tiny_target, with_knobs
from tests.static.calls import GREEDY, drafter_of, generate, plainly

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def right_padded():
    ids, mask = prompt(8, batch=2), torch.ones(2, 8, dtype=torch.long)
    ids[1, 5:], mask[1, 5:] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


NOT_COVERED = {
    "penalty": ({}, {"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
    "n-grams": ({}, {"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
    "scores": ({}, {"output_scores": True}, "`output_scores`"),
    "hidden states": ({}, {"output_hidden_states": True}, "`output_hidden_states`"),
    "automatic budget": ({"tree_budget": "auto"}, {}, "`tree_budget='auto'`"),
    "window": ({"draft_window": 5}, {}, "`draft_window`"),
    "quotes": ({}, {"prompt_lookup_num_tokens": 5}, "`prompt_lookup_num_tokens`"),
    "right padding": ({}, right_padded(), "not on the left"),
    "hole": ({}, {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]])}, "not on the left"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("knobs", "settings", "reason"), NOT_COVERED.values(), ids=NOT_COVERED)
def test_decoded_with_dynamic_caches_after_a_warning(target, warnings, knobs, settings, reason):
    settings = {"input_ids": prompt(), **settings}
    drafter = with_knobs(drafter_of(), **knobs)
    output = generate(target, drafter, {}, covered=False, **settings)
    settings.pop("prompt_lookup_num_tokens", None)
    assert torch.equal(output.sequences, plainly(target, {}, **settings))
    (told,) = warnings
    assert reason in told and "the text is the same" in told


def test_targets_that_prepare_their_inputs_themselves(warnings):
    family = BY_NAME["Qwen3-VL"]
    target, inputs = family.build(), family.inputs()
    output = generate(target, drafter_of(), inputs, covered=False)
    assert torch.equal(output.sequences, plainly(target, inputs))
    assert len(warnings) == 1


def test_caches_of_the_users_own_are_refused(target):
    refuse(target, drafter_of(), "makes its own cache",
           past_key_values=DynamicCache(config=target.config), cache_implementation="static")  # fmt: skip
    refuse(target, drafter_of(), "cache_implementation='static'",
           past_key_values=StaticCache(config=target.config, max_cache_len=64))  # fmt: skip


def test_needs_the_package(target, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_treeflash.static", None)
    refuse(target, drafter_of(), "needs the hf_treeflash package", cache_implementation="static")


def test_the_calls_own_config_is_left_alone(target):
    from transformers import GenerationConfig

    config = GenerationConfig(**GREEDY, cache_implementation="static")
    for _ in range(2):
        output = target.generate(prompt(), generation_config=config, assistant_model=drafter_of())
        assert torch.equal(output, plainly(target))
        assert config.cache_implementation == "static" and not hasattr(config, "_treeflash_static")
