"""From a batch of sequences to what one training pass of the drafter reads and is scored on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..draft_head import OutputScale, draft_embedding
from ..taps import tapped_states
from .loss_vocabulary import StepVocabulary
from .masks import attention_masks


@dataclass
class Blocks:
    """Inputs of the drafter for all blocks of a batch, and their labels.

    Attributes:
        inputs (`dict`):
            Arguments of [`TreeFlashDraftModel.forward`]: slots of all blocks one after the other.
        labels (`torch.LongTensor` of shape `(rows,)`):
            The token each supervised slot should predict.
        depths (`torch.LongTensor` of shape `(rows,)`):
            How far after its anchor that token stands, from 1: depth d belongs to slot d - 1 + `first_slot`.
        supervised (`torch.BoolTensor` of shape `(batch, blocks, num_drafted)`):
            Which depths the rows are; row-major.
        teacher_states (`torch.Tensor` of shape `(rows, hidden_size)`):
            The target's final states one token before each label, which its output layer turns into its choice.
    """

    inputs: dict
    labels: torch.Tensor
    depths: torch.Tensor
    supervised: torch.Tensor
    teacher_states: torch.Tensor

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """Select the supervised slots of states `(batch, blocks * block_size, hidden_size)`."""
        batch, blocks, depths = self.supervised.shape
        return states.view(batch, blocks, -1, states.shape[-1])[:, :, -depths:][self.supervised]


def target_states(target, input_ids: torch.Tensor, layer_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the target over whole sequences, without its output layer.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: States at the tapped layers, captured as `generate` captures them, of
        shape `(batch, length, taps * hidden_size)`, and the final states of shape `(batch, length, hidden_size)`.
    """
    with torch.no_grad(), tapped_states(target, layer_ids) as taps:
        outputs = target.get_decoder()(input_ids=input_ids, use_cache=False, **taps.model_kwargs)
    return taps.take(outputs), outputs.last_hidden_state


def make_blocks(drafter, target, batch: dict[str, torch.Tensor], with_head: bool) -> Blocks:
    """Build the blocks of a collated batch.

    Args:
        drafter ([`PreTrainedModel`]):
            The unwrapped drafter, for its config and attention.
        target ([`PreTrainedModel`]):
            The frozen target.
        batch (`dict[str, torch.Tensor]`):
            From [`AnchorCollator`], with the target's states or without.
        with_head (`bool`):
            Whether the AR head takes part, which needs the previous tokens.

    Returns:
        [`Blocks`]
    """
    input_ids, anchors, config = batch["input_ids"], batch["anchors"], drafter.config
    rows, length = input_ids.shape
    if "taps" in batch:  # from disk
        context, final = batch["taps"], batch["final"]
    else:
        context, final = target_states(target, input_ids, config.target_layer_ids)
    # Places of an anchor and of what its block drafts: anchor 7 and 3 tokens give 7, 8, 9, 10.
    places = anchors[..., None] + torch.arange(config.num_drafted + 1, device=anchors.device)
    inside = places.clamp(max=length - 1)
    tokens = take(input_ids, inside)
    supervised = (
        batch["anchor_mask"][..., None]
        & (places < length)
        & take(batch["loss_mask"], inside)
        & (take(batch["document_ids"], inside) == take(batch["document_ids"], anchors)[..., None])
    )[..., 1:]
    noise_ids = anchors.new_full((*anchors.shape, config.block_size), config.mask_token_id)
    noise_ids[..., 0] = tokens[..., 0]
    embed = embedding_of(target, drafter)
    context_positions = torch.arange(length, device=anchors.device).expand(rows, -1)
    positions = anchors[..., None] + torch.arange(config.block_size, device=anchors.device)
    inputs: dict[str, Any] = {
        "noise_embeds": embed(noise_ids.flatten(1)),
        "context_hidden_states": context.to(drafter.dtype),
        "position_ids": torch.cat([context_positions, positions.flatten(1)], dim=1),
        "attention_mask": attention_masks(drafter, anchors, batch["document_ids"]),
    }
    if with_head:
        # A slot that predicts nothing is not scored; it gets the anchor so that shapes agree.
        unscored = tokens[..., :1].expand(*anchors.shape, config.first_slot)
        previous_ids = torch.cat([unscored, tokens[..., :-1]], dim=-1)  # (batch, blocks, block_size)
        inputs["previous_ids"] = previous_ids.flatten(1)
        if config.ar_head == "swiglu":  # the others hold vectors of their own
            inputs["previous_embeds"] = embed(inputs["previous_ids"])
    depths = torch.arange(1, config.num_drafted + 1, device=anchors.device).expand_as(supervised)
    return Blocks(
        inputs=inputs,
        labels=tokens[..., 1:][supervised],
        depths=depths[supervised],
        supervised=supervised,
        teacher_states=take(final, inside[..., :-1])[supervised],
    )


def take(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gather along dimension 1: values `(batch, length, ...)` at positions `(batch, ...)`."""
    rows = torch.arange(values.shape[0], device=values.device).view(-1, *[1] * (positions.ndim - 1))
    return values[rows, positions]


def embedding_of(target, drafter) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the target's embedding as a drafter reads it, without gradient."""
    embedding = draft_embedding(target.get_input_embeddings(), drafter.config)

    def embed(token_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return embedding(token_ids).to(drafter.dtype)

    return embed


def output_layer_of(
    target, drafter=None, vocabulary: StepVocabulary | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the target's output layer, for states of any dtype, scaled as the target or a drafter scales it.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        drafter ([`PreTrainedModel`], *optional*):
            Its config's own scale goes before the target's.
        vocabulary ([`StepVocabulary`], *optional*):
            Score these tokens only.
    """
    head = target.get_output_embeddings()
    scale = OutputScale.of(target.config.get_text_config(decoder=True), drafter and drafter.config)
    if vocabulary is None:
        return lambda states: scale(head(states.to(next(head.parameters()).dtype)))
    weight = head.weight[vocabulary.token_ids]
    bias = None if head.bias is None else head.bias[vocabulary.token_ids]
    return lambda states: scale(F.linear(states.to(weight.dtype), weight, bias)) + vocabulary.log_weights
