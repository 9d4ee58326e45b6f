"""Train the drafter of SmolLM2-135M-Instruct from nothing but this package, in a given time.

The target writes prompts and answers for so many minutes; then the drafter trains for so many, at a learning rate that
falls with the clock, so that any machine ends with a finished drafter:

    python examples/train_smollm2.py --data_minutes 80 --train_minutes 90 --use_cpu --output_dir build/smollm2

Samples made before go in by `--samples FILE ...`. Interrupted, data and states stay; the drafter starts anew. On a
large GPU several processes with `--train_minutes 0` make data faster than one, each with a `--seed` of its own:

    python examples/train_smollm2.py --data_minutes 2 --train_minutes 0 --bf16 --generate_batch_size 1024 \\
        --max_prompt_tokens 160 --max_new_tokens 320 --seed 1 --output_dir build/data1
    python examples/train_smollm2.py --samples build/data*/data/greedy_*.jsonl build/data*/data/sampled_*.jsonl \\
        --data_minutes 0 --train_minutes 5 --bf16 --per_device_train_batch_size 64 --num_anchors 48 \\
        --learning_rate 2e-3 --loss_chunk_rows 8192 --dataloader_num_workers 4 --output_dir build/smollm2
"""

import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from train_drafter import DataArguments, block_efficiency, load_drafter, split
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback

from hf_treeflash.bench.models import smollm2
from hf_treeflash.training import (
    TreeFlashTrainer,
    TreeFlashTrainingArguments,
    load_samples,
    regenerate,
    self_prompts,
)


@dataclass
class TimedDataArguments(DataArguments):
    """What to train on, with the settings that suit this target."""

    target: str | None = field(default=None, metadata={"help": "folder of the target; made at first use"})
    data_minutes: float = field(default=80.0, metadata={"help": "for prompts and answers"})
    train_minutes: float = field(default=90.0, metadata={"help": "for the drafter; 0 for data alone"})
    generate_batch_size: int = field(default=48, metadata={"help": "texts the target writes at a time"})
    max_prompt_tokens: int = field(default=112, metadata={"help": "tokens per prompt"})
    max_new_tokens: int = field(default=240, metadata={"help": "tokens per answer"})
    eval_prompts: int = field(default=12, metadata={"help": "held-out prompts"})
    layers: int = field(default=4, metadata={"help": "layers of the drafter"})
    block_size: int = field(default=12, metadata={"help": "slots of the drafter"})
    mask_token_id: int = field(default=16, metadata={"help": "a token that chats never hold"})
    target_layer_ids: list[int] = field(
        default_factory=lambda: [1, 10, 19, 28], metadata={"help": "layers that the drafter reads"}
    )
    tree_budget: int = field(default=16, metadata={"help": "nodes per verify pass in the figure at the end"})


@dataclass
class TimedTrainingArguments(TreeFlashTrainingArguments):
    """Training arguments with the settings that suit this target."""

    stage: str = field(default="joint", metadata={"help": "backbone, head or joint"})
    backbone_learning_rate_scale: float = field(default=1.0, metadata={"help": "backbone's rate over the head's"})
    slot_decay: float = field(default=4.5, metadata={"help": "decay of the slots' weights, in slots"})
    draft_vocabulary: int | None = field(default=8192, metadata={"help": "frequent tokens that are drafted"})
    loss_vocabulary: int | None = field(default=8192, metadata={"help": "frequent tokens that the loss is over"})
    loss_chunk_rows: int = field(default=512, metadata={"help": "slots whose logits are held at once"})
    num_anchors: int = field(default=24, metadata={"help": "blocks per sequence and step"})
    learning_rate: float = field(default=1.2e-3, metadata={"help": "highest rate"})
    weight_decay: float = field(default=0.05, metadata={"help": "of AdamW"})
    adam_beta2: float = field(default=0.98, metadata={"help": "of AdamW"})
    max_length: int = field(default=640, metadata={"help": "longest sample, in tokens"})
    warmup_steps: float = field(default=100, metadata={"help": "steps in which the rate rises"})
    max_steps: int = field(default=1_000_000, metadata={"help": "more than the time allows"})
    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": "batches of like lengths"})
    save_strategy: str = field(default="no", metadata={"help": "checkpoints"})
    report_to: str = field(default="none", metadata={"help": "where to log"})


class TimedTrainer(TreeFlashTrainer):
    """Trains for some minutes: the learning rate falls with the clock, along a cosine."""

    def __init__(self, *args, minutes: float, **kwargs):
        super().__init__(*args, callbacks=[StopAtTheEnd(self)], **kwargs)
        self.seconds, self.began = 60 * minutes, None

    @property
    def spent(self) -> float:
        """The share of the time that is over, from the first step on."""
        if self.began is None:
            self.began = time.monotonic()
        return min(1.0, (time.monotonic() - self.began) / self.seconds)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Create the schedule."""
        warmup = max(1, self.args.warmup_steps)
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * self.spent)) / 2,
        )
        return self.lr_scheduler


class StopAtTheEnd(TrainerCallback):
    """Ends a training when its time is over."""

    def __init__(self, trainer: TimedTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """Look at the clock."""
        control.should_training_stop = self.trainer.spent == 1.0


def made_samples(target, tokenizer, data: TimedDataArguments, folder: Path, seed: int) -> list[dict]:
    """Have the target write prompts, and answer each greedily and drawn, batch by batch until the time is over."""
    end, samples, size = time.monotonic() + 60 * data.data_minutes, [], data.generate_batch_size
    asking = {"enable_thinking": False, "max_new_tokens": data.max_prompt_tokens, "seed": 1_000_000 * seed}
    answering = {"batch_size": size, "max_new_tokens": data.max_new_tokens}
    kinds = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 0}}
    for number in itertools.count():
        files = {kind: folder / f"{kind}_{number}.jsonl" for kind in kinds}
        if time.monotonic() >= end and not files["greedy"].exists():
            return samples
        prompts = self_prompts(
            target, tokenizer, size * (number + 1), folder / "prompts.jsonl", batch_size=size, **asking
        )[size * number :]
        for kind, sampling in kinds.items():
            answering["seed"] = 1_000_000 * seed + number
            samples += regenerate(target, tokenizer, prompts, files[kind], **answering, **sampling)


def main(argv: list[str] | None = None) -> float:
    """Make the data, train, save, and return the block efficiency on held-out prompts."""
    data, args = HfArgumentParser((TimedDataArguments, TimedTrainingArguments)).parse_args_into_dataclasses(argv)
    folder = data.target or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if args.bf16 else torch.float32)
    target.to(args.device).eval()
    samples = [sample for file in data.samples or () for sample in load_samples(file)]
    samples += made_samples(target, tokenizer, data, Path(args.output_dir, "data"), args.seed)
    training, evaluation, held_out = split(samples, data.eval_prompts)
    print(
        f"{len(training)} samples, {sum(len(s['input_ids']) - s['prompt_length'] for s in training)} response tokens"
    )
    if not data.train_minutes:
        return 0.0
    torch.manual_seed(args.seed)
    drafter = load_drafter(target, data, args.stage).float().to(args.device)
    trainer = TimedTrainer(
        drafter, args, minutes=data.train_minutes, target=target, train_dataset=training, eval_dataset=evaluation,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        reached = block_efficiency(target, drafter, held_out, data.tree_budget, args.eval_max_new_tokens)
    print(f"block efficiency at tree budget {data.tree_budget}, {len(held_out)} held-out prompts: {reached:.3f}")
    return reached


if __name__ == "__main__":
    main()
