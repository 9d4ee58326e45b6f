"""The round itself: no host synchronisation, caches of a plain forward, attention by kernel or mask, compilation."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache

from hf_treeflash import kernels
from hf_treeflash.static import decoding
from tests.families.checks import ending_at
from tests.helpers.batches import padded
from tests.helpers.tiny import prompt, tiny_target
from tests.static.calls import drafter_of, generate, plainly, running, sessions, the_session


@pytest.fixture(scope="module")
def target():
    return tiny_target()


class NoSynchronisation(TorchDispatchMode):
    """Fails on operators that make the host wait for a value."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.WAITING), name
        if name in ("index", "index_put", "index_put_"):  # by a mask means by the places where it is true
            assert not any(getattr(index, "dtype", None) == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_sliding"])
@pytest.mark.parametrize("sampler", [None, {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9}], ids=str)
def test_a_round_never_waits_for_the_device(family, sampler, monkeypatch):
    target, drafter = tiny_target(family), drafter_of()
    generate(target, drafter, padded(2), **({} if sampler is None else {"do_sample": True, **sampler}))
    round = running(target, drafter)
    round.active.fill_(True)
    for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, None)  # on a CPU some of these pass by the dispatcher
    before = round.lengths.clone()
    with NoSynchronisation():
        round.run(256)
    monkeypatch.undo()
    assert (round.lengths > before).all()


def test_caches_after_commits_equal_a_plain_forwards(target):
    inputs, drafter = padded(3), drafter_of(False, 33)
    static = generate(target, drafter, inputs)
    assert static.block_efficiency > 1.1
    round = the_session(drafter).round
    for row, own in enumerate(inputs["attention_mask"].bool()):
        start, length = int((~own).sum()), int(round.lengths[row])
        # The newest token of a text has no state yet; a path may have gone on behind the end of the text.
        length = min(length, static.sequences.shape[1] - 1)
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            target(static.sequences[row : row + 1, start:length], past_key_values=cache)
        for mine, plain in zip(round.target_cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                states = getattr(mine, name)[row, :, start:length]
                torch.testing.assert_close(states, getattr(plain, name)[0], atol=1e-4, rtol=1e-4)


def test_no_two_states_of_a_pass_go_to_one_slot(target):
    """Which of them stayed would be up to the device."""
    drafter = drafter_of()
    generate(target, drafter, padded(3))
    round = the_session(drafter).round
    for cache in (round.drafter_cache, round.target_cache):
        for slots in cache.layers[0].slots.tolist():
            assert len(set(slots)) == len(slots) and max(slots) < round.capacity
    context, block = round.drafter_cache.layers[0].slots.split(round.block, dim=1)
    assert (context.amax(dim=1) > block.amax(dim=1)).any()  # there was filler, or the test shows nothing


def test_many_suppressed_tokens_are_looked_up_once(target):
    """`isin` of many tokens waits for the device, which a recorded round cannot."""
    drafter, settings = drafter_of(), {"suppress_tokens": [*range(4, 20), 1]}
    static = generate(target, drafter, padded(2), **settings)
    assert torch.equal(static.sequences, plainly(target, padded(2), **settings))
    (suppressed,) = the_session(drafter).round.processors
    suppressed.processor = None
    again = generate(target, drafter, padded(2, seed=4), **settings)
    assert torch.equal(again.sequences, plainly(target, padded(2, seed=4), **settings))


@pytest.mark.parametrize("windows", [False, True], ids=["full", "windows"])
def test_the_drafters_attention_by_kernel_is_that_by_masks(target, monkeypatch, windows):
    """Which drafts are accepted tells what the drafter saw; windows reach to both sides, which stays with masks."""
    config = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]} if windows else {}
    by_masks, by_kernel = drafter_of(head_dim=16, **config), drafter_of(head_dim=16, **config)
    expected = generate(target, by_masks, padded(3), max_new_tokens=60)
    monkeypatch.setattr(kernels, "use_triton", lambda tensor: True)
    output = generate(target, by_kernel, padded(3), max_new_tokens=60)
    assert the_session(by_kernel).round.block_attention.by_kernel == (not windows)
    assert output.acceptance_lengths == expected.acceptance_lengths
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_sliding"])
def test_tree_attention_in_place_of_masks(family, monkeypatch):
    """What runs on CUDA, by the kernel's oracle."""
    monkeypatch.setattr(kernels, "use_triton", lambda tensor: True)
    target, drafter = tiny_target(family, head_dim=16), drafter_of(head_dim=16)
    static = generate(target, drafter, padded(3))
    launcher = the_session(drafter)
    assert launcher.round.attention.by_kernel and launcher.round.block_attention.by_kernel
    assert launcher.seen == {256 if family == "qwen3_sliding" else launcher.round.capacity}
    assert static.block_efficiency > 1.05  # the block saw its context, or hardly a draft would be accepted
    assert torch.equal(static.sequences, plainly(target, padded(3)))
    assert target.config._attn_implementation == "sdpa"


