"""Time one round at the shapes of real pairs with random weights, whole and stage by stage.

    python benchmarks/round.py --preset qwen3-4b --json round.json
    python benchmarks/round.py --compare round.json --tau evaluation.json
    python benchmarks/round.py --preset tiny --device cpu --contexts 64 --budgets 8

Random weights give honest times and no τ: the walk is made to accept `--accepted` nodes. With the evaluation of a
trained pair (`end_to_end.py --json`), the table also shows what its τ would make of these rounds: a projection, and
called one. Texts, criteria and processors are left out: `stages.py` times whole calls of a trained pair.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from device_profile import device_events, own_kernels, summarised
from round_arms import Eager, Reference, Setting, Vanilla
from shapes import SHAPES, random_pair
from static_arms import Compiled, Graphed, GraphedVanilla, Static
from transformers.utils import logging

from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.measuring import Stopwatch, columns, host_milliseconds, in_turn, spread, synchronize
from hf_treeflash.bench.pairs import with_knobs

ARMS = {"vanilla": Vanilla, "eager": Eager, "reference": Reference, "static": Static}
# Compiled for minutes and recorded as CUDA graphs.
CUDA_ARMS = {"graphed vanilla": GraphedVanilla, "compiled": Compiled, "graphed": Graphed}
STAGES = ("draft", "heads", "build", "verify", "walk", "commit")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--num-candidates", type=int, default=16)
    parser.add_argument("--arms", nargs="+", choices=ARMS | CUDA_ARMS, help="all that the device can run by default")
    parser.add_argument("--accepted", type=int, default=7, help="nodes each round accepts, root included")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="list what the device runs in a graphed round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="bfloat16 by default, float32 on a CPU")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--compare", type=Path, nargs="+", help="print what was measured before, and measure nothing")
    parser.add_argument("--tau", type=Path, help="evaluation of a trained pair, for a projection")
    args = parser.parse_args(argv)
    if args.arms is None:
        args.arms = list(ARMS if torch.device(args.device).type == "cpu" else ARMS | CUDA_ARMS)
    return args


def split(arm, device: torch.device, repeats: int) -> dict[str, dict[str, Any] | None]:
    """Time the stages of an arm's round, the device waited for between them."""
    watch = Stopwatch(device)
    with ExitStack() as stack:
        for owner, name, label in arm.inner:
            stack.enter_context(mock.patch.object(owner, name, watch.around(getattr(owner, name), label)))
        for _ in range(repeats):
            arm.rewind()
            watch.new_round()
            arm.round(watch.stage)
    names = [name for name in STAGES if name in watch.rounds[0]]
    return {name: spread([stages[name] for stages in watch.rounds]) for name in names}


