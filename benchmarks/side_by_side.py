"""What comparisons of heads on one frozen backbone share: training side by side, tokens per pass, and intervals."""

import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from hf_treeflash.training.blocks import Blocks, make_blocks
from hf_treeflash.training.responses import left_padded


class FrozenPass(NamedTuple):
    """A pass of the frozen backbone over a batch.

    Attributes:
        blocks ([`Blocks`]):
            Of the batch.
        ids (`torch.LongTensor` of shape `(blocks, depth)`):
            The true token before each slot.
        hidden, normed (`torch.Tensor` of shape `(blocks, depth, hidden_size)`):
            States of the slots before and after the final norm.
        rows (`torch.BoolTensor` of shape `(blocks, depth)`):
            Which slots are supervised.
    """

    blocks: Blocks
    ids: torch.Tensor
    hidden: torch.Tensor
    normed: torch.Tensor
    rows: torch.Tensor


@torch.no_grad()
def frozen_pass(drafter, target, batch: dict[str, torch.Tensor]) -> FrozenPass:
    """Run the backbone over a collated batch."""
    blocks = make_blocks(drafter, target, batch, with_head=True)
    ids = blocks.inputs.pop("previous_ids")
    blocks.inputs.pop("previous_embeds", None)
    hidden = drafter.backbone(cache=None, **blocks.inputs)
    size, first = drafter.config.block_size, drafter.config.first_slot
    hidden = hidden.view(-1, size, hidden.shape[-1])[:, first:]
    return FrozenPass(
        blocks, ids.view(-1, size)[:, first:], hidden, drafter.norm(hidden), blocks.supervised.flatten(0, 1)
    )


def train(
    heads: dict[str, nn.Module],
    losses_of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    samples: list[dict],
    collate: Callable[[int], Callable[[list[dict]], dict[str, torch.Tensor]]],
    file: Path,
    *,
    steps: int,
    batch_size: int,
) -> dict:
    """Train heads on the same batches, or go on from the last checkpoint.

    Args:
        heads (`dict[str, nn.Module]`):
            By name and learning rate, such as `"swiglu @ 0.001"`; trained in place.
        losses_of (`Callable`):
            Takes a batch; returns the loss of each head, and of others that do not train.
        samples (`list[dict]`):
            With `input_ids` and `prompt_length`.
        collate (`Callable`):
            Takes the number of an epoch; returns its collator.
        file (`Path`):
            The checkpoint, written every 25 steps.
        steps (`int`), batch_size (`int`):
            Of the whole training.

    Returns:
        `dict`: `step`, `seconds`, and the `losses` of each step.
    """
    groups = [{"params": list(head.parameters()), "lr": float(name.split("@")[1])} for name, head in heads.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    record: dict = {"step": 0, "seconds": 0.0, "losses": []}
    if file.exists():
        stored = torch.load(file, weights_only=True)
        for name, head in heads.items():
            head.load_state_dict(stored["heads"][name])
        optimizer.load_state_dict(stored["optimizer"])
        schedule.load_state_dict(stored["schedule"])
        record = stored["record"]
    per_epoch = len(samples) // batch_size
    for step in range(record["step"], steps):
        started = time.perf_counter()
        epoch, at = step // per_epoch, step % per_epoch * batch_size
        order = random.Random(epoch).sample(range(len(samples)), len(samples))
        losses = losses_of(collate(epoch)([samples[i] for i in order[at : at + batch_size]]))
        optimizer.zero_grad()
        torch.stack([losses[name] for name in heads]).sum().backward()
        optimizer.step()
        schedule.step()
        record["losses"].append({name: loss.item() for name, loss in losses.items()})
        record["seconds"] += time.perf_counter() - started
        record["step"] = step + 1
        if (step + 1) % 25 == 0 or step + 1 == steps:
            last = {name: round(mean_of_last(record, name, 25), 3) for name in losses}
            print(step + 1, round(record["seconds"]), last, flush=True)
            states = {name: head.state_dict() for name, head in heads.items()}
            parts = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "record": record}
            unfinished = file.with_suffix(".unfinished")
            torch.save({"heads": states, **parts}, unfinished)
            unfinished.rename(file)  # at once: an interrupted run keeps the checkpoint before
    return record


def mean_of_last(record: dict, name: str, steps: int) -> float:
    """Return the mean loss of a head over the last steps."""
    return statistics.fmean(losses[name] for losses in record["losses"][-steps:])


def best_rates(heads: dict[str, nn.Module], losses: dict[str, float]) -> dict[str, nn.Module]:
    """Return of every name the head with the lower loss, for use alone."""
    best: dict[str, str] = {}
    for full in heads:
        name = full.split(" @ ")[0]
        best[name] = min(best.get(name, full), full, key=losses.__getitem__)
    return {name: heads[full].eval().requires_grad_(False) for name, full in best.items()}


@torch.no_grad()
def counts(target, drafter, prompts: list[list[int]], new_tokens: int) -> list[tuple[int, int]]:
    """Return each prompt's emitted tokens and the verify passes that emitted them, greedily."""
    output = target.generate(
        **left_padded(prompts, 0, target.device),
        assistant_model=drafter,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    return [(sum(row), len(row)) for row in output.acceptance_lengths]


def ratio(own: list) -> float:
    """Return tokens per pass of counts of prompts."""
    return sum(emitted for emitted, _ in own) / sum(passes for _, passes in own)


def against(own: list, other: list, draws: int = 2000) -> list[float]:
    """Return by how much one arm is above another, in percent, with the 95 % interval of a bootstrap over prompts."""
    generator, gains = random.Random(0), []
    for _ in range(draws):
        chosen = generator.choices(range(len(own)), k=len(own))
        gains.append(ratio([own[i] for i in chosen]) / ratio([other[i] for i in chosen]))
    gains.sort()
    middle = ratio(own) / ratio(other)
    return [round(100 * (gain - 1), 1) for gain in (middle, gains[draws // 40], gains[-draws // 40])]
