"""A drafter over some of the target's tokens: whether what it holds of the target is the target's.

As published, its output layer is a frozen copy of the target's rows. It drafts with what is stored either way: one
that was trained is right, and the text is the target's in any case.
"""

from typing import Any, cast

import torch
from transformers.utils import logging

from .draft_head import check_head
from .knobs import DraftingKnobs
from .memory import recall, remember
from .protocols import Target

logger = logging.get_logger(__name__)


@torch.no_grad()
def compare_output_rows(target: Target, drafter: Any) -> None:
    """Say so if a reduced vocabulary's own output layer is no copy of the target's rows; each pair is looked at once.

    Args:
        target ([`Target`]), drafter ([`TreeFlashDraftModel`]):
            The pair; the drafter has a `draft_lm_head`.

    Raises:
        ValueError: If the vocabulary holds tokens that the target does not know.
    """
    if recall("output rows", drafter, target):
        return
    weight, layer = drafter.draft_lm_head.weight, cast(Any, target.get_output_embeddings())
    kept = torch.arange(len(drafter.d2t), device=drafter.d2t.device) + drafter.d2t
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    if int(kept.min()) < 0 or int(kept.max()) >= vocab_size:
        raise ValueError(
            f"The drafter does not fit this target: its reduced vocabulary (`d2t`) names tokens {int(kept.min())} to "
            f"{int(kept.max())}, the target's has {vocab_size}."
        )
    remember("output rows", True, drafter, target)
    try:
        check_head(layer, DraftingKnobs(draft_vocab=1))
    except ValueError:
        return  # its rows cannot be read
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


__all__ = ["compare_output_rows"]
