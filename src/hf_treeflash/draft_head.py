"""The target's embedding and output layer as the draft reads them, and cheaper readings that never touch the text.

A round reads the whole layer twice, for the shortlists and for the corrected rows. Both may be approximate: they only
rank the nodes of the tree, and every emitted token is still the target's own choice.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .float8 import float8_copy
from .knobs import DraftingKnobs

Head = Callable[..., torch.Tensor]


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

    Args:
        lm_head (`nn.Module`):
            The target's output layer, or the drafter's own.
        precision (`str`, *optional*):
            `"float8"` multiplies with a copy of the weight in eight bits; None calls the layer itself.
        scale ([`OutputScale`], *optional*):
            What is done to its products; nothing by default.
    """

    def __init__(self, lm_head: Any, precision: str | None = None, scale: OutputScale | None = None):
        self.lm_head, self.scale = lm_head, scale or OutputScale()
        self.float8 = float8_copy(lm_head) if precision == "float8" else None
        # Looked up once: each look-up costs as much as a small tensor operation.
        weight = any_tensor(lm_head)
        self.device = home_of(lm_head)
        # A quantised weight says nothing of the dtype its layer takes.
        self.dtype = weight.dtype if weight.is_floating_point() else None

    def __call__(self, hidden_states: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`):
                Normed states of the drafter.
            token_ids (`torch.LongTensor` of shape `(tokens,)`, *optional*):
                Score these tokens only; all by default.

        Returns:
            `torch.Tensor` of shape `(..., tokens)`.
        """
        return self.scale(self._products(hidden_states, token_ids))

    def _products(self, hidden_states: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        hidden_states = hidden_states.to(self.device, self.dtype)
        if self.float8 is not None:
            logits = (self.float8 if token_ids is None else self.float8.select(token_ids)).product(hidden_states)
        elif token_ids is None:
            return self.lm_head(hidden_states)
        else:
            logits = F.linear(hidden_states, self.lm_head.weight.index_select(0, token_ids))
        bias = self.lm_head.bias
        if bias is None:
            return logits
        return logits + (bias if token_ids is None else bias.index_select(0, token_ids)).to(logits.dtype)


def narrowed(lm_head: Head, logits: torch.Tensor, per_slot: int | None) -> tuple[Head, torch.Tensor | None]:
    """Return the output layer over the tokens that some slot finds likely, and which these tokens are.

    A token that is likely after some shortlisted token is, by the law of total probability, likely on its slot's own
    account, so the corrected rows hardly miss the others. What they lose is the normaliser: probabilities are shares
    of these tokens alone.

    Args:
        lm_head (`Callable`):
            Takes states and, optionally, the tokens to score.
        logits (`torch.Tensor` of shape `(batch, slots, vocab)`):
            Of the slots before any correction.
        per_slot (`int`, *optional*):
            How many tokens each slot contributes. None: the layer as it is.

    Returns:
        `tuple`: the layer, and the token behind each of its columns, int64 of shape `(columns,)`; None for all tokens.
    """
    if per_slot is None:
        return lm_head, None
    token_ids, used = union_of_likely(logits, per_slot)

    def score(hidden_states: torch.Tensor) -> torch.Tensor:
        return lm_head(hidden_states, token_ids).masked_fill(~used, float("-inf"))

    return score, token_ids


def union_of_likely(logits: torch.Tensor, per_slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the union of every slot's `per_slot` most likely tokens, in ascending order.

    Its shape does not depend on how many they are, which spares the host a look at the device: unused places hold
    token 0 and are marked.

    Args:
        logits (`torch.Tensor` of shape `(batch, slots, vocab)`):
            Of the slots.
        per_slot (`int`):
            How many tokens each contributes.

    Returns:
        `tuple`: token ids and which places are used, of shape `(places,)`; the places are a multiple of 16, as float8
        matrix units want their columns.
    """
    vocab = logits.shape[-1]
    likely = logits.topk(min(per_slot, vocab), dim=-1).indices.flatten().sort().values
    is_new = F.pad(likely[1:] != likely[:-1], (1, 0), value=True)
    place = is_new.cumsum(0) - 1
    places = -(-min(len(likely), vocab) // 16) * 16
    # Equal tokens share a place, so it does not matter which of them is written last.
    token_ids = likely.new_zeros(places).scatter_(0, place, likely)
    return token_ids, torch.arange(places, device=likely.device) <= place[-1]


def check_head(lm_head: Any, knobs: DraftingKnobs) -> None:
    """Refuse knobs that need the rows of the target's output layer where it does not show them.

    Args:
        lm_head (`nn.Module`):
            The target's output layer.
        knobs ([`DraftingKnobs`]):
            Of the call.

    Raises:
        ValueError: Naming the knob and what the layer is.
    """
    asked = [name for name in ("draft_lm_head", "draft_vocab") if getattr(knobs, name) is not None]
    if not asked:
        return
    if type(lm_head) is not nn.Linear:
        found = f"a {type(lm_head).__name__} (quantised, adapted or its own kind of layer)"
    elif not lm_head.weight.is_floating_point() or lm_head.weight.element_size() < 2:
        found = f"a layer of {str(lm_head.weight.dtype).removeprefix('torch.')} weights"
    elif hasattr(lm_head.weight, "device_mesh"):
        found = "a layer split over devices by tensor parallelism"
    elif lm_head.weight.is_meta:
        found = "a layer whose weights are offloaded"
    else:
        return
    raise ValueError(
        f"`{asked[0]}` drafts with single rows of the target's output layer, so that must be a plain `nn.Linear` with "
        f"16-bit or 32-bit floating-point weights; this target has {found}. Set `{asked[0]}` to None."
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


__all__ = ["DraftHead", "OutputScale", "check_head", "draft_embedding", "home_of", "narrowed"]
