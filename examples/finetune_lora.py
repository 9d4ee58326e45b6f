"""Adapt a drafter to a domain with LoRA: projections of its layers and of the AR head.

    python examples/finetune_lora.py --target src/hf_treeflash/tiny/target \\
        --drafter src/hf_treeflash/tiny/drafter --text /usr/include/*.h --skip_bad_rows --prompts 432 \\
        --eval_prompts 16 --max_new_tokens 96 --generate_batch_size 64 --eval_max_new_tokens 64 --tree_budget 32 \\
        --num_anchors 16 --per_device_train_batch_size 8 --max_steps 150 --learning_rate 1e-3 --warmup_steps 10 \\
        --lr_scheduler_type cosine --save_strategy no --report_to none --use_cpu --output_dir build/lora

Options are those of `train_drafter.py`, and those below; the drafter must have a trained head. Use the adapter like a
drafter: `AutoModel.from_pretrained(adapter_folder)`.
"""

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from train_drafter import DataArguments, block_efficiency, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.training import TreeFlashTrainer, TreeFlashTrainingArguments
from hf_treeflash.training.adapters import LORA_TARGET_MODULES, forget_base_path


@dataclass
class LoraArguments:
    """The adapter."""

    rank: int = field(default=16, metadata={"help": "rank of the adapter's matrices"})
    alpha: int = field(default=32, metadata={"help": "scale of the adapter, over its rank"})
    base_id: str | None = field(default=None, metadata={"help": "Hub id to record for the drafter, not its folder"})


@dataclass
class LoraTrainingArguments(TreeFlashTrainingArguments):
    """Defaults that suit adapters: both losses, so that the shortlists stay good, and a higher learning rate."""

    stage: str = field(default="joint", metadata={"help": "which losses: head or joint"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "epochs"})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train an adapter, save it, and return the block efficiency before and after."""
    parser = HfArgumentParser((DataArguments, LoraArguments, LoraTrainingArguments))
    data, lora, args = parser.parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(data.target)
    dtype = "auto" if args.bf16 else torch.float32
    target = AutoModelForCausalLM.from_pretrained(data.target, dtype=dtype).to(args.device)
    samples, eval_samples, held_out = prepare(target, tokenizer, data, args.output_dir)
    drafter = TreeFlashDraftModel.from_pretrained(data.drafter, dtype=dtype).to(args.device)
    before = block_efficiency(target, drafter, held_out, data.tree_budget, args.eval_max_new_tokens)
    config = LoraConfig(
        task_type=None,  # the drafter is no task model of PEFT's: the types rewrite its forward
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=LORA_TARGET_MODULES,
    )
    adapted = get_peft_model(drafter, config)
    adapted.print_trainable_parameters()
    trainer = TreeFlashTrainer(
        adapted, args, target=target, train_dataset=samples, eval_dataset=eval_samples, eval_prompts=held_out
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if lora.base_id is not None:
        forget_base_path(args.output_dir, lora.base_id)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        after = block_efficiency(target, adapted, held_out, data.tree_budget, args.eval_max_new_tokens)
    print(
        f"block efficiency at tree budget {data.tree_budget}, {len(held_out)} held-out prompts: "
        f"{before:.3f} before, {after:.3f} with the adapter"
    )
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
