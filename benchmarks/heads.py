"""Block efficiency and size of heads on one backbone: the embedded pair's, with the same data and the same steps.

    OMP_NUM_THREADS=1 python benchmarks/heads.py --work build/heads --json benchmarks/results/heads_tiny_cpu.json

All heads start from zero and train side by side on the same batches (forward KL to the target, true previous tokens,
the backbone frozen), each at two learning rates, of which the one with the lower loss at the end is measured. The
backbone was trained jointly with a SwiGLU head, which favours that one. A selector's loss counts the tokens outside
its choice, too, which it cannot move. Two heads depend on the whole path; they are measured with a row of its own for
every node. An interrupted run goes on where it stopped. `--times` adds the time of a round, on a quiet machine.
"""

import argparse
import copy
import json
import random
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_treeflash
from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench.compare import environment
from hf_treeflash.bench.pairs import with_knobs, without_head
from hf_treeflash.modeling_treeflash import HEADS
from hf_treeflash.training import AnchorCollator, regenerate
from hf_treeflash.training.blocks import embedding_of, output_layer_of
from hf_treeflash.training.losses import slot_weights, weighted_mean

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
from path_heads import DominoHead, RecurrentMarkovHead, added_along, drafting_along_paths, steps_of_state
from side_by_side import against, best_rates, counts, frozen_pass, mean_of_last, ratio, train
from train_tiny_pair import function_prompts
from train_tiny_target import standard_library

EMBEDDED = Path(hf_treeflash.__file__).parent / "tiny"
RATES = (3e-3, 1e-2)
TEMPERATURES = (0.6,)  # what suits the embedded pair
BUDGETS = (16, 64)
CONFIGS = {
    "markov r64": {"ar_head": "markov", "head_rank": 64},
    "markov r256": {"ar_head": "markov", "head_rank": 256},
    "selector r256 top 16": {"ar_head": "selector", "head_rank": 256, "selector_top_k": 16},
    "swiglu": {"ar_head": "swiglu"},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/heads"), help="responses, checkpoints, counts")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/heads_tiny_cpu.json"))
    parser.add_argument("--prompts", type=int, default=1024, help="function starts that the target continues")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--anchors", type=int, default=12, help="blocks per sequence")
    parser.add_argument("--eval-prompts", type=int, default=24)
    parser.add_argument("--eval-tokens", type=int, default=48)
    parser.add_argument("--times", action="store_true", help="time a round of each head instead of counting tokens")
    return parser.parse_args(argv)


def make_heads(drafter, target) -> dict[str, nn.Module]:
    """Return every head untrained, by name and learning rate."""
    config, heads = drafter.config, {}
    sizes = config.hidden_size, config.vocab_size
    for rate in RATES:
        torch.manual_seed(0)
        for name, fields in CONFIGS.items():
            own = copy.deepcopy(config)
            for field, value in fields.items():
                setattr(own, field, value)
            head = HEADS[own.ar_head](own)
            head.apply(drafter._init_weights)
            heads[f"{name} @ {rate}"] = head
        heads[f"domino g256 r256 @ {rate}"] = DominoHead(*sizes, 256, 256, embedding_of(target, drafter))
        heads[f"dspark rnn r256 @ {rate}"] = RecurrentMarkovHead(*sizes, 256)
    return heads


def head_losses(drafter, target, heads: dict[str, nn.Module], batch: dict) -> dict[str, torch.Tensor]:
    """Return every head's loss on one batch, in nats per unit of slot weight, and the marginals' own."""
    lm_head = output_layer_of(target, drafter)
    blocks, ids, hidden, normed, rows = frozen_pass(drafter, target, batch)
    embeds, weights = embedding_of(target, drafter)(ids), slot_weights(blocks.depths, 5.5)
    with torch.no_grad():
        teacher = output_layer_of(target)(blocks.teacher_states).log_softmax(-1)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        divergence = F.kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
        return weighted_mean(divergence, weights)

    with torch.no_grad():
        base = lm_head(normed)
        losses = {"marginal": loss(base[rows])}
    for name, head in heads.items():
        if hasattr(head, "step"):
            losses[name] = loss((base + added_along(head, ids, normed))[rows])
        else:
            previous = embeds if name.startswith("swiglu") else head.previous(ids)
            losses[name] = loss(head.logits(head.states(drafter.norm, hidden, normed, previous)[rows], lm_head))
    return losses


def drafter_with(backbone, name: str, head: nn.Module | None):
    """Return a view of the backbone that drafts with a head."""
    view = without_head(backbone)
    if head is None:
        return view
    if hasattr(head, "step"):
        return drafting_along_paths(view, steps_of_state(head))
    for field, value in CONFIGS[name].items():
        setattr(view.config, field, value)
    view._modules["ar_head"] = head
    return view


