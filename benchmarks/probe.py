"""What the look at a target before its first drafted token costs: its share of a first call, and nothing afterwards.

    python benchmarks/probe.py --target FOLDER --drafter FOLDER --prompts prompts.json

A first call looks at the target (three passes), later ones remember. Each repetition forgets what is known of the
target, times the look within a first call, and a second call of the same prompt.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_treeflash.bench.measuring import machine, synchronize
from hf_treeflash.bench.pairs import encode_prompt, load_pair
from hf_treeflash.memory import forget
from hf_treeflash.probe import Probe


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help='JSON list of {"prompt": ...}; the first is used')
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, help="write the seconds there")
    return parser.parse_args(argv)


def timed_looks(device: torch.device) -> list[float]:
    """Return a list that grows by the seconds of each look."""
    seconds: list[float] = []
    look = Probe._look

    def timed(*args, **kwargs):
        synchronize(device)
        started = time.perf_counter()
        seen = look(*args, **kwargs)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        return seen

    Probe._look = timed  # type: ignore[method-assign]
    return seconds


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
    prompt = encode_prompt(tokenizer, json.loads(args.prompts.read_text(encoding="utf-8"))[0]["prompt"])
    inputs = {"input_ids": prompt.to(target.device), "attention_mask": torch.ones_like(prompt).to(target.device)}
    looks = timed_looks(target.device)
    calls: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(args.repeats):
        forget(target, "exactness")
        for seconds in calls.values():
            synchronize(target.device)
            started = time.perf_counter()
            target.generate(
                **inputs,
                assistant_model=drafter,
                do_sample=False,
                min_new_tokens=args.max_new_tokens,
                max_new_tokens=args.max_new_tokens,
            )
            synchronize(target.device)
            seconds.append(time.perf_counter() - started)
    look, first, second = (statistics.median(values) for values in (looks, *calls.values()))
    print(f"{args.max_new_tokens} tokens: {first:.3f} s in a first call, {second:.3f} s in a second")
    print(f"the look: {1000 * look:.1f} ms, {look / first:.2%} of the first call ({len(looks)} looks)")
    if args.json:
        record = {"environment": machine(target.device), "look": looks, **calls}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
