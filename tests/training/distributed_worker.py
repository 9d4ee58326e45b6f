"""Run by test_distributed.py: short trainings, in one process or several."""

import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from hf_treeflash.training import TreeFlashTrainer, TreeFlashTrainingArguments
from hf_treeflash.training.adapters import LORA_TARGET_MODULES
from training.conftest import make_drafter, make_samples, make_target


def main(output: str, *modes: str) -> None:
    for mode in modes:
        run(Path(output, mode), mode)


def run(output: Path, mode: str) -> None:
    drafter = make_drafter(trained=True)
    if mode == "lora":
        torch.manual_seed(3)
        drafter = get_peft_model(drafter, LoraConfig(r=4, target_modules=LORA_TARGET_MODULES))
    world = int(torch.distributed.is_torchelastic_launched()) + 1
    args = TreeFlashTrainingArguments(
        output_dir=str(output),
        stage="joint",
        max_steps=3,
        per_device_train_batch_size=8 // world,
        per_device_eval_batch_size=8 // world,
        num_anchors=64,  # every position: all micro-batches weigh the same
        learning_rate=1e-2,
        optim="sgd",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        eval_max_new_tokens=8,
        shard_target=mode == "sharded",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
    )
    trainer = TreeFlashTrainer(
        drafter,
        args,
        target=make_target(),
        train_dataset=make_samples(24),
        eval_dataset=make_samples(8),
        eval_prompts=[sample["input_ids"][:6] for sample in make_samples(3)],
    )
    trainer.train()
    assert trainer.accelerator.num_processes == world
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        metrics = {key: value for entry in history for key, value in entry.items()}
        torch.save({"weights": dict(drafter.state_dict()), "metrics": metrics}, output / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # The results are on disk. Threads of libraries that outlive the interpreter may abort it now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
