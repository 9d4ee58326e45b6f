"""Total tokens per second of left-padded batches, plain and with a drafter, in interleaved pairs.

python benchmarks/batches.py --target FOLDER --drafter FOLDER --prompts prompts.json --json batches.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_treeflash.bench.calls import left_padded
from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.pairs import encode_prompt, load_pair, with_knobs


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help='JSON list of {"prompt": ...}')
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tree-budgets", nargs="+", default=["8", "16", "auto"], help="numbers, or auto")
    parser.add_argument("--num-candidates", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(argv)


def measure(target, drafters: dict, batch: dict[str, torch.Tensor], max_new_tokens: int, repeats: int) -> list[dict]:
    """Time every arm in turn, repeat by repeat; speed-ups are quotients within one repeat."""
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": None, "pad_token_id": 0}

    def run(drafter):
        started = time.perf_counter()
        ids = target.generate(**batch, assistant_model=drafter, **settings)
        return ids, time.perf_counter() - started

    texts = {name: run(drafter)[0] for name, drafter in drafters.items()}
    seconds: dict[str, list[float]] = {name: [] for name in drafters}
    for _ in range(repeats):
        for name, drafter in drafters.items():
            seconds[name].append(run(drafter)[1])
    tokens = batch["input_ids"].shape[0] * max_new_tokens
    rows = []
    for name, times in seconds.items():
        speedups = [plain / own for plain, own in zip(seconds["plain"], times, strict=True)]
        rows.append(
            {
                "arm": name,
                "tokens_per_second": tokens / statistics.median(times),
                "speedup": statistics.median(speedups),
                "speedup_least": min(speedups),
                "speedup_greatest": max(speedups),
                "identical": torch.equal(texts[name], texts["plain"]),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter)
    prompts = [encode_prompt(tokenizer, entry["prompt"]) for entry in json.loads(args.prompts.read_text("utf-8"))]
    budgets = [value if value == "auto" else int(value) for value in args.tree_budgets]
    drafters = {"plain": None} | {
        f"B{budget}": with_knobs(drafter, tree_budget=budget, num_candidates=args.num_candidates) for budget in budgets
    }
    record: dict = {"environment": environment(target), "settings": vars(args) | {"json": None}, "results": []}
    for size in args.batches:
        batch = left_padded(
            [prompts[i % len(prompts)] for i in range(size)], target.generation_config.pad_token_id or 0
        )
        rows = measure(target, drafters, batch, args.max_new_tokens, args.repeats)
        record["results"].append({"batch": size, "arms": rows})
        for row in rows:
            speedup = f"{row['speedup']:.2f} x ({row['speedup_least']:.2f} to {row['speedup_greatest']:.2f})"
            identical = "yes" if row["identical"] else "no"
            print(
                f"batch {size}  {row['arm']:6}  {row['tokens_per_second']:7.1f} tokens/s  {speedup}"
                f"  identical: {identical}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