def prepared(name: str, setting: Setting) -> tuple[Any, dict[str, Any]]:
    """Make an arm and warm it up; None if it does not run. One that fell back says so in its name, and why."""
    start, record = time.perf_counter(), {"name": name}
    try:
        arm = (ARMS | CUDA_ARMS)[name](setting)
        for _ in range(3):
            arm.rewind()
            arm.round(lambda stage: nullcontext())
        synchronize(setting.target.device)
    except Exception as problem:
        return None, {**record, "failure": f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"}
    reason = arm.fallen_back()
    if reason is not None:
        record = {"name": f"{name} (fell back)", "fell_back": reason}
    return arm, {**record, "warm_up_seconds": time.perf_counter() - start}


def measure(setting: Setting, names: list[str], repeats: int, arms: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Time the rounds of every arm in turn, then their stages; `arms` is filled with those that run.

    Yields the figures, first of the arms that are at hand, then, after minutes of compilation, of all of them.
    """
    figures: list[dict[str, Any]] = []
    for chosen in (ARMS, CUDA_ARMS):
        both = [prepared(name, setting) for name in names if name in chosen]
        if not both:
            continue
        figures += [record for _, record in both]
        arms |= {record["name"]: arm for arm, record in both if arm is not None}
        time_in_turn(figures, arms, repeats, setting.target.device)
        yield figures


def time_in_turn(figures: list[dict[str, Any]], arms: dict[str, Any], repeats: int, device: torch.device) -> None:
    """Put the times of arms into their records."""

    def timer(arm) -> float:
        arm.rewind()
        return host_milliseconds(lambda: arm.round(lambda name: nullcontext()), device)

    times = in_turn({name: lambda arm=arm: timer(arm) for name, arm in arms.items()}, repeats)
    for record in figures:
        if (arm := arms.get(record["name"])) is not None:
            record["accepted"], record["round_milliseconds"] = arm.accepted, spread(times[record["name"]])
            record["stages_milliseconds"] = split(arm, device, repeats)


def profiled(arm) -> dict[str, Any]:
    """Return what the device runs in one round."""
    arm.rewind()
    events = device_events(lambda: arm.round(lambda name: nullcontext()))
    return {**summarised(events), "own_kernels": own_kernels(events)}


def least_bytes(setting: Setting) -> dict[str, int]:
    """Count what a plain step and a round must at least move through the device's memory, in bytes.

    Every weight is read once per pass (of embeddings only rows are), every key and value once. A round also reads
    the output layer for the draft's first and second pass, and writes and reads the logits of the second.
    """
    target, drafter, knobs = setting.target, setting.drafter, setting.drafter.generation_config

    def weights(model) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def cache(config) -> int:
        size = config.num_key_value_heads * config.head_dim * target.dtype.itemsize
        return 2 * config.num_hidden_layers * size * setting.context

    embeddings, layer = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    plain = weights(target) + cache(target.config)
    if embeddings is not layer:
        plain -= embeddings.numel() * embeddings.element_size()
    rows = 1 + (drafter.config.block_size - 2) * knobs.num_candidates
    logits = 2 * rows * layer.shape[0] * layer.element_size()
    heads = 2 * layer.numel() * layer.element_size() + logits
    return {"plain": plain, "round": plain + weights(drafter) + cache(drafter.config) + heads}


def taus(path: Path, num_candidates: int) -> dict[int, float]:
    """Read the τ of a trained pair's trees by budget, those of the first temperature."""
    arms = json.loads(path.read_text(encoding="utf-8"))["results"][0]["arms"]
    trees = [arm for arm in arms if arm["knobs"] and "marginal" not in arm["name"]]
    found: dict[int, float] = {}
    for arm in trees:
        if arm["knobs"]["num_candidates"] == num_candidates:
            found.setdefault(arm["knobs"]["tree_budget"], arm["tau"])
    return found


def table(record: dict[str, Any], result: dict[str, Any], tau: dict[int, float]) -> str:
    """Lay one context and budget out: the round, its stages, and plain steps per round."""
    budget = result["budget"]
    heading = [f"{record['settings']['preset']}, context {result['context']}, budget {budget}", "round ms (spread)"]
    heading += [*STAGES, "vanilla steps"]
    if budget in tau:
        heading.append(f"projection: x vanilla at τ {tau[budget]:.2f}")
    rows = [heading]
    by_name = {arm["name"]: arm for arm in result["arms"] if "failure" not in arm}
    for arm in result["arms"]:
        if "failure" in arm:
            rows.append([f"{arm['name']}: {arm['failure'][:60]}", "failed", *[""] * (len(heading) - 2)])
            continue
        # Each is held against plain decoding in its own mode.
        graphed = arm["name"] in CUDA_ARMS and "graphed vanilla" in by_name
        baseline = by_name.get("graphed vanilla" if graphed else "vanilla")
        time, stages = arm["round_milliseconds"], arm["stages_milliseconds"]
        row = [arm["name"], f"{time['median']:.3f} ({time['min']:.3f} to {time['max']:.3f})"]
        row += [f"{stages[name]['median']:.3f}" if name in stages else "" for name in STAGES]
        steps = None
        if baseline is not None:  # quotients within one repeat, as the two ran side by side
            pairs = zip(time["all"], baseline["round_milliseconds"]["all"], strict=True)
            steps = statistics.median(own / plain for own, plain in pairs)
        row.append("" if steps is None else f"{steps:.2f}")
        if budget in tau:
            row.append("" if steps is None or arm is baseline else f"{tau[budget] / steps:.2f}")
        rows.append(row)
    return columns(rows)


def write(record: dict[str, Any], path: Path | None) -> None:
    """Write the figures: after every point, so that a long run that is stopped keeps what it has."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    tau = {} if args.tau is None else taus(args.tau, args.num_candidates)
    for path in args.compare or ():
        record = json.loads(path.read_text(encoding="utf-8"))
        print(f"{path.name}: {record['environment']}\n")
        print("\n\n".join(table(record, result, tau) for result in record["results"]))
    if args.compare:
        return
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    torch.manual_seed(args.seed)
    target, drafter = random_pair(args.preset, device, dtype)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "compare", "tau")}
    record = {"environment": environment(target), "settings": settings, "results": []}
    # A sharp draft makes deep trees, though nothing was learnt; it costs what any other costs.
    knobs = {"num_candidates": args.num_candidates, "draft_temperature": 0.01}
    for context in args.contexts:
        for budget in args.budgets:
            with torch.no_grad():
                setting = Setting(target, with_knobs(drafter, tree_budget=budget, **knobs), context, args.accepted)
                result = {"context": context, "budget": budget, "bytes": least_bytes(setting)}
                record["results"].append(result)
                arms: dict[str, Any] = {}
                for result["arms"] in measure(setting, args.arms, args.repeats, arms):
                    write(record, args.json)
            print(table(record, result, tau), end="\n\n", flush=True)
            if args.profile:  # last, as it may fail where the figures stand
                with torch.no_grad():
                    result["profiles"] = {name: profiled(arms[name]) for name in arms if name in CUDA_ARMS}
                write(record, args.json)
            del arms, setting


if __name__ == "__main__":
    main()
