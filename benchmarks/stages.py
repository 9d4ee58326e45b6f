"""Split the rounds of tree decoding into stages, in milliseconds, with timers wrapped around them from outside.

    python benchmarks/stages.py --target FOLDER --drafter FOLDER --prompts prompts.json --json stages.json

A stage's time is its own: what it calls and is listed too is not counted twice. The stages of a round add up to it.
"""

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from transformers.utils import logging

from hf_treeflash import candidate_generator, generation, modeling_treeflash
from hf_treeflash.benchmark import environment
from hf_treeflash.pairs import describe_pair, encode_prompt, load_pair

# What the models themselves compute; the rest of a round is the price of the method's bookkeeping.
MODELS = ("drafter forward", "AR head", "lm_head, shortlist", "lm_head, candidates", "target forward")


class Stopwatch:
    """Adds up the own time of nested stages, round by round."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rounds: list[dict[str, float]] = []
        self.current: dict[str, float] = defaultdict(float)  # the round that is running, or a prompt's pass
        self.running: list[list[float]] = []  # of each open stage: the time inside the stages it called

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of what is running."""
        start = self._now()
        self.running.append([0.0])
        try:
            yield
        finally:
            total = self._now() - start
            own = total - self.running.pop()[0]
            if self.running:
                self.running[-1][0] += total
            self.current[name] += own

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    def around(self, function, name: str):
        """Return a function that runs another as a stage."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


@contextmanager
def stages_timed(target, drafter, watch: Stopwatch) -> Iterator[None]:
    """Wrap what a round is made of."""
    loop, generator = generation.TreeDecoding, candidate_generator.TreeFlashCandidateGenerator
    places = [
        (loop, "verify", "tree mask and inputs"),
        (loop, "walk", "walk"),
        (loop, "commit", "commit"),
        (generator, "draft_tree", "context cache"),
        (candidate_generator, "build_tree", "tree build"),
        (modeling_treeflash, "top_log_probs", "top-k and log-sum-exp"),
        (modeling_treeflash, "conditional_transitions", "match candidates"),
        (drafter, "draft", "noise, shortlist top-k"),
        (drafter, "backbone", "drafter forward"),
        (drafter, "correct", "AR head"),
        (target, "forward", "target forward"),
    ]
    prefill, draft, lm_head = loop.prefill, loop.draft, generator._lm_head
    heads = []

    def outside_rounds(self):
        watch.current = defaultdict(float)
        return prefill(self)

    def new_round(self):
        watch.current = defaultdict(float)
        watch.rounds.append(watch.current)
        heads[:] = [MODELS[3], MODELS[2]] if drafter.ar_head is not None else [MODELS[2]]
        with watch.stage("loop"):
            return draft(self)

    def timed_lm_head(self, states):
        with watch.stage(heads.pop()):
            return lm_head(self, states)

    with ExitStack() as stack:
        for owner, name, label in places:
            stack.enter_context(mock.patch.object(owner, name, watch.around(getattr(owner, name), label)))
        stack.enter_context(mock.patch.object(loop, "prefill", outside_rounds))
        stack.enter_context(mock.patch.object(loop, "draft", new_round))
        stack.enter_context(mock.patch.object(generator, "_lm_head", timed_lm_head))
        yield


def measure(target, drafter, prompts: list[torch.Tensor], max_new_tokens: int) -> dict:
    """Decode greedily and return the median of every stage over all rounds, and the share outside the models."""
    watch = Stopwatch(target.device)

    def decode(prompt: torch.Tensor):
        prompt = prompt.to(target.device)
        mask = torch.ones_like(prompt)
        target.generate(
            prompt, attention_mask=mask, assistant_model=drafter, max_new_tokens=max_new_tokens, do_sample=False
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
        # Of the medians: an interruption of one stage by another process is not the method's.
        "share_outside_models": outside / sum(medians.values()),
        "knobs": {name: getattr(drafter.generation_config, name) for name in ("tree_budget", "num_candidates")},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help='JSON list of {"prompt": ...}')
    parser.add_argument("--limit", type=int, default=4, help="prompts to use")
    parser.add_argument("--tree-budget", type=int)
    parser.add_argument("--num-candidates", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
    for knob in ("tree_budget", "num_candidates"):
        if getattr(args, knob) is not None:
            setattr(drafter.generation_config, knob, getattr(args, knob))
    listed = json.loads(args.prompts.read_text(encoding="utf-8"))[: args.limit]
    prompts = [encode_prompt(tokenizer, entry["prompt"]) for entry in listed]
    result = measure(target, drafter, prompts, args.max_new_tokens)
    for name, median in result["stages_ms"].items():
        if not median:
            continue  # a drafter without a head
        print(f"{name:24} {median:8.3f} ms {median / result['round_ms']:7.1%}{'  model' if name in MODELS else ''}")
    print(f"{'round (median of sums)':24} {result['round_ms']:8.3f} ms, {result['rounds']} rounds, {result['knobs']}")
    print(f"outside the models' forwards: {result['share_outside_models']:.1%} of a round (of the stages' medians)")
    if args.json:
        record = {**describe_pair(target, tokenizer, drafter), "environment": environment(target), **result}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
