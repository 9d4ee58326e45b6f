"""What static calls leave for later ones: two sessions, found again where they fit, made where there is room."""

import gc
import weakref

import pytest
import torch

import hf_treeflash
from hf_treeflash.memory import recall
from hf_treeflash.static.round import StaticRound
from tests.helpers.batches import padded
from tests.helpers.tiny import prompt, tiny_target, with_knobs
from tests.static.calls import drafter_of, generate, plainly, sessions, the_session


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def test_forget_drops_what_a_drafter_keeps(target):
    drafter = with_knobs(drafter_of(), draft_lm_head="float8")
    generate(target, drafter)
    gone = [
        weakref.ref(tensor) for layer in the_session(drafter).round.target_cache.layers for tensor in (layer.keys,)
    ]
    assert recall("float8", target.lm_head) is not None
    hf_treeflash.forget(drafter)
    assert not sessions(drafter) and not any(tensor() is not None for tensor in gone)  # without the garbage collector
    assert recall("float8", target.lm_head) is not None
    hf_treeflash.forget(target)
    assert recall("float8", target.lm_head) is None
    assert torch.equal(generate(target, drafter).sequences, plainly(target))


def test_there_are_never_more_than_two(target, monkeypatch):
    """Also while a third is made: what has to go goes first."""
    alive: list[weakref.ref] = []
    made = StaticRound.__init__

    def counting(self, *args):
        others = sum(one() is not None for one in alive)
        assert others <= 1
        alive.append(weakref.ref(self))
        made(self, *args)

    monkeypatch.setattr(StaticRound, "__init__", counting)
    drafter = drafter_of()
    gc.disable()
    try:
        for settings in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 3}, {"max_cache_len": 2500}):
            generate(target, drafter, **settings)
            alive = [one for one in alive if one() is not None]
            assert len(alive) == len(sessions(drafter)) <= 2
    finally:
        gc.enable()
    assert the_session(drafter).round.capacity > 2048


def test_a_session_holds_no_model_between_calls(target):
    drafter = drafter_of()
    generate(target, drafter)
    held = [
        value for value in gc.get_referents(vars(the_session(drafter).round)) if isinstance(value, torch.nn.Module)
    ]
    assert not held
    views = [with_knobs(drafter_of(), tree_budget=8) for _ in range(2)]
    for view in views:
        generate(target, view)
    assert len(sessions(views[0])) == len(sessions(views[1])) == 1  # each drafter has its own


@pytest.mark.parametrize("inside", [True, False], ids=["inside first", "outside first"])
def test_calls_inside_and_outside_of_inference_mode_share_a_session(target, inside):
    drafter, found = drafter_of(), []
    for mode in (inside, not inside, inside):
        with torch.inference_mode(mode):
            static = generate(target, drafter, padded(2))
        assert torch.equal(static.sequences, plainly(target, padded(2)))
        found.append(the_session(drafter))
    assert found[0] is found[1] is found[2]


def test_a_drafter_whose_config_changed_is_not_mistaken(target):
    drafter = drafter_of(False)
    generate(target, drafter)
    before = the_session(drafter)
    drafter.config.block_size = 5
    static = generate(target, drafter)
    assert torch.equal(static.sequences, plainly(target)) and the_session(drafter) is not before
    assert max(static.acceptance_lengths[0]) <= 5


def test_under_autocast(target):
    drafter = drafter_of()
    generate(target, drafter)
    with torch.autocast("cpu", torch.bfloat16):
        static = generate(target, drafter)
        dynamic = generate(target, drafter, covered=False, cache_implementation=None)
    assert len(sessions(drafter)) == 2  # one of either kind
    assert static.sequences.shape == dynamic.sequences.shape
    assert torch.equal(generate(target, drafter).sequences, plainly(target))


def failing(monkeypatch, name: str, times: int, error=torch.OutOfMemoryError):
    """Let a method of rounds fail some times."""
    method, left = getattr(StaticRound, name), [times]

    def wrapped(self, *args):
        left[0] -= 1
        if left[0] >= 0:
            raise error("none left")
        return method(self, *args)

    monkeypatch.setattr(StaticRound, name, wrapped)


@pytest.mark.parametrize("where", ["__init__", "verify"])
def test_out_of_memory_is_tried_once_more_without_other_sessions(target, monkeypatch, warnings, where):
    drafter = drafter_of()
    generate(target, drafter)
    gone = weakref.ref(the_session(drafter))
    failing(monkeypatch, where, times=1)
    settings = {"do_sample": True, "top_k": 1}
    static = generate(target, drafter, **settings)
    assert torch.equal(static.sequences, plainly(target))
    assert gone() is None and len(sessions(drafter)) == 1
    assert not warnings  # it is not taken for something that does not compile


@pytest.mark.parametrize("where", ["__init__", "verify"])
def test_out_of_memory_is_told_where_there_is_nothing_to_drop(target, monkeypatch, warnings, where):
    drafter = drafter_of()
    failing(monkeypatch, where, times=2)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        generate(target, drafter)
    assert not warnings and not sessions(drafter)
    assert torch.equal(generate(target, drafter).sequences, plainly(target))


def test_a_round_that_was_under_way_is_not_repeated(target, monkeypatch):
    """Only the first of its kind has changed nothing yet."""
    drafter = drafter_of()
    generate(target, drafter)
    failing(monkeypatch, "verify", times=1)
    with pytest.raises(torch.OutOfMemoryError):
        generate(target, drafter, {"input_ids": prompt(9)})
    assert not sessions(drafter)
