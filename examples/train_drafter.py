"""Train a drafter for any target: a backbone from scratch, the head of a DFlash drafter, or both.

The responses are the target's own: prompts are read from chats or text, and the target answers them first, here or in
a server that already runs it (`--endpoint http://localhost:8000/v1`).

    python examples/train_drafter.py --target Qwen/Qwen3-4B --drafter z-lab/Qwen3-4B-DFlash-b16 \\
        --chats HuggingFaceH4/CodeAlpaca_20K --output_dir build/head --bf16

A head for a drafter that has none, on a laptop's CPU and from nothing but Python's own sources:

    python examples/train_drafter.py --target TARGET --drafter DFLASH_DRAFTER --stage head \\
        --text $(python -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")/*.py --prompts 1200 \\
        --eval_prompts 16 --max_new_tokens 112 --generate_batch_size 64 --eval_max_new_tokens 96 --tree_budget 32 \\
        --num_anchors 16 --per_device_train_batch_size 8 --max_steps 300 --learning_rate 3e-3 --warmup_steps 20 \\
        --lr_scheduler_type cosine --save_strategy no --report_to none --use_cpu --output_dir build/head

For a chat model, from nothing: it writes the prompts, too, and its states are computed once and kept on disk, so that
epochs cost the drafter only. A loss over the frequent tokens makes a large vocabulary cheap:

    python examples/train_drafter.py --target TARGET --mask_token_id 16 --stage joint --self_prompts 4000 \
        --backbone_learning_rate_scale 1.0 --target_states build/states --loss_vocabulary 6144 --output_dir build/chat

With `--ar_head markov` it gets DSpark's head instead, with `--ar_head selector` DFlash-2's.

Every option of `TrainingArguments` works too. Launch with `accelerate launch` for several processes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_treeflash import TreeFlashConfig, TreeFlashDraftModel
from hf_treeflash.training import (
    TreeFlashTrainer,
    TreeFlashTrainingArguments,
    ask_endpoint,
    chat_prompts,
    load_samples,
    measure_block_efficiency,
    regenerate,
    self_prompts,
    text_prompts,
)
from hf_treeflash.training.data import Prompt


@dataclass
class DataArguments:
    """What to train for, and on what."""

    target: str = field(metadata={"help": "folder or Hub id of the target"})
    drafter: str | None = field(default=None, metadata={"help": "drafter to start from; a fresh one without"})
    chats: str | None = field(default=None, metadata={"help": "JSONL file of chats, or a data set of `datasets`"})
    text: list[str] | None = field(default=None, metadata={"help": "plain text files, instead of chats"})
    self_prompts: int = field(default=0, metadata={"help": "prompts that a chat target writes itself"})
    samples: list[str] | None = field(default=None, metadata={"help": "files that `regenerate` wrote"})
    enable_thinking: bool = field(default=False, metadata={"help": "the chat template's thinking mode"})
    prompts: int = field(default=5000, metadata={"help": "prompts at most"})
    prompt_length: int = field(default=64, metadata={"help": "tokens per prompt, for text"})
    eval_prompts: int = field(default=16, metadata={"help": "held-out prompts to measure block efficiency with"})
    max_new_tokens: int = field(default=512, metadata={"help": "tokens per response"})
    do_sample: bool = field(default=False, metadata={"help": "sample the responses as the target's config says"})
    endpoint: str | None = field(default=None, metadata={"help": "OpenAI-compatible server that answers the chats"})
    endpoint_model: str | None = field(default=None, metadata={"help": "what it calls the target, if not `--target`"})
    generate_batch_size: int = field(default=16, metadata={"help": "prompts the target answers at a time"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "report and skip bad rows instead of refusing"})
    ar_head: str = field(
        default="swiglu",
        metadata={"help": "head for a drafter that has none", "choices": ["swiglu", "markov", "selector", "none"]},
    )
    head_rank: int = field(default=256, metadata={"help": "width of the token vectors of a markov or selector head"})
    layers: int = field(default=5, metadata={"help": "layers of a fresh drafter"})
    block_size: int = field(default=16, metadata={"help": "slots of a fresh drafter"})
    target_layer_ids: list[int] | None = field(default=None, metadata={"help": "layers that a fresh drafter reads"})
    mask_token_id: int | None = field(default=None, metadata={"help": "mask token of a fresh drafter"})
    tree_budget: int = field(default=32, metadata={"help": "nodes per verify pass in the comparison at the end"})


def load_prompts(target, tokenizer, data: DataArguments, output_dir: str) -> list[Prompt]:
    """Read prompts and shuffle them, or have the target write some."""
    on_bad_row = "skip" if data.skip_bad_rows else "refuse"
    if data.self_prompts:
        file, options = Path(output_dir, "prompts.jsonl"), {"batch_size": data.generate_batch_size}
        count = data.self_prompts + data.eval_prompts
        return self_prompts(target, tokenizer, count, file, enable_thinking=data.enable_thinking, **options)
    if data.text:
        stride = 4 * data.prompt_length
        prompts = text_prompts(tokenizer, data.text, length=data.prompt_length, stride=stride, on_bad_row=on_bad_row)
    elif data.chats:
        prompts = chat_prompts(tokenizer, data.chats, enable_thinking=data.enable_thinking, on_bad_row=on_bad_row)
    else:
        raise ValueError("Name the data: `--chats`, `--text`, `--samples` or `--self_prompts`.")
    random.Random(0).shuffle(prompts)
    return prompts[: data.prompts + data.eval_prompts]


def load_drafter(target, data: DataArguments, stage: str) -> TreeFlashDraftModel:
    """Load a drafter of any layout, with a fresh head where it has none, or build one in the target's shape."""
    none = stage == "backbone" or data.ar_head == "none"
    head: dict[str, Any] = {} if none else {"ar_head": data.ar_head, "head_rank": data.head_rank}
    if data.drafter is not None:
        drafter = TreeFlashDraftModel.from_pretrained(data.drafter, dtype=target.dtype)
        if drafter.ar_head is not None or not head:
            return drafter
        return TreeFlashDraftModel.from_pretrained(data.drafter, dtype=target.dtype, **head)
    if data.mask_token_id is None:
        raise ValueError("A fresh drafter needs `--mask_token_id`: a token of the vocabulary that text never holds.")
    config = target.config.get_text_config(decoder=True)
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shape += ("head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters")
    return TreeFlashDraftModel(
        TreeFlashConfig(
            **{name: getattr(config, name) for name in shape},
            **head,
            num_hidden_layers=data.layers,
            num_target_layers=config.num_hidden_layers,
            target_layer_ids=data.target_layer_ids,
            block_size=data.block_size,
            mask_token_id=data.mask_token_id,
        )
    ).to(target.dtype)


