"""Tiny seeded targets and drafters for tests."""

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hf_treeflash import TreeFlashConfig, TreeFlashDraftModel

VOCAB = 24
# Wide enough that logits are far apart: greedy choices must not hang on rounding.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def tiny_target(family: str = "qwen3", seed: int = 0, **overrides):
    """Return an untrained fp32 target in evaluation mode."""
    shape = {**SHAPE, **overrides}
    configs = {
        "qwen3": Qwen3Config,
        "llama": LlamaConfig,
        "mistral": lambda **kw: MistralConfig(**{"sliding_window": 12, **kw}),
        "qwen3_moe": lambda **kw: Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1, **kw
        ),
        "qwen3_sliding": lambda **kw: Qwen3Config(
            use_sliding_window=True,
            sliding_window=12,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            **kw,
        ),
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(configs[family](**shape)).eval()


def tiny_drafter(head: bool = True, seed: int = 1, **overrides):
    """Return an untrained fp32 drafter for [`tiny_target`]; its head is random rather than zero."""
    arguments = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "num_target_layers": 4,
        "target_layer_ids": [0, 2],
        "block_size": 8,
        "mask_token_id": 3,
        "ar_head": "swiglu" if head else None,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    torch.manual_seed(seed)
    drafter = TreeFlashDraftModel(TreeFlashConfig(**{**arguments, **overrides})).eval()
    if head:
        for module in drafter.modules():  # whatever is zero at first
            if hasattr(module, "_zero_init"):
                torch.nn.init.normal_(module.weight, std=0.3)
    return drafter


def with_knobs(drafter, **knobs):
    for name, value in knobs.items():
        setattr(drafter.generation_config, name, value)
    return drafter


def keeping(drafter, *tokens: int):
    """Return the drafter with these tokens as its draft vocabulary."""
    drafter.set_draft_vocabulary(torch.tensor(tokens))
    return drafter


def prompt(length: int = 7, batch: int = 1, seed: int = 5) -> torch.Tensor:
    """Return random ids without special tokens."""
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
