"""What a launcher does when compiling, recording or the kernel fails: the text goes on, and what failed is told."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig

from hf_treeflash import kernels
from hf_treeflash.kernels import attention_interface
from hf_treeflash.static.round import StaticRound
from tests.helpers.tiny import tiny_target
from tests.static.calls import drafter_of, generate, plainly, the_session


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def test_what_cannot_be_compiled_runs_as_it_is(target, warnings):
    def backend(graph, inputs):
        raise LookupError("no such processor")

    torch._dynamo.reset()
    drafter, config = drafter_of(), CompileConfig(backend=backend)
    static = generate(target, drafter, compile_config=config)
    assert torch.equal(static.sequences, plainly(target))
    (told,) = warnings
    assert "no such processor" in told and "the text is the same" in told


def test_a_recording_that_breaks_off(target, monkeypatch, warnings):
    """The text goes on plainly, on the stream it was on, and what went wrong can be asked."""
    text, warming, recording = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(3))
    current = text

    @contextmanager
    def stream(other):
        nonlocal current
        before, current = current, other
        try:
            yield
        finally:
            current = before

    @contextmanager
    def graph(graph, **options):
        nonlocal current
        current, round.run = recording, lambda span: None  # what is called while recording does not run
        yield
        del round.run
        raise RuntimeError("operation not permitted when stream is capturing")  # and the stream stays

    fakes = {"CUDAGraph": object, "graph": graph, "stream": stream, "current_stream": lambda: current}
    for name, fake in {**fakes, "Stream": lambda: warming}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    drafter = drafter_of(False, 33)
    generate(target, drafter)
    launcher = the_session(drafter)
    round = launcher.round
    launcher.compiled, launcher.steps_compiled, launcher.graphs, launcher.seen = True, True, {}, set()
    assert torch.equal(generate(target, drafter).sequences, plainly(target))
    assert the_session(drafter) is launcher and launcher.graphs is None and not launcher.compiled
    assert "stream is capturing" in launcher.failure and current is text
    (told,) = warnings
    assert launcher.failure in told


@pytest.mark.parametrize("kernel_fails", [False, True])
def test_compilation_is_given_up_before_the_kernel(kernel_fails, monkeypatch, warnings):
    working, tried = attention_interface.tree_attention, []

    def backend(graph, inputs):
        tried.append(graph)
        raise LookupError("no such processor")

    def attention(query, *rest):
        if kernel_fails and tried:
            raise RuntimeError("no kernel image")
        return working(query, *rest)

    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "use_triton", lambda tensor: True)
    monkeypatch.setattr(attention_interface, "tree_attention", attention)
    target, drafter = tiny_target(head_dim=16), drafter_of(head_dim=16)
    text = generate(target, drafter, compile_config=CompileConfig(backend=backend)).sequences
    assert torch.equal(text, plainly(target))
    launcher = the_session(drafter)
    assert not launcher.compiled and launcher.round.by_kernel == (not kernel_fails)
    assert len(warnings) == 1 + kernel_fails and "no such processor" in warnings[0] and "uncompiled" in warnings[0]
    assert not kernel_fails or "no kernel image" in launcher.failure


def test_a_round_that_gives_no_token_ends_the_call(target, monkeypatch):
    """A recording that lost its work would otherwise be replayed for ever."""
    run = StaticRound.run

    def lost(round, span):
        if round.lengths.max() < 12:
            return run(round, span)
        round.emitted.zero_()

    monkeypatch.setattr(StaticRound, "run", lost)
    with pytest.raises(RuntimeError, match="disable_compile=True"):
        generate(target, drafter_of())
    monkeypatch.setattr(StaticRound, "run", run)
    drafter = drafter_of()
    assert torch.equal(generate(target, drafter).sequences, plainly(target))
