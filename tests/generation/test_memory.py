"""What calls leave for later ones: nothing outlives its owner, and nothing is taken for what it is not."""

import gc
import weakref

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StoppingCriteria

import hf_treeflash
from hf_treeflash import memory
from hf_treeflash.memory import forget, recall, remember, take
from tests.helpers.batches import padded
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs

GREEDY = {"do_sample": False, "max_new_tokens": 14, "eos_token_id": None, "return_dict_in_generate": True}


class Owner:
    """Something that can be referred to weakly, and is equal to all others."""

    def __eq__(self, other):
        return True

    __hash__ = None


class Interrupt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 20:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("first", [0, 1])
def test_a_value_goes_with_the_first_of_its_owners(first):
    owners, value = [Owner(), Owner()], Owner()
    gone = weakref.ref(value)
    remember("kind", value, *owners)
    del value
    assert recall("kind", *owners) is gone() is not None
    assert recall("other kind", *owners) is recall("kind", *owners[::-1]) is recall("kind", Owner(), Owner()) is None
    del owners[first]
    assert gone() is None


def test_values_are_replaced_taken_and_forgotten():
    owner, other = Owner(), Owner()
    for value in (1, 2):
        remember("kind", value, owner)
    remember("kind", 3, owner, other)
    assert take("kind", owner) == 2 and take("kind", owner) is None
    remember("another", 4, other)
    forget(other, "kind")
    assert recall("kind", owner, other) is None and recall("another", other) == 4
    forget(other)
    assert recall("another", other) is None


def test_forgetting_a_model_drops_what_belongs_to_its_parts():
    drafter = tiny_drafter()
    remember("kind", 1, drafter.fc)
    remember("kind", 2, drafter, Owner())  # the other owner is gone at once
    remember("kind", 3, tiny_drafter())
    hf_treeflash.forget(drafter)
    assert recall("kind", drafter.fc) is None
    assert not [key for key in memory._kept if key[0] == "kind"]


WAYS = {
    "dynamic": {},
    "automatic budget": {"knobs": {"tree_budget": "auto"}},
    "float8": {"knobs": {"draft_lm_head": "float8"}},
    "sampled": {"do_sample": True},
    "batch": padded(3),
    "static": {"cache_implementation": "static"},
    "static, batch": {"cache_implementation": "static", **padded(3)},
    "static, sampled, float8": {
        "cache_implementation": "static",
        "do_sample": True,
        "top_k": 5,
        "knobs": {"draft_lm_head": "float8"},
    },
    "static, compiled": {"cache_implementation": "static", "compile_config": CompileConfig(backend="aot_eager")},
    "static, not covered": {"cache_implementation": "static", "repetition_penalty": 1.3},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks off"])
@pytest.mark.parametrize("goes", ["target", "drafter"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_models_are_freed_after_any_call(way, goes, breaks):
    settings, before = {"input_ids": prompt(), **GREEDY, **way}, set(memory._kept)
    models = {"target": tiny_target(), "drafter": with_knobs(tiny_drafter(), **settings.pop("knobs", {}))}
    drafter, heads = models["drafter"], weakref.ref(models["target"].lm_head.weight)
    for _ in range(2):
        criteria = [Interrupt()] if breaks else None
        try:
            output = models["target"].generate(assistant_model=drafter, stopping_criteria=criteria, **settings)
            assert not breaks
        except KeyboardInterrupt:
            assert breaks
            output = None
    gone = weakref.ref(models.pop(goes))
    del drafter
    gc.collect()
    assert gone() is None and (goes == "drafter" or heads() is None)
    # What belongs to both goes with either; a conversation is its cache's and the drafter's.
    shared = ("sessions",) if goes == "target" else ("sessions", "context")
    assert not [key for key in set(memory._kept) - before if key[0] in shared]
    del output


def test_caches_are_freed_with_what_the_drafter_keeps_beside_them():
    target, drafter = tiny_target(), tiny_drafter()
    output = target.generate(prompt(), assistant_model=drafter, **GREEDY)
    beside = recall("context", output.past_key_values, drafter)[2].cache
    gone = weakref.ref(beside), weakref.ref(output.past_key_values)
    del beside, output
    gc.collect()
    assert [own() for own in gone] == [None, None]
    target.generate(prompt(), assistant_model=drafter, **{**GREEDY, "return_dict_in_generate": False})
    gc.collect()
    assert ("context", id(drafter)) not in [(key[0], key[2]) for key in memory._kept if len(key) > 2]


def first_turn(drafter, target=None):
    """Return a target, the output of a first turn, and the whole text of a second one."""
    target = target or tiny_target()
    output = target.generate(prompt(), assistant_model=drafter, **GREEDY)
    return target, output, torch.cat([output.sequences, prompt(3, seed=9)], dim=1)


def second_turn(target, drafter, ids, cache):
    return target.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, assistant_model=drafter, **GREEDY
    )


def another_dtype(drafter):
    drafter.to(torch.bfloat16)


def another_block(drafter):
    drafter.config.block_size = 5


@pytest.mark.parametrize("change", [another_dtype, another_block])
def test_a_drafter_that_changed_between_turns_starts_afresh(change):
    drafter = tiny_drafter()
    target, output, ids = first_turn(drafter)
    change(drafter)
    tree = second_turn(target, drafter, ids, output.past_key_values)
    assert torch.equal(tree.sequences, target.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).sequences)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("inside", [True, False], ids=["inside then outside", "outside then inside"])
def test_turns_inside_and_outside_of_inference_mode(inside, window):
    drafter, target = with_knobs(tiny_drafter(), draft_window=window), tiny_target("qwen3_sliding")
    with torch.inference_mode(inside):
        _, output, ids = first_turn(drafter, target)
    with torch.inference_mode(not inside):
        tree = second_turn(target, drafter, ids, output.past_key_values)
    assert torch.equal(tree.sequences, target.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).sequences)


