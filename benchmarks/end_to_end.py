"""Measure every arm over budgets, candidates and temperatures, and write the evaluation a card is made from.

    python benchmarks/end_to_end.py --target FOLDER --drafter FOLDER --prompts prompts.json --json evaluation.json
    python benchmarks/end_to_end.py --shape smollm2 --draft-vocabulary 8192 --compiled --temperatures 0

Plain decoding and the chain run in the same repeats as the trees, so every speed-up compares neighbours in time.
"""

import argparse
import json
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from shapes import SHAPES, prepare
from transformers.utils import logging

from hf_treeflash.bench.arms import Arm, plain_compiled, tree_arm
from hf_treeflash.bench.compare import compare
from hf_treeflash.bench.pairs import with_knobs, without_head
from hf_treeflash.bench.tables import text_table
from hf_treeflash.decoding import TreeDecoding


def budget(value: str) -> int | str:
    return value if value == "auto" else int(value)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, instead of a pair: no tau")
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt, with a shape")
    parser.add_argument("--draft-vocabulary", type=int, help="draft so many tokens only, with a shape")
    parser.add_argument("--target")
    parser.add_argument("--drafter")
    parser.add_argument("--prompts", type=Path, help='JSON list of {"prompt": ...}')
    parser.add_argument(
        "--compiled", action="store_true", help="plain decoding once more, compiled over a static cache"
    )
    parser.add_argument("--limit", type=int, help="prompts to use, all by default")
    parser.add_argument("--task", help="name of the prompts; the file's by default")
    parser.add_argument("--tree-budgets", type=budget, nargs="+", default=[16, 32, 64], help="numbers, or auto")
    parser.add_argument("--num-candidates", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--prompt-lookup", type=int, help="add every tree once more with this many looked-up tokens")
    parser.add_argument("--static", action="store_true", help="all but the chain once more over static caches")
    parser.add_argument("--without-noise", action="store_true", help="trees, our chain once more, draws unknown")
    parser.add_argument("--arms", nargs="+", help="beginnings of names; all by default. The first arm always runs")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--thinking", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, help="write the evaluation there")
    args = parser.parse_args(argv)
    if args.shape is None and None in (args.target, args.drafter, args.prompts):
        parser.error("give --shape, or --target, --drafter and --prompts")
    return args


def unknown_draws() -> AbstractContextManager:
    """Rank drafts by `logits / (temperature * draft_temperature)`, as without any knowledge of the draws."""

    def draw_noise(self, noise) -> None:
        own = self.drafter.generation_config.draft_temperature
        self.generator.knobs = self.generator.knobs._replace(draft_temperature=own * self.temperature)

    return mock.patch.object(TreeDecoding, "draw_noise", draw_noise)


def arms(
    drafter,
    tree_budgets: list,
    num_candidates: list[int],
    prompt_lookup: int | None = None,
    static: bool = False,
    without_noise: bool = False,
) -> list[Arm]:
    """Return plain decoding, the chain, a marginal tree per budget, a TreeFlash tree per budget and candidates.

    With `static` all but the chain come again over static caches: on CUDA compiled, and recorded as graphs. With
    `without_noise` the trees, and a chain of our own, come again ranked by probability alone.
    """
    marginal = without_head(drafter)
    listed = [Arm("plain"), Arm("chain", drafter, {"speculation_type": "dflash"})]
    for budget in tree_budgets:
        listed.append(Arm(f"marginal tree B{budget}", with_knobs(marginal, tree_budget=budget)))
    if drafter.config.ar_head is not None:
        for budget in tree_budgets:
            for candidates in num_candidates:
                listed.append(tree_arm(drafter, tree_budget=budget, num_candidates=candidates))
    if without_noise:
        chain = with_knobs(drafter, tree_budget=drafter.config.num_drafted + 1, num_candidates=1, branching=1)
        known = [Arm("our chain", chain), *(arm for arm in listed if "tree" in arm.name.lower())]
        listed.insert(2, known[0])
        listed += [Arm(f"{arm.name}, without noise", arm.drafter, around=unknown_draws) for arm in known]
    if prompt_lookup is not None:
        options = {"prompt_lookup_num_tokens": prompt_lookup}
        listed += [Arm(f"{arm.name} + lookup", arm.drafter, options) for arm in listed if "tree" in arm.name.lower()]
    if static:
        options = {"cache_implementation": "static"}
        listed += [Arm(f"{arm.name}, static", arm.drafter, options) for arm in listed if not arm.options]
    return listed


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    target, drafter, prompts, described = prepare(args)
    ways = arms(drafter, args.tree_budgets, args.num_candidates, args.prompt_lookup, args.static, args.without_noise)
    if args.arms:
        ways = [ways[0], *(arm for arm in ways[1:] if arm.name.startswith(tuple(args.arms)))]
    if args.compiled:
        ways.insert(1, plain_compiled())
    record = {**described, "results": []}
    for temperature in args.temperatures:
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        result = compare(
            target,
            [arm for arm in ways if arm.around is not unknown_draws or temperature > 0],  # greedy: nothing is drawn
            prompts,
            task=args.task or args.shape or args.prompts.stem,
            max_new_tokens=args.max_new_tokens,
            repeats=args.repeats,
            seed=args.seed,
            **sampling,
        )
        record["results"].append(result)
        print(f"\ntemperature {temperature}\n{text_table(result)}", flush=True)
        for arm in result["arms"][1:]:
            print(f"{arm['name']:32} {arm['tau'] / arm['speedup']['median']:.2f} plain steps per pass", flush=True)
        if args.json:  # after every temperature: a long run that is stopped keeps what it has
            args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
