"""Loss per slot, computed for some slots at a time: their logits never exist all at once."""

import functools
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
    is_frozen: bool = True,
) -> RowScores:
    """Score rows of drafter states against labels or against the target.

    Args:
        lm_head (`Callable`):
            The target's output layer as the drafter reads it, or with what a head adds to it.
        states (`torch.Tensor` of shape `(drafts, rows, hidden_size)`):
            Normed drafter states; the drafts share labels and target, whose logits are computed once for all.
        labels (`torch.LongTensor` of shape `(rows,)`):
            Tokens to predict, as the output layer numbers them.
        teacher_states (`torch.Tensor` of shape `(rows, hidden_size)`, *optional*):
            The target's final states; with them the loss is the forward KL to the target, else the cross-entropy.
        teacher_head (`Callable`, *optional*):
            The output layer as the target reads it; by default the same.
        num_candidates (`int`):
            Length of the shortlist that `recalled` is about.
        chunk_rows (`int`):
            Rows whose logits are held at once.
        is_frozen (`bool`, *optional*, defaults to `True`):
            Whether nothing in `lm_head` trains; otherwise logits are computed again in the backward pass.

    Returns:
        [`RowScores`], with a leading dimension of drafts.
    """
    teacher_head = teacher_head or lm_head

    def score(chunk: torch.Tensor, start: int) -> RowScores:
        """Score the rows from `start` on of all drafts."""
        rows = slice(start, start + chunk.shape[1])
        wanted = labels[rows].expand(len(chunk), -1)
        logits = lm_head(chunk).float()  # (drafts, rows, vocab)
        if teacher_states is None:
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        else:
            with torch.no_grad():
                teacher = teacher_head(teacher_states[rows]).float().log_softmax(dim=-1)
                probabilities = teacher.exp()
                entropy = -(probabilities * teacher).sum(dim=-1)
            # The likelihood of the target's choices, one pass over the logits less than the divergence itself.
            loss = logits.logsumexp(dim=-1) - torch.linalg.vecdot(logits, probabilities) - entropy
        with torch.no_grad():
            better = (logits > logits.gather(-1, wanted[..., None])).sum(dim=-1)
        return RowScores(loss, better == 0, better < num_candidates)

    starts = range(0, max(1, states.shape[1]), chunk_rows)
    run = RowsWithGradient.apply if is_frozen else functools.partial(checkpoint, use_reentrant=False)
    chunks = [run(score, states[:, start : start + chunk_rows], start) for start in starts]
    return RowScores(*(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)))


class RowsWithGradient(torch.autograd.Function):
    """Scores of rows, whose gradient is computed with them, so that no logits are kept for the backward pass.

    A row's loss depends on that row's state alone: the gradient of their sum holds the gradient of each.
    """

    @staticmethod
    def forward(ctx, score: Callable[[torch.Tensor, int], RowScores], states: torch.Tensor, start: int):
        """Score states `(drafts, rows, hidden_size)`, the rows from `start` on."""
        if not states.requires_grad:
            return tuple(score(states, start))
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            scores = score(states, start)
            (gradient,) = torch.autograd.grad(scores.loss.sum(), states)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(scores.correct, scores.recalled)
        return scores.loss.detach(), scores.correct, scores.recalled

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        """Return the gradient of the states."""
        (gradient,) = ctx.saved_tensors
        return None, gradient * loss_gradient[..., None].to(gradient.dtype), None
