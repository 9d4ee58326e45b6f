"""A pass over trees: what it leaves alone, which layers it takes, and that nobody else notices it."""

import copy
import sys
import threading
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from hf_treeflash.cache import PrefixCache, recording_past
from hf_treeflash.compat import CACHE
from hf_treeflash.recurrent import mixers, tree_pass
from hf_treeflash.tree import root_only
from hf_treeflash.verify import Verifier
from tests.families.checks import assert_same_cache
from tests.families.hybrids import HYBRIDS
from tests.families.passes import leaves, prefilled, step_logits, tree_logits, tree_of
from tests.helpers.pair_on_disk import letter_tokenizer
from tests.helpers.quoting import knows, quoting_drafter
from tests.recurrent.trees import shaped_tree

BY_NAME = {family.name: family for family in HYBRIDS}
KINDS = ["Qwen3.5", "Kimi-Linear", "Falcon-H1", "Jamba", "LFM2"]  # every walker, and a layer with states and columns
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}


def tensors_of(cache) -> list[torch.Tensor]:
    """Return copies of all a cache holds."""
    found = []
    for layer in cache.layers:
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += [getattr(layer, name, {0: None})[0] for name in ("conv_states", "recurrent_states")]
        found += [states.clone() for states in held if states is not None]
    return found


def a_tree(nodes: int):
    generator = torch.Generator().manual_seed(nodes)
    parents = torch.stack([shaped_tree("random", nodes, generator) for _ in range(2)])
    return tree_of(parents, torch.tensor([5, 6]), generator)


def mixers_within(target):
    return mixers.mixers_of(target)


