"""The target's embedding and output layer as the draft reads them, and cheaper readings that never touch the text.

A round reads the whole layer twice, for the shortlists and for the corrected rows. Both may be approximate: they only
rank the nodes of the tree, and every emitted token is still the target's own choice.
"""

import copy
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TopKLogitsWarper
from transformers.utils import logging

from .draft_vocabulary import kept_rows, kept_tokens, shows_rows
from .float8 import float8_copy
from .knobs import DraftingKnobs

logger = logging.get_logger(__name__)

# Nats by which a draft doubts a token outside of its own top-k: measured, see docs/sampling.md.
DOUBT = 1.5


class OutputScale(NamedTuple):
    """What a model does to the products of its output layer: `cap * tanh(multiplier * product / cap)`."""

    multiplier: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config, drafter_config=None) -> "OutputScale":
        """Read a target's scale; what a drafter's config says of its own goes before it.

        Args:
            config ([`PreTrainedConfig`]):
                Of the target's text decoder.
            drafter_config ([`TreeFlashConfig`], *optional*):
                Of the drafter.
        """
        multiplier = getattr(drafter_config, "output_multiplier", None)
        if multiplier is None:  # every family has a name of its own
            names = ("output_multiplier", "logit_scale", "lm_head_multiplier")
            multiplier = next((value for name in names if (value := getattr(config, name, None)) is not None), 1.0)
            multiplier /= getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(drafter_config, "final_logit_softcapping", None)
        return cls(multiplier, getattr(config, "final_logit_softcapping", None) if cap is None else cap)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return scaled logits."""
        if self.cap is not None:
            return (logits * (self.multiplier / self.cap)).tanh() * self.cap
        return logits if self.multiplier == 1.0 else logits * self.multiplier


class DraftHead:
    """Calls the target's output layer where it lives, in its dtype.

    Attributes:
        likely (`tuple[int, float]`, *optional*):
            How many tokens of a row the call keeps (top-k), and by how much the others' logits are lowered: the target
            may still keep some of them.

    Args:
        lm_head (`nn.Module`):
            The target's output layer, or the drafter's own.
        precision (`str`, *optional*):
            `"float8"` multiplies with a copy of the weight in eight bits; None calls the layer itself.
        scale ([`OutputScale`], *optional*):
            What is done to its products; nothing by default.
        d2t (`torch.LongTensor` of shape `(draft_vocab_size,)`, *optional*):
            Score these of its tokens only, see [`kept_tokens`]. A layer that does not show its rows scores them all.
    """

    def __init__(
        self,
        lm_head: Any,
        precision: str | None = None,
        scale: OutputScale | None = None,
        d2t: torch.Tensor | None = None,
    ):
        self.device, self.columns = home_of(lm_head), None
        self.likely: tuple[int, float] | None = None
        if d2t is not None and (found := shows_rows(lm_head)) is None:
            lm_head = kept_rows(lm_head, d2t)
        elif d2t is not None:
            self.columns = kept_tokens(d2t).to(self.device)
            logger.warning_once(f"A draft vocabulary spares nothing on this target: its output layer is {found}.")
        self.lm_head, self.scale = lm_head, scale or OutputScale()
        self.float8 = float8_copy(lm_head) if precision == "float8" else None
        # Looked up once: each look-up costs as much as a small tensor operation.
        weight = any_tensor(lm_head)
        # A quantised weight says nothing of the dtype its layer takes.
        self.dtype = weight.dtype if weight.is_floating_point() else None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`):
                Normed states of the drafter.

        Returns:
            `torch.Tensor` of shape `(..., tokens)`.
        """
        logits = self.scale(self._products(hidden_states.to(self.device, self.dtype)))
        return logits if self.likely is None else lowered(logits, *self.likely)

    def expect(self, warpers: Iterable[Any], temperature: float) -> None:
        """Rank lower, while tokens are drawn by top-k, what top-k would cut from the draft's own distribution.

        On a device nothing is lowered: the kernel that ranks a draft does not know of it.

        Args:
            warpers (`Iterable[LogitsProcessor]`):
                Of the call.
            temperature (`float`):
                Of the call.
        """
        kept = [warper.top_k for warper in warpers if isinstance(warper, TopKLogitsWarper)]
        if kept and self.device.type == "cpu":
            self.likely = min(kept), DOUBT * temperature

    def _products(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.float8 is None:
            logits = self.lm_head(hidden_states)
            return logits if self.columns is None else logits.index_select(-1, self.columns)
        logits, bias = self.float8.product(hidden_states), self.lm_head.bias
        return logits if bias is None else logits + bias.to(logits.dtype)


def lowered(logits: torch.Tensor, keep: int, amount: float) -> torch.Tensor:
    """Lower all logits of a row but the largest.

    Args:
        logits (`torch.Tensor` of shape `(..., tokens)`):
            Of a draft.
        keep (`int`):
            How many stay as they are.
        amount (`float`):
            What is taken from the others.
    """
    if keep >= logits.shape[-1]:
        return logits
    least = logits.topk(keep, dim=-1).values[..., -1:]
    return torch.where(logits < least, logits - amount, logits)


def check_head(lm_head: Any, knobs: DraftingKnobs) -> None:
    """Refuse an eight-bit copy of an output layer that does not show its rows.

    Args:
        lm_head (`nn.Module`):
            The target's output layer.
        knobs ([`DraftingKnobs`]):
            Of the call.

    Raises:
        ValueError: Naming the knob and what the layer is.
    """
    found = None if knobs.draft_lm_head is None else shows_rows(lm_head)
    if found is not None:
        raise ValueError(
            "`draft_lm_head` drafts with a copy of the target's output layer, so that must be a plain `nn.Linear` "
            f"with 16-bit or 32-bit floating-point weights; this target has {found}. Set `draft_lm_head` to None."
        )


class ScaledRows(nn.Module):
    """The rows of an embedding times a number, whatever the embedding itself does to them.

    Args:
        embedding (`nn.Module`):
            The target's input embedding; its weight stays shared.
        scale (`float`):
            What to multiply its rows with.
    """

    def __init__(self, embedding: nn.Module, scale: float):
        super().__init__()
        self.embedding, self.scale = embedding, scale

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings of the shape of `token_ids` and `hidden_size`."""
        weight: Any = self.embedding.weight
        return F.embedding(token_ids, weight) * self.scale


def draft_embedding(embedding: nn.Module, config) -> nn.Module:
    """Return a target's embedding as a drafter was trained to read it; weights stay shared.

    Args:
        embedding (`nn.Module`):
            The target's input embedding.
        config ([`TreeFlashConfig`]):
            Of the drafter.
    """
    if config.input_embedding_scale is not None:
        return ScaledRows(embedding, config.input_embedding_scale)
    if not hasattr(embedding, "embed_norm"):
        return embedding
    # DFlash drafters are trained on embeddings without a norm built into them.
    bare = copy.copy(embedding)
    bare._modules = {**embedding._modules, "embed_norm": nn.Identity()}
    return bare


def any_tensor(module: nn.Module) -> torch.Tensor:
    """Return one of a module's weights; quantised modules may keep them all in buffers."""
    return next(itertools.chain(module.parameters(), module.buffers()))


def home_of(module: nn.Module) -> torch.device:
    """Return the device a module computes on, also while accelerate keeps its weights elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    execution_device = getattr(hook, "execution_device", None)
    return any_tensor(module).device if execution_device is None else torch.device(execution_device)


__all__ = ["DraftHead", "OutputScale", "any_tensor", "check_head", "draft_embedding", "home_of"]
