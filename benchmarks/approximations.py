"""What drafting with less than the whole output layer costs in τ: eight-bit weights, and a draft vocabulary.

    python benchmarks/approximations.py --target FOLDER --drafter FOLDER --prompts prompts.json --json cost.json

Vocabularies are counted on the second half of the prompts, or on `--samples`; τ is measured on the first half.
τ is a count, so it does not depend on the machine being quiet; speeds are measured with `--repeats` alone.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

from hf_treeflash.bench.arms import Arm
from hf_treeflash.bench.compare import compare
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, load_pair, with_knobs, with_vocabulary
from hf_treeflash.bench.tables import text_table
from hf_treeflash.training import frequent_tokens, load_samples, response_tokens


def tree(value: str) -> tuple[int, int]:
    budget, candidates = value.split(":")
    return int(budget), int(candidates)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument(
        "--prompts", required=True, type=Path, help='JSON list of {"prompt": ...} or {"prompt_ids": ...}'
    )
    parser.add_argument("--limit", type=int, help="prompts to use, all by default")
    parser.add_argument("--trees", type=tree, nargs="+", default=[(16, 4), (64, 16)], help="budget:candidates")
    parser.add_argument("--draft-vocabulary", type=int, nargs="+", default=[1024, 512, 256, 128], help="tokens")
    parser.add_argument("--responses", type=int, default=16, help="texts per prompt to count tokens in")
    parser.add_argument(
        "--samples", type=Path, help="responses of the target to count tokens in, as training has them"
    )
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=0, help="timed repeats")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(argv)


def arms(drafter, trees: list[tuple[int, int]], vocabularies: list[torch.Tensor]) -> list[Arm]:
    """Return, for every tree, the exact draft and each approximation of it."""
    approximations = {"exact": drafter, "float8": with_knobs(drafter, draft_lm_head="float8")}
    approximations |= {f"vocabulary {len(kept)}": with_vocabulary(drafter, kept) for kept in vocabularies}
    return [
        Arm(f"B{budget} M{candidates} {name}", with_knobs(view, tree_budget=budget, num_candidates=candidates))
        for budget, candidates in trees
        for name, view in approximations.items()
    ]


def responses(target, prompts: list[torch.Tensor], count: int) -> list[list[int]]:
    """Return what the target writes after prompts, without these: so many texts each, drawn at temperature 1."""
    settings = {"max_new_tokens": 160, "do_sample": True, "top_k": 0, "eos_token_id": None}
    torch.manual_seed(0)
    texts = []
    for prompt in prompts:
        prompt = prompt.to(target.device)
        output = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_return_sequences=count, **settings
        )
        texts += output[:, prompt.shape[1] :].tolist()
    return texts


def prompts_in(path: Path, tokenizer, limit: int | None) -> list[torch.Tensor]:
    """Read prompts given as text or as ids, also from a file that holds more than the prompts."""
    content = json.loads(path.read_text(encoding="utf-8"))
    entries = content if isinstance(content, list) else content["prompts"]
    return [
        torch.tensor([entry["prompt_ids"]]) if "prompt_ids" in entry else encode_prompt(tokenizer, entry["prompt"])
        for entry in entries[:limit]
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
    prompts = prompts_in(args.prompts, tokenizer, args.limit)
    prompts, others = prompts[: -(-len(prompts) // 2)], prompts[-(-len(prompts) // 2) :]
    texts = (
        responses(target, others, args.responses)
        if args.samples is None
        else list(response_tokens(load_samples(args.samples)))
    )
    vocabularies = [frequent_tokens(texts, size) for size in args.draft_vocabulary]
    result = compare(
        target,
        [Arm("plain"), *arms(drafter, args.trees, vocabularies)],
        prompts,
        task=args.prompts.stem,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        do_sample=False,
        eos_token_id=None,  # every text has its full length
    )
    exact: dict[tuple, float] = {}
    for arm in result["arms"][1:]:
        shape = (arm["knobs"]["tree_budget"], arm["knobs"]["num_candidates"])
        arm["tau_kept"] = arm["tau"] / exact.setdefault(shape, arm["tau"])  # the exact draft comes first
    result |= {
        "counted_tokens": sum(map(len, texts)),
        "different_tokens": len({token for text in texts for token in text}),
    }
    print(text_table(result))
    for arm in result["arms"][1:]:
        print(f"{arm['name']:32} τ {arm['tau']:.3f}, {arm['tau_kept']:.1%} of the exact draft's")
    if args.json:
        record = {**describe_pair(target, tokenizer, drafter), "results": [result]}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