@pytest.mark.parametrize("nodes", [1, 20])
@pytest.mark.parametrize("name", KINDS)
def test_a_pass_leaves_states_and_a_rollback_everything(name, nodes):
    target, inputs = BY_NAME[name].build(), BY_NAME[name].inputs(2)
    cache, positions = prefilled(target, inputs)
    before = tensors_of(cache)
    logits, prefix = tree_logits(target, cache, inputs["attention_mask"], positions, a_tree(nodes))
    for layer, own in zip(prefix.cache.layers, cache.layers, strict=True):
        if getattr(layer, "recurrent_states", {0: None})[0] is not None:
            assert torch.equal(layer.recurrent_states[0], own.recurrent_states[0])
    prefix.rollback()
    for mine, theirs in zip(tensors_of(prefix.cache), before, strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad(), recording_past(prefix.cache):  # nor is anything of the pass left for the next one
        again = Verifier(target)(a_tree(nodes), prefix, positions, {}).logits
    torch.testing.assert_close(again, logits)


@pytest.mark.parametrize("nodes", [1, 20])
@pytest.mark.parametrize("name", KINDS)
def test_a_pass_that_breaks_off_leaves_the_cache_as_it_was(name, nodes):
    target, inputs = BY_NAME[name].build(), BY_NAME[name].inputs(2)
    cache, positions = prefilled(target, inputs)
    prefix, before = PrefixCache(copy.deepcopy(cache), inputs["attention_mask"].bool()), tensors_of(cache)

    def fail(module, args, output):
        raise RuntimeError("broken off")

    handle = target.get_decoder().layers[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"), torch.no_grad(), recording_past(prefix.cache):
        Verifier(target)(a_tree(nodes), prefix, positions, {})
    handle.remove()
    prefix.rollback()
    assert "update_recurrent_state" not in vars(prefix.cache) and tree_pass._here.tree_pass is None
    for mine, theirs in zip(tensors_of(prefix.cache), before, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", KINDS)
def test_passes_of_bare_roots_are_plain_steps(name):
    target, inputs = BY_NAME[name].build(), BY_NAME[name].inputs(2)
    mask = inputs["attention_mask"]
    cache, positions = prefilled(target, inputs)
    chain = tree_of(torch.tensor([[-1, 0, 1, 2]] * 2), torch.tensor([5, 6]), torch.Generator().manual_seed(0))
    steps = [step_logits(target, cache, mask, positions, chain, row, [0, 1, 2, 3]) for row in range(2)]
    prefix, verifier = PrefixCache(copy.deepcopy(cache), mask.bool()), Verifier(target)
    for step in range(4):
        with torch.no_grad(), recording_past(prefix.cache):
            logits = verifier(root_only(chain.token_ids[:, step]), prefix, positions + step, {}).logits[:, 0]
        prefix.commit([[0], [0]], tail=1)
        torch.testing.assert_close(logits, torch.stack([own[step] for own in steps]), atol=1e-3, rtol=0)


def test_a_time_step_limit_that_bites_does_not_bite_here():
    """Plain decoding clamps no time step, only prompts are clamped; a node stands for a step of plain decoding."""
    family = BY_NAME["Bamba"]
    inputs, tree = family.inputs(2), a_tree(20)
    target = family.build(time_step_limit=(0.0, 0.05))
    cache, positions = prefilled(target, inputs)
    free_cache, _ = prefilled(family.build(), inputs)
    assert (tensors_of(cache)[1] - tensors_of(free_cache)[1]).abs().max() > 0.1, "the limit is to matter"
    logits, _ = tree_logits(target, cache, inputs["attention_mask"], positions, tree)
    path = leaves(tree.parents[0])[0]
    steps = step_logits(target, cache, inputs["attention_mask"], positions, tree, 0, path)
    torch.testing.assert_close(logits[0, path], steps, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["Qwen3.5", "Jamba"])
def test_two_threads_on_one_target(name):
    """One decodes plainly and one with trees, in turns of the interpreter; both write what they write alone."""
    family = BY_NAME[name]
    target, drafter = family.build(), quoting_drafter()
    inputs = [family.inputs(seed=seed) for seed in range(2)]
    alone = [target.generate(**each, **GREEDY) for each in inputs]
    knows(drafter, alone[1], inputs[1]["attention_mask"])
    texts = [[], []]

    def write(place: int, **drafting) -> None:
        texts[place] += [target.generate(**inputs[place], **GREEDY, **drafting) for _ in range(6)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=write, args=(0,)),
            threading.Thread(target=write, args=(1,), kwargs={"assistant_model": drafter}),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for mine, theirs in zip(texts, alone, strict=True):
        assert len(mine) == 6 and all(torch.equal(text, theirs) for text in mine)


@pytest.mark.parametrize("name", KINDS)
def test_plain_decoding_stays_bit_identical(name):
    """Before the functions are replaced, after, and after a call with trees."""
    family = BY_NAME[name]
    target, inputs = family.build(), family.inputs(2)
    modules = {sys.modules[type(mixer).__module__] for mixer in mixers_within(target)}
    for module in modules:
        for function in list(mixers.OVER_TREES):
            if hasattr(getattr(module, function, None), "_over_trees"):
                setattr(module, function, getattr(module, function).__wrapped__)

    def plainly() -> list[torch.Tensor]:
        output = target.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        return [*output.logits, *tensors_of(output.past_key_values)]

    before = plainly()
    drafter = quoting_drafter()
    target.generate(**inputs, **GREEDY, assistant_model=drafter)
    assert any(hasattr(getattr(module, name, None), "_over_trees") for module in modules for name in mixers.OVER_TREES)
    for mine, theirs in zip(plainly(), before, strict=True):
        assert torch.equal(mine, theirs)


def generate(target, name: str = "Qwen3.5"):
    return target.generate(**BY_NAME[name].inputs(), **GREEDY, assistant_model=quoting_drafter())


def test_a_layer_replaced_as_a_whole_is_refused():
    target = BY_NAME["Qwen3.5"].build()
    (mixer, *_) = mixers_within(target)
    mixer.forward = types.MethodType(lambda self, hidden_states, *args, **kwargs: hidden_states, mixer)
    with pytest.raises(ValueError, match=r"Layer 0 of Qwen3_5ForCausalLM.*as a whole.*use_kernels=False"):
        generate(target)


def test_hooks_of_accelerate_are_not_a_replacement():
    target = BY_NAME["Qwen3.5"].build()
    plain = target.generate(**BY_NAME["Qwen3.5"].inputs(), **GREEDY)
    for mixer in mixers_within(target):
        add_hook_to_module(mixer, ModelHook())
    assert torch.equal(generate(target), plain)


def test_remote_code_is_refused():
    target = BY_NAME["Qwen3.5"].build()
    (mixer, *_) = mixers_within(target)
    mixer.__class__ = type("GatedDeltaNet", (type(mixer),), {"__module__": "transformers_modules.somebody.modeling"})
    with pytest.raises(ValueError, match=r"Layer 0 of Qwen3_5ForCausalLM.*remote code \(GatedDeltaNet\)"):
        generate(target)


def test_a_layer_that_calls_something_else_is_refused(monkeypatch):
    target = BY_NAME["Qwen3.5"].build()
    (mixer, *_) = mixers_within(target)
    plain = type(mixer).forward
    monkeypatch.setattr(type(mixer), "forward", lambda self, *args, **kwargs: plain(self, *args, **kwargs))
    with pytest.raises(ValueError, match=r"Layer 0 of Qwen3_5ForCausalLM.*not known here"):
        generate(target)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("Qwen3.5", "torch_chunk_gated_delta_rule"),
        ("Qwen3.5", "causal_conv1d_fn"),
        ("LFM2", "causal_conv1d_fn"),  # nothing else of such a layer would notice
    ],
)
def test_a_function_replaced_behind_our_back_is_found_out_before_a_state_is_written(monkeypatch, name, function):
    family = BY_NAME[name]
    target, inputs = family.build(), family.inputs(2)
    cache, positions = prefilled(target, inputs)
    prefix, before = PrefixCache(copy.deepcopy(cache), inputs["attention_mask"].bool()), tensors_of(cache)
    verifier = Verifier(target)
    module = sys.modules[type(mixers_within(target)[0]).__module__]
    monkeypatch.setattr(module, function, getattr(module, function).__wrapped__)
    with pytest.raises(ValueError, match="did not run over the tree"), torch.no_grad(), recording_past(prefix.cache):
        verifier(a_tree(20), prefix, positions, {})
    prefix.rollback()
    for mine, theirs in zip(tensors_of(prefix.cache), before, strict=True):
        assert torch.equal(mine, theirs)


def test_jamba_cannot_go_on_from_a_cache():
    family = BY_NAME["Jamba"]
    target, inputs = family.build(), family.inputs()
    before = target.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    states = tensors_of(before.past_key_values)
    with pytest.raises(ValueError, match=r"JambaForCausalLM cannot go on from a cache.*Leave the cache out"):
        target.generate(
            torch.cat([before.sequences, before.sequences[:, :4]], dim=1),
            past_key_values=before.past_key_values, assistant_model=quoting_drafter(), **GREEDY,
        )  # fmt: skip
    for mine, theirs in zip(tensors_of(before.past_key_values), states, strict=True):
        assert torch.equal(mine, theirs)


def test_a_batch_that_ends_together_gives_plain_decodings_cache_back():
    """A row that is ahead when all end would have to be cut back; as its state cannot be, no row goes ahead."""
    family = BY_NAME["Qwen3.5"]
    target, inputs = family.build(), family.inputs(3)

    settings = {**GREEDY, "stop_strings": ["b", "f"], "tokenizer": letter_tokenizer(), "return_dict_in_generate": True}
    plain = target.generate(**inputs, **settings)
    drafter = quoting_drafter()
    knows(drafter, plain.sequences, inputs["attention_mask"])
    tree = target.generate(**inputs, **settings, assistant_model=drafter)
    assert torch.equal(tree.sequences, plain.sequences)
    assert_same_cache(tree[CACHE], plain[CACHE], inputs["attention_mask"])
