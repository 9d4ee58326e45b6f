"""Tokens per pass of the default head trained by other recipes than the paper's, on one backbone with the same data.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py --samples answers.jsonl --json recipes.json

Samples are lines of `{"input_ids", "prompt_length"}`, as `regenerate` writes them: the target's answers to prompts
that the backbone was not trained on. Heads start from the drafter's own head, or from zero, and train side by side on
the same batches, the backbone frozen; the loss is the forward KL to the target over the draft vocabulary. The recipes:

* paper: true previous tokens, slot k weighs `exp(-(k - 1) / decay)`.
* own drafts: in half of the blocks the previous token is what the head itself finds likeliest at the slot before,
  given the true token before that. What the target would say behind a wrong token is not known: the loss is against
  what it says along the true text.
* reach by slot: slot k weighs the product, over the slots before it, of the share of the batch's blocks whose token
  the head finds likeliest.
* reach by block: a slot counts as long as every token before it was among the head's two likeliest in its own block.
* second order: the token before the previous one goes in, too, through a factor of low rank that starts at zero.

The drafter was trained with the paper's recipe, backbone and head together, which favours that one. A second-order
head has no tables of rows; it is measured with a row of its own for every node, of the same shortlists. An interrupted
run goes on where it stopped.
"""

import argparse
import json
import random
import shlex
import sys
from pathlib import Path

from kinds import by_kind
from path_heads import drafting_along_paths
from recipe_losses import OWN, RECIPES, Comparison, SecondOrderHead
from side_by_side import against, best_rates, counts, mean_of_last, ratio, train
from torch import nn

from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.models import smollm2
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, load_pair, with_knobs, without_head
from hf_treeflash.training import AnchorCollator, load_samples
from hf_treeflash.training.stored_states import StoredStates

ROOT = Path(__file__).resolve().parents[1]
TREES = {16: 8, 64: 16}  # nodes, and candidates per slot


def drafter_with(backbone, head: nn.Module):
    """Return a view of the backbone that drafts with a head."""
    view = without_head(backbone)
    if isinstance(head, SecondOrderHead):
        return drafting_along_paths(view, head.steps_of(backbone.norm))
    view._modules["ar_head"], view.config.ar_head = head, "swiglu"
    return view


def measure(target, drafter, heads: dict[str, nn.Module], prompts: list[list[int]], args) -> dict[str, dict]:
    """Return tokens per pass of every head at each budget; finished counts are kept."""
    file = args.work / "counts.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    arms = {name: head for name, head in {**heads, OWN: drafter.ar_head}.items() if name in args.arms}
    for name, head in arms.items():
        for budget, candidates in TREES.items():
            if f"{name} B{budget}" not in known:
                knobs = {"num_candidates": candidates, "branching": 16, "tree_budget": budget}
                view = with_knobs(drafter_with(drafter, head), **knobs)
                own = [counts(target, view, [prompt], args.eval_tokens)[0] for prompt in prompts]
                print(name, budget, round(ratio(own), 3), flush=True)
                known[f"{name} B{budget}"] = own
                file.write_text(json.dumps(known))
    return {
        name: {
            f"B{budget}": {
                "tau": round(ratio(known[f"{name} B{budget}"]), 3),
                "percent above paper, 95 % interval": against(known[f"{name} B{budget}"], known[f"paper B{budget}"]),
            }
            for budget in TREES
        }
        for name in arms
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id; SmolLM2-135M-Instruct by default")
    parser.add_argument("--drafter", default=str(ROOT / "drafters" / "smollm2-135m-instruct-treeflash"))
    parser.add_argument("--samples", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, default=ROOT / "drafters" / "prompts_held_out.json")
    parser.add_argument("--work", type=Path, default=Path("build/recipes"), help="states, checkpoint, counts")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/recipes_smollm2_cpu.json"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--anchors", type=int, default=24, help="blocks per sequence and step")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument(
        "--start", choices=("own", "zero"), default="own", help="all heads from the drafter's, or none"
    )
    parser.add_argument("--decay", type=float, default=4.5, help="of the paper's weights, in slots")
    parser.add_argument("--rank", type=int, default=64, help="of the second-order factor")
    parser.add_argument("--held-out", type=int, default=10, help="prompts kept from training")
    parser.add_argument(
        "--arms", nargs="+", default=[*RECIPES, OWN], help="those to count tokens per pass of; paper is one"
    )
    parser.add_argument("--per-kind", type=int, default=5, help="prompts of each kind for tokens per pass")
    parser.add_argument("--eval-tokens", type=int, default=48)
    return parser.parse_args(argv)


def split(samples: list[dict], prompts: int) -> tuple[list[dict], list[dict]]:
    """Return samples to train on, and all samples of so many prompts to keep from it."""
    by_prompt = [tuple(sample["input_ids"][: sample["prompt_length"]]) for sample in samples]
    kept = set(random.Random(0).sample(sorted(set(by_prompt)), prompts))
    parts: tuple[list[dict], list[dict]] = [], []
    for sample, prompt in zip(samples, by_prompt, strict=True):
        parts[prompt in kept].append(sample)
    return parts


def how_made(file: Path) -> dict | None:
    """Return how answers were drawn, as `regenerate` noted it beside them."""
    record = file.with_name(file.name + ".provenance.json")
    if not record.exists():
        return None
    made = json.loads(record.read_text(encoding="utf-8"))
    return {key: made[key] for key in ("generate", "batch_size", "seed", "prompts") if key in made}


def main(argv: list[str] | None = None) -> dict:
    """Train, measure, write."""
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    target, tokenizer, drafter = load_pair(args.target or str(smollm2()), args.drafter)
    for model in (target, drafter):
        model.requires_grad_(False)
    samples = [sample for file in args.samples for sample in load_samples(file)]
    states = StoredStates(args.work / "states", target, drafter.config.target_layer_ids)
    states.add(sample["input_ids"] for sample in samples)
    compared, (training, held_out) = Comparison(target, drafter, args), split(samples, args.held_out)
    record = train(
        compared.heads, compared.losses, training,
        lambda epoch: AnchorCollator(0, args.anchors, seed=epoch, states=states),
        args.work / "heads.pt", steps=args.steps, batch_size=args.batch_size,
    )  # fmt: skip
    unseen = compared.held_out(AnchorCollator(0, stride=4, states=states)(held_out))
    heads = best_rates(compared.heads, {name: own["loss"] for name, own in unseen.items()})
    prompts = [
        encode_prompt(tokenizer, prompt)[0].tolist()
        for own in by_kind(args.prompts, args.per_kind).values()
        for prompt in own
    ]
    result = {
        "command": shlex.join(["python", "benchmarks/recipes.py", *(sys.argv[1:] if argv is None else argv)]),
        **describe_pair(target, tokenizer, drafter),
        "environment": environment(target),
        "data": {
            "made": [how_made(file) for file in args.samples],
            "samples": len(training),
            "response tokens": sum(len(s["input_ids"]) - s["prompt_length"] for s in training),
            "samples kept from training": len(held_out),
            "held-out prompts for tokens per pass": len(prompts),
            "tokens each": args.eval_tokens,
        },
        "training": {
            "steps": args.steps, "batch": args.batch_size, "blocks per sequence": args.anchors,
            "heads start from": args.start,
            "wall seconds": round(record["seconds"]), "decay": args.decay, "rank": args.rank,
        },
        "own loss over the last 50 steps": {n: round(mean_of_last(record, n, 50), 4) for n in record["losses"][0]},
        "samples kept from training, the paper's loss and a chain's tokens per pass": unseen,
        "heads": measure(target, drafter, heads, prompts, args),
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
