"""Where the time of a round goes: its stages, in milliseconds, with timers wrapped around them from outside.

A stage's time is its own: what it calls and is listed too is not counted twice. The stages of a round add up to it.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from .. import ar_head, candidate_generator, decoding, draft_head, modeling_treeflash, noise, transitions
from .arms import Arm
from .measuring import Stopwatch, host_milliseconds

PLAIN_REPEATS = 3
# What the models themselves compute; the rest of a round is the price of the method's bookkeeping.
MODELS = ("drafter forward", "AR head", "lm_head, shortlist", "lm_head, candidates", "target forward")


@contextmanager
def stages_timed(target, drafter, watch: Stopwatch) -> Iterator[None]:
    """Wrap what a round is made of."""
    loop, generator = decoding.TreeDecoding, candidate_generator.TreeFlashCandidateGenerator
    places = [
        (loop, "verify", "tree mask and inputs"),
        (loop, "walk", "walk"),
        (loop, "commit", "commit"),
        (loop, "draw_noise", "noise of the draws"),
        (noise.Noise, "ahead", "noise of the draws"),
        (noise.Noise, "use", "noise of the draws"),
        (generator, "draft_tree", "context cache"),
        (candidate_generator, "build_tree", "tree build"),
        (modeling_treeflash, "top_log_probs", "top-k and log-sum-exp"),
        (transitions.Transitions, "conditional", "match candidates"),
        (transitions.HeadRows, "compute", "match candidates"),
        (drafter, "draft", "noise, shortlist top-k"),
        (drafter, "backbone", "drafter forward"),
        (target, "forward", "target forward"),
        (ar_head, "top_log_probs", "top-k and log-sum-exp"),
    ]
    if drafter.ar_head is not None:
        places.append((drafter.ar_head, "states" if drafter.config.ar_head == "swiglu" else "code", "AR head"))
    head = draft_head.DraftHead
    prefill, draft, lm_head = loop.prefill, loop.draft, head.__call__
    heads: list[str] = []

    def outside_rounds(self, taps):
        watch.current = defaultdict(float)
        return prefill(self, taps)

    def new_round(self, state):
        watch.new_round()
        heads[:] = [MODELS[3], MODELS[2]] if drafter.ar_head is not None else [MODELS[2]]
        with watch.stage("loop"):
            return draft(self, state)

    def timed_lm_head(self, *args):
        with watch.stage(heads.pop() if len(heads) > 1 else heads[0]):  # rows come in several calls
            return lm_head(self, *args)

    with ExitStack() as stack:
        for owner, name, label in places:
            stack.enter_context(mock.patch.object(owner, name, watch.around(getattr(owner, name), label)))
        stack.enter_context(mock.patch.object(loop, "prefill", outside_rounds))
        stack.enter_context(mock.patch.object(loop, "draft", new_round))
        stack.enter_context(mock.patch.object(head, "__call__", timed_lm_head))
        yield


def round_stages(
    target, drafter, prompts: Sequence[torch.Tensor], max_new_tokens: int, temperature: float = 0.0
) -> dict[str, Any]:
    """Decode and return the median of every stage over all rounds, and the share outside the models."""
    watch = Stopwatch(target.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

    def decode(prompt: torch.Tensor):
        prompt = prompt.to(target.device)
        mask = torch.ones_like(prompt)
        target.generate(
            prompt, attention_mask=mask, assistant_model=drafter, max_new_tokens=max_new_tokens, **sampling
        )

    decode(prompts[0])  # warm-up
    with stages_timed(target, drafter, watch):
        for prompt in prompts:
            decode(prompt)
    totals = [sum(stages.values()) for stages in watch.rounds]
    names = sorted({name for stages in watch.rounds for name in stages}, key=lambda name: (name not in MODELS, name))
    medians = {name: statistics.median(stages[name] for stages in watch.rounds) for name in names}
    outside = sum(median for name, median in medians.items() if name not in MODELS)
    return {
        "rounds": len(totals),
        "round_ms": statistics.median(totals),
        "stages_ms": medians,
        "temperature": temperature,
        # Of the medians: an interruption of one stage by another process is not the method's.
        "share_outside_models": outside / sum(medians.values()),
        "knobs": {name: getattr(drafter.generation_config, name) for name in ("tree_budget", "num_candidates")},
    }


def stages_of_arms(target, arms: Sequence[Arm], prompts: Sequence[torch.Tensor], max_new_tokens: int) -> dict:
    """Return the milliseconds of each stage for every tree over dynamic caches, and of a plain step beside them.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        arms (`Sequence[Arm]`):
            Of which those that draft trees of one size are measured.
        prompts (`Sequence[torch.LongTensor]` of shape `(1, length)`):
            Prompts, decoded greedily one by one.
        max_new_tokens (`int`):
            Tokens per prompt.
    """
    prompt = prompts[0].to(target.device)
    exactly = {"min_new_tokens": max_new_tokens, "max_new_tokens": max_new_tokens, "do_sample": False}

    def plain() -> None:
        target.generate(prompt, attention_mask=torch.ones_like(prompt), **exactly)

    times = [host_milliseconds(plain, target.device) / max_new_tokens for _ in range(PLAIN_REPEATS)]
    stages = {"plain step": {"target forward": statistics.median(times)}}
    for arm in arms:
        if arm.is_ours and not arm.is_static and arm.knobs["tree_budget"] != "auto":
            stages[arm.name] = round_stages(target, arm.drafter, prompts, max_new_tokens)["stages_ms"]
    return stages


__all__ = ["MODELS", "round_stages", "stages_of_arms", "stages_timed"]
