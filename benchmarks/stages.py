"""Split the rounds of tree decoding into stages, in milliseconds, with timers wrapped around them from outside.

    python benchmarks/stages.py --target FOLDER --drafter FOLDER --prompts prompts.json --json stages.json

A stage's time is its own: what it calls and is listed too is not counted twice. The stages of a round add up to it.
"""

import argparse
import json
from pathlib import Path

from transformers.utils import logging

from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, load_pair
from hf_treeflash.bench.stages import MODELS, round_stages


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help='JSON list of {"prompt": ...}')
    parser.add_argument("--limit", type=int, default=4, help="prompts to use")
    parser.add_argument("--tree-budget", type=int)
    parser.add_argument("--num-candidates", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
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
    result = round_stages(target, drafter, prompts, args.max_new_tokens, args.temperature)
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
