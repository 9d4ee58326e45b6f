"""Pairs of real shapes with random weights: honest times, and no τ."""

import json
import time
from argparse import Namespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from hf_treeflash import TreeFlashConfig, TreeFlashDraftModel
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, load_pair

QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "num_key_value_heads": 8, "head_dim": 128}
QWEN3_4B = QWEN3 | {"num_hidden_layers": 36, "num_attention_heads": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": QWEN3_4B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "qwen3-8b": QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    "tiny": {
        "vocab_size": 64,
        "max_position_embeddings": 40960,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}
# Drafters of small targets have fewer layers and shorter blocks.
SMALL = {
    "smollm2": {"num_hidden_layers": 3, "block_size": 12},
    "qwen3-0.6b": {"num_hidden_layers": 3, "block_size": 12},
}


def random_pair(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return an untrained target and drafter of a shape; taps are spread over the target's layers."""
    shape = {"model_type": "qwen3", **SHAPES[name]}
    layers = shape["num_hidden_layers"]
    with device:
        config = AutoConfig.for_model(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
        own = {key: value for key, value in shape.items() if key not in ("model_type", "tie_word_embeddings")}
        own |= {"num_hidden_layers": min(5, layers // 3)} | SMALL.get(name, {})
        if name in SMALL:
            own["target_layer_ids"] = [round(1 + tap * (layers - 3) / 4) for tap in range(5)]
        drafter_config = TreeFlashConfig(**own, num_target_layers=layers, ar_head="swiglu", mask_token_id=3)
        drafter = TreeFlashDraftModel._from_config(drafter_config, dtype=dtype)
    return target.eval(), drafter.eval()


def random_prompt(target, length: int) -> torch.Tensor:
    """Return ids of shape `(1, length)`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, target.config.vocab_size, (1, length), generator=generator).to(target.device)


def prepare(args: Namespace) -> tuple[Any, Any, list[torch.Tensor], dict]:
    """Return target, drafter, prompts, and what to write down of the pair."""
    if args.shape is None:
        target, tokenizer, drafter = load_pair(args.target, args.drafter, device=args.device, dtype=args.dtype)
        listed = json.loads(args.prompts.read_text(encoding="utf-8"))[: args.limit]
        thinking = getattr(args, "thinking", False)
        prompts = [encode_prompt(tokenizer, entry["prompt"], thinking) for entry in listed]
        return target, drafter, prompts, describe_pair(target, tokenizer, drafter, thinking)
    dtype = getattr(torch, args.dtype or "float32")
    target, drafter = random_pair(args.shape, torch.device(args.device or "cpu"), dtype)
    if args.draft_vocabulary is not None:
        drafter.set_draft_vocabulary(torch.arange(args.draft_vocabulary))
    described = {"shape": args.shape, "context": args.context, "draft_vocabulary": args.draft_vocabulary}
    return target, drafter, [random_prompt(target, args.context)], described


class FirstToken(BaseStreamer):
    """Notes when the prompt had been read."""

    def __init__(self):
        self.puts, self.since = 0, 0.0

    def put(self, value) -> None:
        self.puts += 1
        if self.puts == 2:  # the first is the prompt itself
            self.since = time.perf_counter()

    def end(self) -> None:
        pass


def pass_ms(target, drafter, prompt: torch.Tensor, max_new_tokens: int, **options) -> float:
    """Decode greedily and return milliseconds per target pass, prefill excluded: a plain step, or a round."""
    clock = FirstToken()
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=drafter,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        streamer=clock,
        return_dict_in_generate=True,
        **options,
    )
    seconds = time.perf_counter() - clock.since
    passes = max_new_tokens - 1 if drafter is None else len(output.acceptance_lengths[0])
    return seconds * 1e3 / passes
