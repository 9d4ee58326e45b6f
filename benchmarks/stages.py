"""Split the rounds of tree decoding into stages, in milliseconds, with timers wrapped around them from outside.

    python benchmarks/stages.py --target FOLDER --drafter FOLDER --prompts prompts.json --json stages.json
    python benchmarks/stages.py --shape smollm2 --draft-vocabulary 8192 --tree-budget 16 --num-candidates 8

With a shape, weights and prompt are random: what a round costs is measured, and τ means nothing. Whole rounds are
compared with plain steps, eager and compiled, in turn and without the timers.

A stage's time is its own: what it calls and is listed too is not counted twice. The stages of a round add up to it.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from shapes import SHAPES, pass_ms, prepare
from transformers.utils import logging

from hf_treeflash.bench.arms import plain_compiled
from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.measuring import in_turn, spread
from hf_treeflash.bench.stages import MODELS, round_stages


def against_plain(target, drafter, prompt: torch.Tensor, max_new_tokens: int, repeats: int, compiles: bool) -> dict:
    """Time rounds and plain steps in turn; return milliseconds of each, and plain steps per round."""
    ways = {"plain": (None, {}), "round": (drafter, {})}
    if compiles:
        ways["plain, compiled"] = None, plain_compiled().options
    timers = {
        name: partial(pass_ms, target, model, prompt.to(target.device), max_new_tokens, **way)
        for name, (model, way) in ways.items()
    }
    for timer in timers.values():
        timer()  # warm-up, and what is compiled
    times = in_turn(timers, repeats)
    plain = {name: values for name, values in times.items() if name != "round"}
    return {
        "ms": {name: spread(values) for name, values in times.items()},
        "plain_steps_per_round": {
            name: spread([own / step for own, step in zip(times["round"], values, strict=True)])
            for name, values in plain.items()
        },
    }


def show(result: dict) -> None:
    """Print the stages, and rounds beside plain steps."""
    for name, median in result["stages_ms"].items():
        if not median:
            continue  # a drafter without a head
        print(f"{name:24} {median:8.3f} ms {median / result['round_ms']:7.1%}{'  model' if name in MODELS else ''}")
    print(f"{'round (median of sums)':24} {result['round_ms']:8.3f} ms, {result['rounds']} rounds, {result['knobs']}")
    print(f"outside the models' forwards: {result['share_outside_models']:.1%} of a round (of the stages' medians)")
    for name, ms in result["ms"].items():
        steps = result["plain_steps_per_round"].get(name)
        per_round = f", {steps['median']:.2f} per round ({steps['min']:.2f} to {steps['max']:.2f})" if steps else ""
        print(f"{name:24} {ms['median']:8.3f} ms ({ms['min']:.3f} to {ms['max']:.3f}){per_round}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, instead of a pair")
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt, with a shape")
    parser.add_argument("--draft-vocabulary", type=int, help="draft so many tokens only, with a shape")
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    parser.add_argument("--prompts", type=Path, help='JSON list of {"prompt": ...}')
    parser.add_argument("--limit", type=int, default=4, help="prompts to use")
    parser.add_argument("--tree-budget", type=int)
    parser.add_argument("--num-candidates", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--repeats", type=int, default=7, help="of whole rounds and plain steps in turn")
    parser.add_argument("--eager", action="store_true", help="leave out compiled plain steps, which take minutes")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.shape is None and None in (args.target, args.drafter, args.prompts):
        parser.error("give --shape, or --target, --drafter and --prompts")
    logging.disable_progress_bar()
    target, drafter, prompts, described = prepare(args)
    for knob in ("tree_budget", "num_candidates"):
        if getattr(args, knob) is not None:
            setattr(drafter.generation_config, knob, getattr(args, knob))
    result = round_stages(target, drafter, prompts, args.max_new_tokens, args.temperature)
    result |= against_plain(target, drafter, prompts[0], args.max_new_tokens, args.repeats, not args.eager)
    show(result)
    if args.json:
        record = {**described, "environment": environment(target), **result}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