def answered(target, tokenizer, data: DataArguments, output_dir: str) -> list[dict]:
    """Return samples: those of files, and the target's answers to prompts."""
    samples = [sample for file in data.samples or () for sample in load_samples(file)]
    if data.samples and not (data.text or data.chats or data.self_prompts):
        return samples
    prompts, file = load_prompts(target, tokenizer, data, output_dir), Path(output_dir, "responses.jsonl")
    if data.endpoint:
        asked = {"model": data.endpoint_model or data.target, "enable_thinking": data.enable_thinking}
        asked |= {"max_tokens": data.max_new_tokens, "batch_size": data.generate_batch_size}
        asked |= {} if data.do_sample else {"temperature": 0.0}
        return samples + ask_endpoint(data.endpoint, tokenizer, prompts, file, **asked)
    made_from = {"enable_thinking": data.enable_thinking, "data": data.chats or data.text or "self_prompts"}
    return samples + regenerate(
        target,
        tokenizer,
        prompts,
        file,
        batch_size=data.generate_batch_size,
        provenance_extra=made_from,
        max_new_tokens=data.max_new_tokens,
        do_sample=data.do_sample,
    )


def prepare(target, tokenizer, data: DataArguments, output_dir: str) -> tuple[list[dict], list[dict], list[list[int]]]:
    """Return training samples, evaluation samples, and held-out prompts."""
    return split(answered(target, tokenizer, data, output_dir), data.eval_prompts)


def split(samples: list[dict], held_out: int) -> tuple[list[dict], list[dict], list[list[int]]]:
    """Hold the first prompts out, with all their answers.

    Returns:
        `tuple`: Training samples, evaluation samples, and the evaluation prompts. Samples added at the end later leave
        the evaluation as it is.
    """
    prompts = [tuple(sample["input_ids"][: sample["prompt_length"]]) for sample in samples]
    chosen = list(dict.fromkeys(prompts))[:held_out]
    training = [sample for sample, prompt in zip(samples, prompts, strict=True) if prompt not in set(chosen)]
    evaluation = [samples[prompts.index(prompt)] for prompt in chosen]
    return training, evaluation, [list(prompt) for prompt in chosen]


def block_efficiency(target, drafter, prompts: Sequence[Sequence[int]], tree_budget: int, new_tokens: int) -> float:
    """Return the block efficiency of a drafter at a tree budget."""
    knobs = drafter.generation_config
    before, knobs.tree_budget = knobs.tree_budget, tree_budget
    emitted, passes = measure_block_efficiency(target, drafter.eval(), prompts, max_new_tokens=new_tokens)
    knobs.tree_budget = before
    return emitted / passes


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, and return the block efficiency before and after."""
    data, args = HfArgumentParser((DataArguments, TreeFlashTrainingArguments)).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(data.target)
    target = AutoModelForCausalLM.from_pretrained(data.target, dtype="auto" if args.bf16 else torch.float32)
    target.to(args.device)
    samples, eval_samples, held_out = prepare(target, tokenizer, data, args.output_dir)
    drafter = load_drafter(target, data, args.stage).to(args.device)
    new_tokens = args.eval_max_new_tokens
    before = block_efficiency(target, drafter, held_out, data.tree_budget, new_tokens) if data.drafter else 1.0
    trainer = TreeFlashTrainer(
        drafter,
        args,
        target=target,
        train_dataset=samples,
        eval_dataset=eval_samples,
        eval_prompts=held_out,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        after = block_efficiency(target, drafter, held_out, data.tree_budget, new_tokens)
    print(
        f"block efficiency at tree budget {data.tree_budget}, {len(held_out)} held-out prompts: "
        f"{before:.3f} before, {after:.3f} after"
    )
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
