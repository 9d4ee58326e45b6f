"""Stream a text from any target and drafter, then measure it against plain `generate`.

    python examples/generate.py --target Qwen/Qwen3-4B --drafter peerrh/treeflash-qwen3-4b --prompt "Count to ten."

Folders work in place of repository ids.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import TextStreamer
from transformers.utils import logging

import hf_treeflash  # noqa: F401 - lets `generate` draft trees
from hf_treeflash.bench.arms import Arm, tree_arm
from hf_treeflash.bench.compare import compare
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, load_pair
from hf_treeflash.bench.tables import text_table


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder or repository of the target")
    parser.add_argument(
        "--drafter", required=True, help="folder or repository of the drafter, in any published layout"
    )
    parser.add_argument("--prompt", action="append", help="a prompt; may be repeated (the first one is streamed)")
    parser.add_argument("--prompts", type=Path, help="text file with one prompt per line")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--tree-budget", type=int, help="nodes per target pass; the drafter's own by default")
    parser.add_argument("--num-candidates", type=int, help="previous tokens per slot; the drafter's own by default")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--thinking", action="store_true", help="switch the chat template's thinking mode on")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved pairs of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", help="such as bfloat16; as stored by default, float32 on a CPU")
    parser.add_argument("--json", type=Path, help="write the measurement there")
    args = parser.parse_args(argv)
    lines = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else []
    args.texts = (args.prompt or []) + [line for line in lines if line.strip()]
    if not args.texts:
        parser.error("give a prompt with --prompt or --prompts")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
    for knob in ("tree_budget", "num_candidates"):
        if getattr(args, knob) is not None:
            setattr(drafter.generation_config, knob, getattr(args, knob))
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    prompts = [encode_prompt(tokenizer, text, args.thinking) for text in args.texts]

    torch.manual_seed(args.seed)
    first = prompts[0].to(target.device)
    out = target.generate(
        first,
        attention_mask=torch.ones_like(first),
        assistant_model=drafter,
        streamer=TextStreamer(tokenizer),
        max_new_tokens=args.max_new_tokens,
        return_dict_in_generate=True,
        **sampling,
    )
    print(f"\n{out.block_efficiency:.2f} tokens per target pass. Measuring against plain generate ...\n")

    arms = [Arm("plain"), tree_arm(drafter)]
    result = compare(
        target,
        arms,
        prompts,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        seed=args.seed,
        **sampling,
    )
    print(text_table(result))
    if args.json:
        record = {**describe_pair(target, tokenizer, drafter, args.thinking), "results": [result]}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
