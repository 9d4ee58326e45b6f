"""Calls of the static path, and what they are compared with."""

import torch

from hf_treeflash import TreeFlashCandidateGenerator, memory
from tests.helpers.tiny import prompt, tiny_drafter, with_knobs

GREEDY = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None}


def drafter_of(head: bool = True, budget: int = 24, **overrides):
    """Return a drafter that fits every tiny target."""
    return with_knobs(tiny_drafter(head, num_target_layers=None, **overrides), tree_budget=budget)


def generate(target, drafter, inputs=None, covered: bool = True, **settings):
    """Generate with static caches; a dictionary output tells whether they were used."""
    inputs = {"input_ids": prompt()} if inputs is None else inputs
    settings = {**GREEDY, "cache_implementation": "static", "return_dict_in_generate": True, **settings}
    output = target.generate(**inputs, assistant_model=drafter, **settings)
    assert (output.past_key_values is None) == covered
    return output


def plainly(target, inputs=None, **settings) -> torch.Tensor:
    inputs = {"input_ids": prompt()} if inputs is None else inputs
    return target.generate(**inputs, **{**GREEDY, **settings})


def sessions(drafter) -> list:
    """Return the launchers that a drafter's calls left, the last one last."""
    kept = [
        value for (what, owner, *_), (value, _) in memory._kept.items() if (what, owner) == ("sessions", id(drafter))
    ]
    return [launcher for launchers in kept for launcher in launchers.values()]


def the_session(drafter):
    """Return the launcher of the last call."""
    return sessions(drafter)[-1]


def running(target, drafter):
    """Return the round of the last call with its models back, to be run outside of a call; it is no longer kept."""
    round = the_session(drafter).round
    memory.forget(drafter, "sessions")
    round.hold(
        target, TreeFlashCandidateGenerator(drafter, target.get_input_embeddings(), target.get_output_embeddings())
    )
    return round