def test_a_layer_that_tree_attention_does_not_know_takes_masks(monkeypatch, warnings):
    monkeypatch.setattr(kernels, "use_triton", lambda tensor: True)

    def refuse(*args):
        raise NotImplementedError("not this one")

    monkeypatch.setattr("hf_treeflash.kernels.attention_interface._refuse_unknown", refuse)
    target, drafter = tiny_target(head_dim=16), drafter_of()
    assert torch.equal(generate(target, drafter).sequences, plainly(target))
    assert not the_session(drafter).round.attention.by_kernel
    (told,) = warnings
    assert "not this one" in told and target.config._attn_implementation == "sdpa"


def test_compiles_both_models_with_the_calls_settings(target):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    drafter, config = drafter_of(budget=8), CompileConfig(backend=backend, fullgraph=True)
    static = generate(target, drafter, padded(2), compile_config=config)
    assert torch.equal(static.sequences, plainly(target, padded(2)))
    assert the_session(drafter).compiled
    assert len(graphs) == 5  # both models, and what is around them, once for all rounds
    again = generate(target, drafter, padded(2, seed=4), compile_config=config)
    assert torch.equal(again.sequences, plainly(target, padded(2, seed=4)))
    assert len(graphs) == 5
    generate(target, drafter, padded(2), compile_config=config, disable_compile=True)
    assert not the_session(drafter).compiled and len(graphs) == 5


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
def test_rounds_launched_before_the_last_is_read(target, monkeypatch, settings):
    """As on CUDA: rows may stand still for a round, and noise must last."""
    monkeypatch.setattr(decoding, "rounds_ahead", lambda tensor: 1)
    drafter, settings = drafter_of(False, 33), {**settings, "max_new_tokens": 60}
    torch.manual_seed(0)
    plain = plainly(target, **settings)
    torch.manual_seed(0)
    static = generate(target, drafter, **settings)
    assert torch.equal(static.sequences, plain)
    assert sum(static.acceptance_lengths[0]) == 59 and min(static.acceptance_lengths[0]) > 0
    if not settings.get("do_sample"):
        eos = ending_at(target, padded(4), [3, 20])
        batch = generate(target, drafter, padded(4), **settings, eos_token_id=eos)
        assert torch.equal(batch.sequences, plainly(target, padded(4), **settings, eos_token_id=eos))


def test_recording_in_the_middle_of_a_text_changes_nothing(target, monkeypatch):
    """A stand-in for CUDA graphs: what is called while recording does not run, and runs at each replay."""

    class Graph:
        def replay(self):
            self.recorded()

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads may use the device meanwhile
        run = round.run
        round.run = lambda span: setattr(graph, "recorded", lambda: run(span))
        yield
        del round.run

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream, "current_stream": lambda: stream}
    for name, fake in {**fakes, "stream": lambda stream: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    drafter, settings = drafter_of(False, 33), {"max_new_tokens": 250}
    generate(target, drafter, padded(2), **settings)
    launcher = the_session(drafter)
    round = launcher.round
    launcher.compiled, launcher.steps_compiled, launcher.graphs, launcher.seen = True, True, {}, set()
    for seed in (3, 4):
        static = generate(target, drafter, padded(2, seed=seed), **settings)
        assert torch.equal(static.sequences, plainly(target, padded(2, seed=seed), **settings))
        assert the_session(drafter) is launcher and set(launcher.graphs) == {256, 512}


def test_the_next_call_finds_what_the_last_one_made(target):
    drafter = drafter_of()
    generate(target, drafter)
    first = the_session(drafter)
    for inputs in (None, {"input_ids": prompt(12, seed=9)}):
        assert torch.equal(generate(target, drafter, inputs).sequences, plainly(target, inputs))
        assert the_session(drafter) is first
    longer = {"max_new_tokens": 300}
    assert torch.equal(generate(target, drafter, **longer).sequences, plainly(target, **longer))
    assert the_session(drafter) is first and first.seen == {256, 512}
    assert torch.equal(generate(target, drafter, max_cache_len=3000).sequences, plainly(target))
    assert the_session(drafter) is not first and the_session(drafter).round.capacity == 3072
    for settings in ({"do_sample": True}, {"do_sample": True, "top_k": 3}):
        generate(target, drafter, **settings)
    assert len(sessions(drafter)) == 2


def test_an_other_target_or_weight_is_not_mistaken(target):
    drafter, other = drafter_of(), tiny_target(seed=7)
    for model in (target, other, target):
        assert torch.equal(generate(model, drafter).sequences, plainly(model))
    generate(other, drafter)
    before = the_session(drafter)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.flip(0))
    assert torch.equal(generate(other, drafter).sequences, plainly(other))
    assert the_session(drafter) is not before  # a recorded graph would read the weights that were


def test_a_call_that_breaks_off_leaves_nothing_behind(target):
    def break_off(input_ids, scores, **kwargs):
        if input_ids.shape[1] > 12:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    drafter = drafter_of()
    generate(target, drafter)
    hooks = [dict(module._forward_hooks) for module in target.modules()]  # transformers' own, inert by themselves
    with pytest.raises(KeyboardInterrupt):
        generate(target, drafter, stopping_criteria=[break_off])
    assert not sessions(drafter)
    assert hooks == [dict(module._forward_hooks) for module in target.modules()]
    assert torch.equal(generate(target, drafter).sequences, plainly(target))
