"""Tiny seeded pairs and data; nothing is downloaded."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf_treeflash import TreeFlashConfig, TreeFlashDraftModel
from hf_treeflash.training import TreeFlashTrainer, TreeFlashTrainingArguments

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8}


def make_target() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(num_hidden_layers=4, tie_word_embeddings=False, initializer_range=0.3, **SHAPE)
    config.eos_token_id = config.pad_token_id = 0
    return Qwen3ForCausalLM(config).eval()


def make_drafter(head: bool = True, trained: bool = False, **overrides) -> TreeFlashDraftModel:
    torch.manual_seed(1)
    options = {"num_hidden_layers": 2, "num_target_layers": 4, "target_layer_ids": [0, 2, 3], "block_size": 4}
    options |= {"mask_token_id": 1, "ar_head": "swiglu" if head else None, "initializer_range": 0.2}
    drafter = TreeFlashDraftModel(TreeFlashConfig(**SHAPE, **options | overrides)).eval()
    if trained:
        torch.nn.init.normal_(drafter.ar_head.down_proj.weight, std=0.2)
    return drafter


def make_samples(count: int, length: int = 20, prompt_length: int = 4) -> list[dict]:
    ids = torch.randint(2, 64, (count, length), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "prompt_length": prompt_length} for row in ids.tolist()]


@pytest.fixture(scope="session")
def target():
    return make_target().requires_grad_(False)


@pytest.fixture
def samples():
    return make_samples(16)


@pytest.fixture
def train(target, tmp_path):
    """Train a drafter for a few steps; returns the trainer."""

    def run(drafter, data, resume=None, **options) -> TreeFlashTrainer:
        defaults = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 8}
        defaults |= {"num_anchors": 5, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
        defaults |= {"save_strategy": "no", "logging_steps": 1, "dataloader_num_workers": 0, "max_length": 64}
        names = ("target", "eval_dataset", "eval_prompts", "callbacks")
        others = {"target": target, **{key: options.pop(key) for key in names if key in options}}
        args = TreeFlashTrainingArguments(**defaults | options)
        trainer = TreeFlashTrainer(drafter, args, train_dataset=data, **others)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run
