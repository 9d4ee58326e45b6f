"""The generations that every arm of a comparison makes: the same batches, seeds and settings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .arms import Arm


class Calls:
    """The generations that every arm makes.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        prompts (`Sequence[torch.LongTensor]` of shape `(1, length)`):
            Prompts.
        batch_size (`int`):
            Prompts per generation.
        seed (`int`):
            Of the first.
        generate_kwargs (`dict`):
            Arguments of `generate` for all arms.
    """

    def __init__(self, target, prompts, batch_size: int, seed: int, generate_kwargs: dict[str, Any]):
        self.target, self.seed, self.generate_kwargs = target, seed, generate_kwargs
        config = target.generation_config
        ends = generate_kwargs.get("eos_token_id", config.eos_token_id)
        self.ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
        pad = next((pad for pad in (config.pad_token_id, *self.ends) if pad is not None), 0)
        prompts = [prompt.to(target.device) for prompt in prompts]
        self.batches = [
            left_padded(prompts[first : first + batch_size], pad) for first in range(0, len(prompts), batch_size)
        ]
        if batch_size > 1 and config.pad_token_id is None:
            self.generate_kwargs = {"pad_token_id": pad, **generate_kwargs}

    def decode(self, arm: Arm, index: int, **more):
        """Generate a batch in one arm's way."""
        torch.manual_seed(self.seed + index)
        with arm.around():
            return self.target.generate(
                **self.batches[index],
                assistant_model=arm.drafter,
                **self.generate_kwargs,
                **arm.options,
                **more,
            )

    def texts(self, sequences: torch.Tensor, index: int) -> list[list[int]]:
        """Return a batch's new tokens, each text up to its end."""
        rows = sequences[:, self.batches[index]["input_ids"].shape[1] :].tolist()
        return [row[: next((at + 1 for at, token in enumerate(row) if token in self.ends), len(row))] for row in rows]


def left_padded(prompts: Sequence[torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack prompts of shape `(1, length)` into one batch with its attention mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    before = [(longest - prompt.shape[1], 0) for prompt in prompts]
    ids = [F.pad(prompt, pad, value=pad_token_id) for prompt, pad in zip(prompts, before, strict=True)]
    masks = [F.pad(torch.ones_like(prompt), pad) for prompt, pad in zip(prompts, before, strict=True)]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}
