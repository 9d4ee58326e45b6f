"""Train the small pair that ships with the package, from the standard library's sources, on a 2-core CPU.

python examples/train_tiny_pair.py --work build/tiny --output src/hf_treeflash/tiny

An interrupted run goes on where it stopped. Beside the pair it trains what the pair is compared with: a backbone that
spends the same data and the same steps on itself.
"""

import argparse
import ast
import copy
import json
import platform
import random
import shlex
import sys
import time
from pathlib import Path

import torch
import train_tiny_target
import transformers
from train_tiny_target import distinct_fraction, optimizers, standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_treeflash import TreeFlashConfig, TreeFlashDraftModel
from hf_treeflash.training import (
    TreeFlashTrainer,
    TreeFlashTrainingArguments,
    measure_block_efficiency,
    regenerate,
    text_samples,
)
from hf_treeflash.training.data import Prompt
from hf_treeflash.training.responses import left_padded

BUDGETS = (16, 64)
# Below 1, since a greedy target takes its likeliest token more often than its distribution says.
TEMPERATURES = (1.0, 0.6, 0.4)
KNOBS = [(8, 8), (12, 8), (16, 4), (16, 8), (24, 8), (32, 8)]  # tree budget, candidates


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, as one optimizer for [`Trainer`]."""

    def __init__(self, model):
        self.parts = optimizers(model)
        super().__init__([p for p in model.parameters() if p.requires_grad], {})
        # The same dictionaries, so that a scheduler reaches both.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        """Step both."""
        for part in self.parts:
            part.step()

    def state_dict(self):
        """Return both states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict):
        """Load both states."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def function_prompts(tokenizer, files: list[Path], least: int = 32, most: int = 96) -> list[Prompt]:
    """Cut the start of every longer function, at the end of the line that brings it to `least` tokens."""
    prompts = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        for node in sorted(functions, key=lambda node: node.lineno):
            if (node.end_lineno or 0) - node.lineno < 10:
                continue
            for end in range(node.lineno + 1, node.end_lineno or 0):
                ids = tokenizer("\n".join(lines[node.lineno - 1 : end]))["input_ids"]
                if len(ids) >= least:
                    break
            if least <= len(ids) <= most:
                prompts.append(Prompt(ids, f"{file.parent.name}/{file.name}:{node.lineno}"))
    return prompts


def training_samples(target, tokenizer, args) -> tuple[list[dict], list[dict]]:
    """Return function starts continued by the target, greedily and by sampling; and windows of the text itself."""
    files, _ = standard_library()
    prompts = function_prompts(tokenizer, files)
    random.Random(args.seed).shuffle(prompts)
    greedy, sampled = prompts[: args.greedy], prompts[args.greedy : args.greedy + args.sampled]
    options = {"batch_size": 64, "seed": args.seed, "max_new_tokens": args.new_tokens}
    with torch.autocast("cpu", torch.bfloat16):
        responses = regenerate(target, tokenizer, greedy, args.work / "greedy.jsonl", do_sample=False, **options)
        responses += regenerate(target, tokenizer, sampled, args.work / "sampled.jsonl", do_sample=True, **options)
    text = text_samples(tokenizer, files, length=192, on_bad_row="skip")
    return responses, random.Random(args.seed).sample(text, min(args.text, len(text)))


def new_drafter(target) -> TreeFlashDraftModel:
    """Build the untrained drafter."""
    config = TreeFlashConfig(
        vocab_size=target.config.vocab_size,
        hidden_size=target.config.hidden_size,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=target.config.num_attention_heads,
        num_key_value_heads=target.config.num_key_value_heads,
        head_dim=target.config.head_dim,
        max_position_embeddings=target.config.max_position_embeddings,
        rope_parameters=target.config.rope_parameters,
        num_target_layers=target.config.num_hidden_layers,
        target_layer_ids=[1, 8, 15, 22, 29, 35],
        block_size=12,
        mask_token_id=1,
        ar_head="swiglu",
    )
    drafter = TreeFlashDraftModel(config)
    drafter.config.architectures = ["TreeFlashDraftModel"]
    return drafter


def train_stage(name: str, drafter, target, samples, steps: int, schedule: str, args, **options) -> dict:
    """Train one stage, or load what an earlier run finished; the drafter ends up in `work/<name>`."""
    folder, record_file = args.work / name, args.work / f"{name}.json"
    if record_file.exists():
        trained = TreeFlashDraftModel.from_pretrained(folder, dtype=torch.float32)
        drafter.load_state_dict(trained.state_dict())
        return json.loads(record_file.read_text())
    training_args = TreeFlashTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        num_anchors=args.anchors,
        lr_scheduler_type=schedule,
        warmup_steps=20,
        slot_decay=5.5,
        loss="kl",
        seed=args.seed,
        save_steps=100,
        save_total_limit=1,
        logging_steps=20,
        report_to=[],
        use_cpu=True,
        bf16=True,
        **options,
    )
    trainer = TreeFlashTrainer(drafter, training_args, target=target, train_dataset=samples)
    trainer.optimizer = MuonAndAdamW(drafter)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {"steps": steps, "seconds": round(time.perf_counter() - started, 1), "options": options, "log": log}
    record_file.write_text(json.dumps(record, indent=1))
    return record


def tau(target, drafter, prompts, new_tokens: int, budget: int, temperature: float) -> float:
    """Return the greedy block efficiency at a tree budget and draft temperature."""
    knobs = drafter.generation_config
    knobs.tree_budget, knobs.num_candidates, knobs.branching = budget, 16, 16
    knobs.draft_temperature = temperature
    options = {"max_new_tokens": new_tokens, "batch_size": 32, "eos_token_id": None}
    emitted, passes = measure_block_efficiency(target, drafter, prompts, **options)
    return round(emitted / passes, 4)


def greedy_texts(target, prompts, new_tokens: int, **kwargs) -> tuple[list[list[int]], float]:
    """Return greedy continuations, and the processor time of one token in seconds."""
    started, rows = time.process_time(), []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        output = target.generate(
            ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs
        )
        rows.append(output[0, ids.shape[1] :].tolist())
    return rows, (time.process_time() - started) / sum(len(row) for row in rows)


def choose_knobs(target, drafter, prompts, new_tokens: int) -> list[dict]:
    """Set the knobs that take the least processor time per token; return all that were tried."""
    plain_rows, plain = greedy_texts(target, prompts, new_tokens)
    trials, knobs = [], drafter.generation_config
    for budget, candidates in KNOBS:
        knobs.tree_budget, knobs.num_candidates, knobs.branching = budget, candidates, candidates
        rows, seconds = greedy_texts(target, prompts, new_tokens, assistant_model=drafter)
        trial = {"tree_budget": budget, "num_candidates": candidates, "branching": candidates}
        trial["draft_temperature"] = knobs.draft_temperature
        trials.append(trial | {"speed_up": round(plain / seconds, 3), "identical": rows == plain_rows})
    best = max(trials, key=lambda trial: trial["speed_up"])
    knobs.tree_budget, knobs.num_candidates, knobs.branching = (
        best[name] for name in ("tree_budget", "num_candidates", "branching")
    )
    return trials


def evaluate(target, pair: dict[str, TreeFlashDraftModel], prompts: list[Prompt], others: list[Prompt], args) -> dict:
    """Return block efficiencies at each budget, what the knobs cost, and how repetitive the target's text is.

    Every arm drafts at the temperature that suits it best on the `others`, and at 1.
    """
    ids, other_ids = ([prompt.input_ids for prompt in part] for part in (prompts, others))
    figures: dict = {name: {} for name in pair}
    for name, drafter in pair.items():
        for budget in BUDGETS:
            options = {"new_tokens": args.eval_tokens, "budget": budget}
            best = max(TEMPERATURES, key=lambda t: tau(target, drafter, other_ids, temperature=t, **options))
            figures[name][f"B{budget}"] = {
                "draft_temperature": best,
                "block_efficiency": tau(target, drafter, ids, temperature=best, **options),
                "block_efficiency_at_1": tau(target, drafter, ids, temperature=1.0, **options),
            }
    for kind in ("block_efficiency", "block_efficiency_at_1"):
        gains = {b: round(arm[kind] / figures["marginal"][b][kind] - 1, 4) for b, arm in figures["treeflash"].items()}
        figures[f"gain_in_{kind}"] = gains
    pair["treeflash"].generation_config.draft_temperature = figures["treeflash"]["B16"]["draft_temperature"]
    figures["knobs"] = choose_knobs(target, pair["treeflash"], other_ids[:8], args.eval_tokens)
    inputs = left_padded(ids, 0, "cpu")
    texts = target.generate(**inputs, max_new_tokens=128, do_sample=False, eos_token_id=None, pad_token_id=0)
    figures["distinct_4_grams"] = round(distinct_fraction(texts[:, inputs["input_ids"].shape[1] :].tolist()), 4)
    return figures | {"prompts": len(ids), "new_tokens": args.eval_tokens}


def main(argv: list[str] | None = None) -> dict:
    """Train the pair and write it; return the training record."""
    parser = train_tiny_target.add_arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    parser.add_argument("--output", type=Path, default=Path("src/hf_treeflash/tiny"))
    parser.add_argument("--greedy", type=int, default=2048, help="prompts the target continues greedily")
    parser.add_argument("--sampled", type=int, default=256, help="prompts it continues by sampling")
    parser.add_argument("--text", type=int, default=4096, help="windows of plain text")
    parser.add_argument("--new-tokens", type=int, default=128, help="per response")
    parser.add_argument("--shared-steps", type=int, default=1400, help="backbone steps both drafters share")
    parser.add_argument(
        "--last-steps", type=int, default=800, help="steps each drafter then takes by itself, on responses"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--anchors", type=int, default=12, help="blocks per sequence")
    parser.add_argument("--eval-prompts", type=int, default=32)
    parser.add_argument("--eval-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    began = time.perf_counter()
    target_folder = train_tiny_target.run(args)
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    started = time.perf_counter()
    responses, text = training_samples(target, tokenizer, args)
    seconds = {"responses": round(time.perf_counter() - started, 1)}

    torch.manual_seed(args.seed)
    drafter = new_drafter(target)
    half = copy.deepcopy(target).to(torch.bfloat16)  # loses nothing: the weights were saved in bfloat16
    first, last = (args.shared_steps, "constant_with_warmup"), (args.last_steps, "cosine")
    stages = {"shared": train_stage("shared", drafter, half, responses + text, *first, args, stage="backbone")}
    marginal = copy.deepcopy(drafter)
    stages["marginal"] = train_stage("marginal", marginal, half, responses, *last, args, stage="backbone")
    stages["treeflash"] = train_stage("treeflash", drafter, half, responses, *last, args, stage="joint")
    marginal.ar_head, marginal.config.ar_head = None, None
    pair = {name: model.to(torch.bfloat16).float().eval() for name, model in
            (("marginal", marginal), ("treeflash", drafter))}  # fmt: skip

    held_out = function_prompts(tokenizer, standard_library()[1])
    random.Random(args.seed).shuffle(held_out)
    held_out, others = held_out[: args.eval_prompts], held_out[args.eval_prompts : 2 * args.eval_prompts]
    record = {
        "command": shlex.join(["python", "examples/train_tiny_pair.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "target": json.loads((args.work / "target.json").read_text()),
        "samples": {"greedy": args.greedy, "sampled": args.sampled, "text": len(text)},
        "responses_seconds": seconds["responses"],
        "stages": stages,
        "held_out": evaluate(target, pair, held_out, others, args),
        "run_seconds": round(time.perf_counter() - began, 1),
    }
    write(args.output, target, tokenizer, drafter, held_out, record)
    return record


def write(folder: Path, target, tokenizer, drafter, held_out: list[Prompt], record: dict) -> None:
    """Write the pair in bfloat16, its record and the held-out prompts."""
    target.to(torch.bfloat16).save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    drafter.to(torch.bfloat16).save_pretrained(folder / "drafter")
    (folder / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    prompts = [{"source": prompt.source, "prompt": tokenizer.decode(prompt.input_ids)} for prompt in held_out]
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    print(json.dumps(record["held_out"], indent=1))


if __name__ == "__main__":
    main()
