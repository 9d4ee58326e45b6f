"""Loss per slot, computed for some slots at a time: their logits never exist all at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class RowScores(NamedTuple):
    """How well rows of states predict.

    Attributes:
        loss (`torch.FloatTensor` of shape `(rows,)`, nats):
            Differentiable.
        correct (`torch.BoolTensor` of shape `(rows,)`):
            Whether the most likely token is the label.
        recalled (`torch.BoolTensor` of shape `(rows,)`):
            Whether the label is among the most likely `num_candidates` tokens.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    recalled: torch.Tensor


def slot_weights(slots: torch.Tensor, decay: float) -> torch.Tensor:
    """Return the weight of slots numbered from 1: `exp(-(k - 1) / decay)`; nothing after a wrong slot is accepted."""
    return torch.exp(-(slots - 1).float() / decay)


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean, 0 for no values: what a micro-batch's losses are reduced with, everywhere."""
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def score_rows(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    labels: torch.Tensor,
    teacher_states: torch.Tensor | None = None,
    *,
    teacher_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    num_candidates: int,
    chunk_rows: int,
) -> RowScores:
    """Score rows of drafter states against labels or against the target.

    Args:
        lm_head (`Callable`):
            The target's output layer as the drafter reads it, frozen.
        states (`torch.Tensor` of shape `(rows, hidden_size)`):
            Normed drafter states.
        labels (`torch.LongTensor` of shape `(rows,)`):
            Tokens to predict.
        teacher_states (`torch.Tensor` of shape `(rows, hidden_size)`, *optional*):
            The target's final states; with them the loss is the forward KL to the target, else the cross-entropy.
        teacher_head (`Callable`, *optional*):
            The output layer as the target reads it; by default the same.
        num_candidates (`int`):
            Length of the shortlist that `recalled` is about.
        chunk_rows (`int`):
            Rows whose logits are held at once; they are computed again in the backward pass.

    Returns:
        [`RowScores`]
    """
    chunks = zip(
        states.split(chunk_rows),
        labels.split(chunk_rows),
        [None] * max(1, -(-len(states) // chunk_rows)) if teacher_states is None else teacher_states.split(chunk_rows),
        strict=True,
    )
    heads = lm_head, teacher_head or lm_head
    scores = [checkpoint(_score_chunk, heads, *chunk, num_candidates, use_reentrant=False) for chunk in chunks]
    return RowScores(*(torch.cat(parts) for parts in zip(*scores, strict=True)))


def _score_chunk(heads, states, labels, teacher_states, num_candidates) -> tuple[torch.Tensor, ...]:
    lm_head, teacher_head = heads
    logits = lm_head(states).float()
    if teacher_states is None:
        loss = F.cross_entropy(logits, labels, reduction="none")
    else:
        with torch.no_grad():
            teacher = teacher_head(teacher_states).float().log_softmax(dim=-1)
        loss = F.kl_div(logits.log_softmax(dim=-1), teacher, reduction="none", log_target=True).sum(dim=-1)
    with torch.no_grad():
        candidates = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1).indices == labels[:, None]
    return loss, candidates[:, 0], candidates.any(dim=-1)
