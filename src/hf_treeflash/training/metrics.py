"""Metrics as sums and counts, divided once; and the block efficiency that generation really reaches."""

from collections.abc import Sequence

import torch

from .responses import left_padded


class MetricSums:
    """Sums and counts by name, kept on the device until they are asked for."""

    def __init__(self):
        self._pairs: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        """Add to a metric's sum and count."""
        device = torch.as_tensor(total).device
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device).detach() for x in (total, count)])
        self._pairs[name] = self._pairs[name] + pair if name in self._pairs else pair

    def pop(self, accelerator) -> dict[str, float]:
        """Reduce over all processes in one exchange, divide, and start anew; metrics without a count are left out."""
        if not self._pairs:
            return {}
        pairs = accelerator.reduce(torch.stack(list(self._pairs.values())).to(accelerator.device), "sum").tolist()
        names, self._pairs = list(self._pairs), {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}


def add_block_metrics(
    sums: MetricSums, prefix: str, correct: torch.Tensor, supervised: torch.Tensor, per_slot: bool
) -> None:
    """Add accuracies and the simulated block efficiency of the blocks of a batch.

    Args:
        sums ([`MetricSums`]):
            Where to add.
        prefix (`str`):
            `""` for the corrected distributions, `"base_"` for the marginal ones.
        correct (`torch.BoolTensor` of shape `(rows,)`):
            See [`RowScores`].
        supervised (`torch.BoolTensor` of shape `(batch, blocks, num_drafted)`):
            Which depths the rows are.
        per_slot (`bool`):
            Whether to add the accuracy at each depth too.
    """
    hits = torch.zeros_like(supervised)
    hits[supervised] = correct
    sums.add(f"{prefix}accuracy", hits.sum(), supervised.sum())
    # The best chain is accepted up to its first miss; the target's own token comes on top.
    whole = supervised.all(dim=-1)
    emitted = 1 + hits.long().cumprod(dim=-1).sum(dim=-1)
    sums.add(f"{prefix}simulated_block_efficiency", (emitted * whole).sum(), whole.sum())
    if per_slot:
        for slot in range(supervised.shape[-1]):
            sums.add(f"{prefix}accuracy_slot_{slot + 1}", hits[..., slot].sum(), supervised[..., slot].sum())


def measure_block_efficiency(
    target,
    drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    **generate_kwargs,
) -> tuple[int, int]:
    """Generate from prompts and count what speculation gave.

    Args:
        target, drafter ([`PreTrainedModel`]):
            The pair, with the drafter's own knobs.
        prompts (`Sequence[Sequence[int]]`):
            Token ids of each prompt.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Per prompt.
        batch_size (`int`, *optional*, defaults to 1):
            Prompts per call.
        generate_kwargs:
            Passed on to `generate`, which is greedy by default.

    Returns:
        `tuple[int, int]`: Emitted tokens, and the verify passes that emitted them; block efficiency is their ratio.
    """
    emitted = passes = 0
    pad_token_id = target.config.get_text_config(decoder=True).pad_token_id or 0
    options = {"do_sample": False, "pad_token_id": pad_token_id, **generate_kwargs}
    for start in range(0, len(prompts), batch_size):
        output = target.generate(
            **left_padded(prompts[start : start + batch_size], pad_token_id, target.device),
            assistant_model=drafter,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **options,
        )
        emitted += sum(map(sum, output.acceptance_lengths))
        passes += sum(map(len, output.acceptance_lengths))
    return emitted, passes
