"""Tokens per target pass with and without prompt lookup, where the text repeats its prompt and where it does not.

    python benchmarks/lookup.py --target FOLDER --drafter FOLDER --prompts prompts.json --json lookup.json

A copy-heavy prompt is a function followed by the beginning of the same function under another name, so that a target
that copies at all goes on copying, with a change here and there. Greedy counts do not hang on the machine's speed.
"""

import argparse
import ast
import json
import re
from pathlib import Path

import torch
from transformers.utils import logging

import hf_treeflash
from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, load_pair, with_knobs

PACKAGE = Path(hf_treeflash.__file__).parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help='ordinary prompts, JSON list of {"prompt": ...}')
    parser.add_argument("--sources", type=Path, default=PACKAGE, help="folder of Python files the target never saw")
    parser.add_argument("--limit", type=int, default=12, help="prompts of each kind")
    parser.add_argument("--tree-budgets", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--lookup-tokens", type=int, default=20, help="prompt_lookup_num_tokens")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, help="write the counts there")
    return parser.parse_args(argv)


def copy_heavy(folder: Path, tokenizer, limit: int, least: int = 150, most: int = 300) -> list[torch.Tensor]:
    """Return prompts of a function and the first lines of its repetition, from as many files as there are."""
    prompts: list[torch.Tensor] = []
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
                continue
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            ids = tokenizer("\n".join(lines), return_tensors="pt").input_ids
            if len(lines) > 6 and least <= ids.shape[1] <= most:
                again = re.sub(rf"\b{node.name}\b", f"{node.name}_again", "\n".join(lines[:2]))
                text = "\n".join(lines) + "\n\n" + again + "\n"
                prompts.append(tokenizer(text, return_tensors="pt").input_ids)
                break  # the next file
    return prompts[:limit]


def random_tokens(vocab_size: int, limit: int, length: int = 64) -> list[torch.Tensor]:
    """Return prompts without any sense, where neither the drafter nor the lookup has much to go by."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (1, length), generator=generator) for _ in range(limit)]


def block_efficiency(target, drafter, prompts: list[torch.Tensor], max_new_tokens: int, **options) -> float:
    """Return tokens per target pass over all prompts, greedy."""
    lengths: list[int] = []
    for prompt in prompts:
        prompt = prompt.to(target.device)
        out = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=drafter,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        lengths += out.acceptance_lengths[0]
    return sum(lengths) / len(lengths)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
    listed = json.loads(args.prompts.read_text(encoding="utf-8"))[: args.limit]
    kinds = {
        "copy-heavy": copy_heavy(args.sources, tokenizer, args.limit),
        "ordinary": [encode_prompt(tokenizer, entry["prompt"]) for entry in listed],
        "random": random_tokens(len(tokenizer), len(listed)),
    }
    record = {**describe_pair(target, tokenizer, drafter), "environment": environment(target), "results": []}
    for kind, prompts in kinds.items():
        for budget in args.tree_budgets:
            view = with_knobs(drafter, tree_budget=budget)
            alone = block_efficiency(target, view, prompts, args.max_new_tokens)
            options = {"prompt_lookup_num_tokens": args.lookup_tokens}
            grafted = block_efficiency(target, view, prompts, args.max_new_tokens, **options)
            row = {"prompts": kind, "count": len(prompts), "tree_budget": budget, "alone": alone, "grafted": grafted}
            record["results"].append(row)
            gain = grafted / alone - 1
            print(
                f"{kind:10}  B{budget:<3} {alone:5.2f} tokens per pass alone, {grafted:5.2f} with lookup ({gain:+.0%})"
            )
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
