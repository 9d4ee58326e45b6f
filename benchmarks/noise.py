"""Tokens per target pass when drafts know the noise of the draws, and when they rank tokens by probability alone.

    python benchmarks/noise.py --target FOLDER --drafter FOLDER --prompts prompts.json --json noise.json

All prompts are one batch, so that a seed costs one call per way: every row has draws of its own and goes at its own
pace. All ways write the same texts, which are compared with plain sampling's. τ is a count: the machine need not be
quiet. The file is written after every call, and a run goes on where an earlier one stopped.
"""

import argparse
import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from approximations import prompts_in
from end_to_end import unknown_draws
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.pairs import describe_pair, load_pair, with_knobs
from hf_treeflash.draft_head import DraftHead
from hf_treeflash.training.responses import left_padded

RANKINGS: dict[str, Callable] = {"known": nullcontext, "unknown": unknown_draws}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help="as for approximations.py")
    parser.add_argument("--limit", type=int, help="prompts to use, all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(12)))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="0: greedy")
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0])
    parser.add_argument("--top-k", type=int, nargs="+", default=[0], help="0: all tokens")
    parser.add_argument("--tree-budgets", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--num-candidates", type=int, default=16, help="and branching")
    parser.add_argument("--draft-temperatures", type=float, nargs="+", help="the drafter's own by default")
    parser.add_argument("--draws", nargs="+", choices=["known", "unknown"], default=["known", "unknown"])
    parser.add_argument("--penalties", type=float, nargs="+", default=[], help="nats for what the call would cut")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, help="write the counts there")
    return parser.parse_args(argv)


@contextmanager
def penalised(temperature: float, top_p: float, top_k: int, nats: float) -> Iterator[None]:
    """Rank what the call's warpers would cut from the draft's own distribution lower by so many nats."""
    warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    head = DraftHead.__call__

    def call(self, *args) -> torch.Tensor:
        logits = head(self, *args)
        warped = warpers(None, logits.flatten(0, -2).float()).view(logits.shape)
        return logits - nats * temperature * (warped == -torch.inf)

    with mock.patch.object(DraftHead, "__call__", call):
        yield


def ways(
    setting: dict[str, Any], draws: list[str], penalties: list[float]
) -> dict[str, Callable[[], AbstractContextManager]]:
    """Return the ways to rank that are compared at a setting, by name."""
    if not setting["temperature"]:
        return {"greedy": nullcontext}
    found: dict[str, Callable] = {name: around for name, around in RANKINGS.items() if name in draws}
    if setting["top_p"] < 1 or setting["top_k"]:
        cuts = {name: setting[name] for name in ("temperature", "top_p", "top_k")}
        found |= {f"known, {nats:g} nats": functools.partial(penalised, **cuts, nats=nats) for nats in penalties}
    return found


def sampling(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    """Return the arguments of `generate` for a setting; texts have their full length."""
    if not temperature:
        return {"do_sample": False, "eos_token_id": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k, "eos_token_id": None}


class Pair:
    """A target and its drafter, the prompts, and the plain texts that others are compared with."""

    def __init__(self, target, drafter, prompts: list[torch.Tensor], max_new_tokens: int):
        self.target, self.drafter, self.max_new_tokens = target, drafter, max_new_tokens
        self.inputs = left_padded([prompt[0].tolist() for prompt in prompts], 0, target.device)
        self.plain: dict[tuple, torch.Tensor] = {}

    def write(self, seed: int, drafter=None, **settings):
        """Continue all prompts."""
        torch.manual_seed(seed)
        settings |= {"max_new_tokens": self.max_new_tokens, "return_dict_in_generate": True, "pad_token_id": 0}
        return self.target.generate(**self.inputs, assistant_model=drafter, **settings)

    def count(self, seed: int, setting: dict[str, Any], around: Callable[[], AbstractContextManager]) -> dict:
        """Return tokens and target passes of all rows, and whether the texts are plain sampling's."""
        knobs = {name: setting[name] for name in ("tree_budget", "num_candidates", "branching", "draft_temperature")}
        kwargs = sampling(setting["temperature"], setting["top_p"], setting["top_k"])
        with around():
            output = self.write(seed, with_knobs(self.drafter, **knobs), **kwargs)
        key = seed, *kwargs.values()
        if key not in self.plain:
            self.plain[key] = self.write(seed, **kwargs).sequences
        return {
            "tokens": sum(map(sum, output.acceptance_lengths)),
            "passes": sum(map(len, output.acceptance_lengths)),
            "identical": torch.equal(output.sequences, self.plain[key]),
        }


def settings_of(args: argparse.Namespace, drafter) -> list[dict[str, Any]]:
    """Return every combination of a run."""
    own = [drafter.generation_config.draft_temperature]
    axes = {
        "temperature": args.temperatures,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "tree_budget": args.tree_budgets,
        "num_candidates": [args.num_candidates],
        "draft_temperature": args.draft_temperatures or own,
    }
    combined = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [setting | {"branching": setting["num_candidates"]} for setting in combined]


def summary(rows: list[dict]) -> list[str]:
    """Return a line per setting: τ of each way, pooled over seeds."""
    pooled: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = tuple(row[name] for name in ("temperature", "top_p", "top_k", "tree_budget", "draft_temperature"))
        pooled[key][row["draws"]].append(row)
    lines = []
    for (temperature, top_p, top_k, budget, sharpness), arms in pooled.items():
        # Seeds that every way has: a run may have stopped between two of them.
        seeds = set.intersection(*({row["seed"] for row in own} for own in arms.values()))
        tau = {}
        for name, own in arms.items():
            own = [row for row in own if row["seed"] in seeds]
            tau[name] = sum(row["tokens"] for row in own) / max(sum(row["passes"] for row in own), 1)
        parts = [f"{name} {value:.3f}" for name, value in tau.items()]
        gains = [f"{tau[name] / tau['unknown'] - 1:+.1%}" for name in tau if name != "unknown" and "unknown" in tau]
        where = f"T {temperature:g}, top-p {top_p:g}, top-k {top_k}, B {budget}, s {sharpness:g}"
        lines.append(f"{where}, {len(seeds)} seeds: {', '.join(parts)} {' '.join(gains)}")
    return lines


def as_text(record: dict[str, Any]) -> str:
    """Lay a record out with a line per row."""
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    return json.dumps(record | {"rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
    prompts = prompts_in(args.prompts, tokenizer, args.limit)
    pair = Pair(target, drafter, prompts, args.max_new_tokens)
    record = {
        **describe_pair(target, tokenizer, drafter),
        "environment": environment(target),
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "rows": [],
    }
    if args.json and args.json.exists():
        record["rows"] = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    done = [{key: row[key] for key in row if key not in ("tokens", "passes", "identical")} for row in record["rows"]]
    for seed, setting in itertools.product(args.seeds, settings_of(args, drafter)):
        if seed != args.seeds[0] and not setting["temperature"]:
            continue  # nothing is drawn
        for name, around in ways(setting, args.draws, args.penalties).items():
            row = {**setting, "draws": name, "seed": seed}
            if row not in done:
                record["rows"].append(row | pair.count(seed, setting, around))
                if args.json:
                    args.json.write_text(as_text(record), encoding="utf-8")
    print("\n".join(summary(record["rows"])))
    print("texts are plain sampling's:", all(row["identical"] for row in record["rows"]))


if __name__ == "__main__":
    main()