def measure(target, backbone, heads: dict[str, nn.Module], prompts, args) -> dict:
    """Return tokens per pass of every head at each budget and draft temperature; finished counts are kept."""
    file = args.work / "counts.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    arms = {"marginal": None, **heads}
    for budget in BUDGETS:
        for temperature in TEMPERATURES:
            for name, head in arms.items():
                key = f"{name} B{budget} T{temperature}"
                if key not in known:
                    knobs = {"num_candidates": 16, "branching": 16, "draft_temperature": temperature}
                    drafter = with_knobs(drafter_with(backbone, name, head), tree_budget=budget, **knobs)
                    known[key] = counts(target, drafter, prompts, args.eval_tokens)
                    print(key, round(ratio(known[key]), 3), flush=True)
                    file.write_text(json.dumps(known))
    table = {}
    for name, head in arms.items():
        row = {"parameters": 0 if head is None else sum(weight.numel() for weight in head.parameters())}
        for budget in BUDGETS:
            own = {t: known[f"{name} B{budget} T{t}"] for t in TEMPERATURES}
            best = max(TEMPERATURES, key=lambda t: ratio(own[t]))
            rival = max((known[f"swiglu B{budget} T{t}"] for t in TEMPERATURES), key=ratio)
            row[f"B{budget}"] = {f"tau at draft temperature {t}": round(ratio(own[t]), 3) for t in TEMPERATURES}
            row[f"B{budget}"]["percent above swiglu, 95 % interval"] = against(own[best], rival)
        table[name] = row
    return table


def times(target, backbone, heads: dict[str, nn.Module], prompts, args) -> dict:
    """Return the median seconds of a round of every head that the package can run, arms in turn."""
    rounds: dict[str, list[float]] = {}
    for budget in BUDGETS:
        for repeat in range(6):
            for name, head in {"marginal": None, **heads}.items():
                if hasattr(head, "step"):
                    continue
                drafter = with_knobs(drafter_with(backbone, name, head), tree_budget=budget)
                started = time.perf_counter()
                own = counts(target, drafter, prompts[repeat % 3 : repeat % 3 + 1], args.eval_tokens)
                if repeat:
                    taken = (time.perf_counter() - started) / own[0][1]
                    rounds.setdefault(f"{name} B{budget}", []).append(taken)
    return {name: round(statistics.median(taken), 5) for name, taken in rounds.items()}


def main(argv: list[str] | None = None) -> None:
    """Train, measure, write."""
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "target")
    target = (
        AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32).eval().requires_grad_(False)
    )
    embedded = TreeFlashDraftModel.from_pretrained(EMBEDDED / "drafter", dtype=torch.float32).eval()
    backbone = without_head(embedded.requires_grad_(False))
    files, held_out = standard_library()
    prompts = function_prompts(tokenizer, files)
    random.Random(0).shuffle(prompts)
    with torch.autocast("cpu", torch.bfloat16):
        file = args.work / "responses.jsonl"
        options = {"batch_size": 64, "seed": 0, "max_new_tokens": 96, "do_sample": False}
        samples = regenerate(target, tokenizer, prompts[: args.prompts], file, **options)
    trained = make_heads(backbone, target)
    record = train(
        trained,
        lambda batch: head_losses(backbone, target, trained, batch),
        samples,
        lambda epoch: AnchorCollator(0, args.anchors, seed=epoch),
        args.work / "heads.pt",
        steps=args.steps,
        batch_size=args.batch_size,
    )
    heads = best_rates(trained, {name: mean_of_last(record, name, 50) for name in trained})
    evaluation = function_prompts(tokenizer, held_out)
    random.Random(0).shuffle(evaluation)
    ids = [prompt.input_ids for prompt in evaluation[: args.eval_prompts]]
    result = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.times:
        result["seconds per round"] = times(target, backbone, heads, ids, args)
    else:
        result |= {
            "command": shlex.join(["python", "benchmarks/heads.py", *(sys.argv[1:] if argv is None else argv)]),
            "environment": environment(target),
            "data": {"responses": len(samples), "tokens each": 96, "held-out prompts": len(ids)},
            "training": {"steps": args.steps, "batch": args.batch_size, "blocks per sequence": args.anchors},
            "loss over the last 50 steps": {n: round(mean_of_last(record, n, 50), 4) for n in record["losses"][0]},
            "heads": measure(target, backbone, heads, ids, args),
        }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
