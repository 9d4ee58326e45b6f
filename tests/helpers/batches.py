"""Batches whose rows differ, and criteria that tell rows apart."""

import torch
from transformers import StoppingCriteria

from tests.helpers.tiny import prompt


def padded(batch: int = 5, length: int = 14, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return prompts of different lengths, padded on the left."""
    ids = prompt(length, batch=batch, seed=seed)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 3 * row % (length - 1)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}


class OwnLimit(StoppingCriteria):
    """A limit for each row, told apart by the row's index."""

    def __init__(self, limits):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.limits
