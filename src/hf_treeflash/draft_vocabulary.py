"""The tokens a drafter may draft, if not all of the target's, and their rows of the target's output layer.

Any other token is the target's alone to say: the text stays exact, and a draft reads a fraction of the output layer.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .memory import recall, remember, stamp

logger = logging.get_logger(__name__)


def kept_tokens(d2t: torch.Tensor) -> torch.Tensor:
    """Return the target's tokens behind the columns of a draft.

    Args:
        d2t (`torch.LongTensor` of shape `(draft_vocab_size,)`):
            What to add to each column, as published checkpoints store it.
    """
    return d2t + torch.arange(len(d2t), device=d2t.device)


def offsets(token_ids, vocab_size: int | None) -> torch.Tensor:
    """Return a draft vocabulary as offsets, see [`kept_tokens`]; columns are in the order of the ids.

    Args:
        token_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`):
            Tokens of the target, in any order.
        vocab_size (`int`, *optional*):
            Of the target; None if it is not known.

    Raises:
        ValueError: If there is none, one comes twice, or one is not of the target.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.long)
    kept = ids.flatten().unique()  # ascending
    if ids.ndim != 1 or len(ids) == 0 or len(kept) < len(ids):
        raise ValueError(
            f"A draft vocabulary is a list of different tokens, found {len(kept)} different ones in a tensor of shape "
            f"{tuple(ids.shape)}."
        )
    if kept[0] < 0 or (vocab_size is not None and kept[-1] >= vocab_size):
        raise ValueError(
            f"A draft vocabulary holds tokens of the target, 0 to {(vocab_size or 0) - 1}; found {int(kept[0])} to "
            f"{int(kept[-1])}."
        )
    return kept - torch.arange(len(kept), device=kept.device)


def shows_rows(lm_head: Any) -> str | None:
    """Return what keeps the rows of an output layer from being read one by one; None if nothing does."""
    if type(lm_head) is not nn.Linear:
        return f"a {type(lm_head).__name__} (quantised, adapted or its own kind of layer)"
    if not lm_head.weight.is_floating_point() or lm_head.weight.element_size() < 2:
        return f"a layer of {str(lm_head.weight.dtype).removeprefix('torch.')} weights"
    if hasattr(lm_head.weight, "device_mesh"):
        return "a layer split over devices by tensor parallelism"
    if lm_head.weight.is_meta:
        return "a layer whose weights are offloaded"
    return None


@torch.no_grad()
def kept_rows(lm_head: nn.Linear, d2t: torch.Tensor) -> nn.Linear:
    """Return the output layer of a draft vocabulary; rows of a weight that changed since are gathered anew.

    Args:
        lm_head (`nn.Linear`):
            The target's output layer, which shows its rows.
        d2t (`torch.LongTensor` of shape `(draft_vocab_size,)`):
            The draft vocabulary; like the layer it is held weakly.

    Raises:
        ValueError: If the layer has no row for one of the tokens.
    """
    parts = [part for part in (lm_head.weight, lm_head.bias, d2t) if part is not None]
    state = [stamp(part) for part in parts]
    made_from, made = recall("draft rows", lm_head, d2t) or (None, None)
    if made is not None and made_from == state:
        return made
    tokens = kept_tokens(d2t).to(lm_head.weight.device)
    if int(tokens.max()) >= len(lm_head.weight) or int(tokens.min()) < 0:
        raise ValueError(
            f"The drafter does not fit this target: its draft vocabulary (`d2t`) holds token {int(tokens.max())}, but "
            f"the target's output layer has {len(lm_head.weight)} rows."
        )
    with torch.inference_mode(False):
        rows = nn.Linear(1, 1, bias=lm_head.bias is not None, device="meta")
        for name, part in lm_head.named_parameters():
            setattr(rows, name, nn.Parameter(part.detach().index_select(0, tokens), requires_grad=False))
    rows.out_features, rows.in_features = rows.weight.shape
    remember("draft rows", (state, rows), lm_head, d2t)
    return rows


@torch.no_grad()
def compare_output_rows(target, drafter) -> None:
    """Say so, once per pair, if a drafter's own output layer is no copy of the target's rows, as published ones are.

    It drafts with what is stored either way: one that was trained is right, and the text is the target's in any case.

    Args:
        target ([`PreTrainedModel`]), drafter ([`TreeFlashDraftModel`]):
            The pair; the drafter has a `draft_lm_head`.

    Raises:
        ValueError: If the vocabulary holds tokens that the target does not know.
    """
    if recall("output rows", drafter, target):
        return
    weight, layer, kept = drafter.draft_lm_head.weight, target.get_output_embeddings(), kept_tokens(drafter.d2t)
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    if int(kept.min()) < 0 or int(kept.max()) >= vocab_size:
        raise ValueError(
            f"The drafter does not fit this target: its reduced vocabulary (`d2t`) names tokens {int(kept.min())} to "
            f"{int(kept.max())}, the target's has {vocab_size}."
        )
    remember("output rows", True, drafter, target)
    if shows_rows(layer) is not None:
        return
    difference = norm = 0.0
    for rows, own in zip(kept.split(8192), weight.split(8192), strict=True):  # a whole layer in float32 takes much
        theirs = layer.weight.index_select(0, rows.to(layer.weight.device)).float()
        difference += float((own.to(theirs.device).float() - theirs).square().sum())
        norm += float(theirs.square().sum())
    if difference > 1e-4 * norm:  # what rounding to bfloat16 does is a thousandth of the norm
        logger.warning(
            "The output layer that the drafter holds for its reduced vocabulary is no copy of this target's rows (off "
            f"by {100 * (difference / max(norm, 1e-30)) ** 0.5:.0f} % of their norm). It is used as stored. Unless it "
            "was trained, the drafter was made for another target."
        )


__all__ = ["compare_output_rows", "kept_rows", "kept_tokens", "offsets", "shows_rows"]
