"""Every way to decode on prompts of several kinds: a table for each way of sampling, and a picture.

    python benchmarks/kinds.py --drafter drafters/smollm2-135m-instruct-treeflash --json kinds.json --plot kinds.png

The target is SmolLM2-135M-Instruct unless another is named. A run that was stopped goes on where it was; another batch
size, written to the same file, joins the tables; other lengths or counts of prompts need a file of their own. A card
takes the file, too.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from hf_treeflash.bench.arms import all_arms, with_lookup
from hf_treeflash.bench.compare import compare
from hf_treeflash.bench.models import smollm2
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, load_pair

ROOT = Path(__file__).resolve().parents[1]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "T = 0.2, top-p 0.9": {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 0},
    "T = 1": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id; SmolLM2-135M-Instruct by default")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "drafters" / "prompts_held_out.json")
    parser.add_argument("--per-kind", type=int, help="prompts of each kind; all by default")
    parser.add_argument("--samplings", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    parser.add_argument("--tree-budgets", nargs="+", default=["8", "16", "auto"], help="numbers, or auto")
    parser.add_argument("--arms", nargs="+", help="beginnings of the names of those to keep, such as TreeFlash")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="0 for tokens per pass alone")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(argv)


def by_kind(file: Path, limit: int | None) -> dict[str, list[str]]:
    """Return the prompts of each kind."""
    kinds = defaultdict(list)
    for row in json.loads(file.read_text(encoding="utf-8")):
        kinds[row["kind"]].append(row["prompt"])
    return {kind: prompts[:limit] for kind, prompts in kinds.items()}


def key(result: dict[str, Any]) -> list:
    return [result["kind"], result["sampling"], result["settings"]["batch_size"]]


def known(results: list[dict[str, Any]], kind: str, sampling: str, prompts: int, options: dict[str, Any]) -> bool:
    """Return whether a kind was measured already; refuse a file in which it was, but in another way."""
    for result in results:
        if key(result) == [kind, sampling, options["batch_size"]]:
            found, asked = result["settings"], {"prompts": prompts, **options}
            if other := [f"{name} {found[name]}" for name in asked if found[name] != asked[name]]:
                raise SystemExit(f"{sampling}, {kind} was measured with {', '.join(other)}: give another --json.")
            return True
    return False


def over_all(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tokens per pass and speed-up of each arm over the kinds of one sampling."""
    rows = []
    for arms in zip(*(result["arms"] for result in results), strict=True):
        row = {"name": arms[0]["name"], "identical": all(arm["identical"] for arm in arms)}
        passes = sum(arm["passes"] for arm in arms)
        row["tau"] = sum(arm["tau"] * arm["passes"] for arm in arms) / passes
        row["speedup"] = statistics.geometric_mean(arm["speedup"]["median"] for arm in arms) if timed(arms) else None
        rows.append(row)
    return rows


def timed(arms) -> bool:
    return all(arm["speedup"] for arm in arms)


def tables(results: list[dict[str, Any]]) -> str:
    """Lay the results out: a Markdown table for each sampling and batch size, tokens per pass (speed-up) by kind."""
    groups, text = defaultdict(list), []
    for result in results:
        groups[result["sampling"], result["settings"]["batch_size"]].append(result)
    for (sampling, batch), group in groups.items():
        count = sum(result["settings"]["prompts"] for result in group)
        heading = ["", *(result["kind"] for result in group), "all", "identical"]
        lines = [heading, ["---", *["---:"] * (len(heading) - 1)]]
        for index, whole in enumerate(over_all(group)):
            arms = [result["arms"][index] for result in group]
            cells = [cell(arm["tau"], arm["speedup"] and arm["speedup"]["median"]) for arm in arms]
            promised = all(arm["promises_text"] for arm in arms)
            same = f"{count - sum(len(arm['differences']) for arm in arms)} of {count}" if promised else "other draws"
            same = "yes" if whole["identical"] else same
            lines.append([whole["name"], *cells, cell(whole["tau"], whole["speedup"]), same])
        text.append(
            f"{sampling}, batch {batch}, {count} prompts, {group[0]['settings']['max_new_tokens']} tokens each\n"
        )
        text.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(text)


def cell(tau: float, speedup: float | None) -> str:
    return f"{tau:.2f}" if speedup is None else f"{tau:.2f} ({speedup:.2f}x)"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens per pass and tokens per second by kind of prompt, greedy, one prompt at a time."""
    from matplotlib.figure import Figure

    shown = [r for r in results if r["sampling"] == "greedy" and r["settings"]["batch_size"] == 1]
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    names = [arm["name"] for arm in shown[0]["arms"]]
    for axes, label in zip(
        figure.subplots(2, 1, sharex=True), ("tokens per target pass", "tokens per second"), strict=True
    ):
        for number, name in enumerate(names):
            arms = [result["arms"][number] for result in shown]
            values = [arm["tau"] if "pass" in label else arm["tokens_per_second"]["median"] for arm in arms]
            places = [place + (number - len(names) / 2 + 0.5) * 0.8 / len(names) for place in range(len(shown))]
            axes.bar(places, values, width=0.75 / len(names), label=name, color="0.6" if name == "plain" else None)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(range(len(shown)), [result["kind"] for result in shown])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    where = shown[0]["environment"]
    count = sum(result["settings"]["prompts"] for result in shown)
    figure.suptitle(
        f"{count} prompts, greedy, {shown[0]['settings']['max_new_tokens']} tokens each; "
        f"{where['device']}, {where['threads']} threads, {where['dtype']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare, write, and print the tables."""
    args = parse(argv)
    target, tokenizer, drafter = load_pair(args.target or str(smollm2()), args.drafter)
    budgets = [budget if budget == "auto" else int(budget) for budget in args.tree_budgets]
    listed = all_arms(drafter, budgets, [drafter.generation_config.num_candidates])
    listed += [with_lookup(arm) for arm in listed if arm.name.startswith("TreeFlash")]
    kept = ("plain", *(args.arms or [""]))
    arms = [arm for arm in listed if arm.name.startswith(kept)]
    record: dict[str, Any] = {**describe_pair(target, tokenizer, drafter), "results": []}
    if args.json.exists():
        record = json.loads(args.json.read_text(encoding="utf-8"))
    results = record["results"]
    options = {"max_new_tokens": args.max_new_tokens, "repeats": args.repeats, "batch_size": args.batch_size}
    for sampling in args.samplings:
        for kind, prompts in by_kind(args.prompts, args.per_kind).items():
            if known(results, kind, sampling, len(prompts), options):
                continue
            encoded = [encode_prompt(tokenizer, prompt).to(target.device) for prompt in prompts]
            result = compare(target, arms, encoded, task=kind, **options, **SAMPLINGS[sampling])
            results.append({"kind": kind, "sampling": sampling, **result})
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"{sampling}, {kind}: done", flush=True)
    print(tables(results))
    if args.plot:
        plot(results, args.plot)
    return results


if __name__ == "__main__":
    main()