def test_a_turn_that_failed_is_tried_again_on_the_cropped_cache(monkeypatch):
    drafter = tiny_drafter()
    target, output, ids = first_turn(drafter)
    cache, length = output.past_key_values, output.past_key_values.get_seq_length()
    forward, calls = drafter.layers[1].forward, []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle of a draft")
        return forward(*args, **kwargs)

    monkeypatch.setattr(drafter.layers[1], "forward", fails)
    with pytest.raises(RuntimeError, match="middle of a draft"):
        second_turn(target, drafter, ids, cache)
    cache.crop(length - cache.get_seq_length())
    tree = second_turn(target, drafter, ids, cache)
    assert torch.equal(tree.sequences, target.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).sequences)


def test_a_cache_refilled_with_another_text_of_the_same_length():
    """The drafter must not go on from the text that was there; and does from the one that is."""
    drafter = tiny_drafter()
    target, output, _ = first_turn(drafter)
    cache = output.past_key_values
    other = torch.cat([prompt(cache.get_seq_length(), seed=3), prompt(4, seed=9)], dim=1)
    filled = DynamicCache(config=target.config)
    with torch.no_grad():
        target(other[:, : cache.get_seq_length()], past_key_values=filled)
    fresh = second_turn(target, drafter, other, filled)
    cache.crop(-cache.get_seq_length())
    with torch.no_grad():
        target(other[:, : output.sequences.shape[1] - 1], past_key_values=cache)
    again = second_turn(target, drafter, other, cache)
    assert torch.equal(again.sequences, fresh.sequences) and again.acceptance_lengths == fresh.acceptance_lengths
    assert recall("context", cache, drafter) is not None


def test_a_call_takes_what_it_changes():
    """What a turn is about to change is not left for another, and a drafter beside it leaves nothing stale."""
    drafter, other = tiny_drafter(), tiny_drafter(seed=4)
    target, output, ids = first_turn(drafter)
    cache = output.past_key_values
    assert recall("context", cache, drafter) is not None
    second = second_turn(target, other, ids, cache)
    assert recall("context", cache, drafter) is None and recall("context", cache, other) is not None
    with pytest.raises(KeyboardInterrupt):
        target.generate(
            torch.cat([second.sequences, prompt(3)], dim=1),
            past_key_values=cache,
            assistant_model=other,
            stopping_criteria=[Interrupt()],
            **GREEDY,
        )
    assert recall("context", cache, other) is None
