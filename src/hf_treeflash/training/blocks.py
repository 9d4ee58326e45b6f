"""From a batch of sequences to what one training pass of the drafter reads and is scored on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..candidate_generator import without_embed_norm
from ..taps import tapped_states
from .masks import attention_masks


@dataclass
class Blocks:
    """Inputs of the drafter for all blocks of a batch, and their labels.

    Attributes:
        inputs (`dict`):
            Arguments of [`TreeFlashDraftModel.forward`]: slots of all blocks one after the other.
        labels (`torch.LongTensor` of shape `(rows,)`):
            The token each supervised slot should predict: slot k of a block stands for token anchor + k.
        slots (`torch.LongTensor` of shape `(rows,)`):
            Slot number of each row, from 1.
        supervised (`torch.BoolTensor` of shape `(batch, blocks, block_size - 1)`):
            Which slots, from 1 on, the rows are; row-major.
        teacher_states (`torch.Tensor` of shape `(rows, hidden_size)`):
            The target's final states one token before each label, which its output layer turns into its choice.
    """

    inputs: dict
    labels: torch.Tensor
    slots: torch.Tensor
    supervised: torch.Tensor
    teacher_states: torch.Tensor

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """Select the supervised slots of states `(batch, blocks * block_size, hidden_size)`."""
        batch, blocks, slots = self.supervised.shape
        return states.view(batch, blocks, slots + 1, -1)[:, :, 1:][self.supervised]


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
            From [`AnchorCollator`].
        with_head (`bool`):
            Whether the AR head takes part, which needs the previous tokens.

    Returns:
        [`Blocks`]
    """
    input_ids, anchors, config = batch["input_ids"], batch["anchors"], drafter.config
    rows, length = input_ids.shape
    context, final = target_states(target, input_ids, config.target_layer_ids)
    # Positions a block's slots stand at: anchor 7 of block size 4 gives 7, 8, 9, 10.
    positions = anchors[..., None] + torch.arange(config.block_size, device=anchors.device)
    inside = positions.clamp(max=length - 1)
    tokens = take(input_ids, inside)
    supervised = (
        batch["anchor_mask"][..., None]
        & (positions < length)
        & take(batch["loss_mask"], inside)
        & (take(batch["document_ids"], inside) == take(batch["document_ids"], anchors)[..., None])
    )[..., 1:]
    noise_ids = torch.full_like(tokens, config.mask_token_id)
    noise_ids[..., 0] = anchors_tokens = tokens[..., 0]
    embed = embedding_of(target, drafter)
    context_positions = torch.arange(length, device=anchors.device).expand(rows, -1)
    inputs = {
        "noise_embeds": embed(noise_ids.flatten(1)),
        "context_hidden_states": context.to(drafter.dtype),
        "position_ids": torch.cat([context_positions, positions.flatten(1)], dim=1),
        "attention_mask": attention_masks(drafter, anchors, batch["document_ids"]),
    }
    if with_head:
        # Slot 0 is not scored; it gets the anchor so that shapes agree.
        previous_ids = torch.cat([anchors_tokens[..., None], tokens[..., :-1]], dim=-1)
        inputs["previous_embeds"] = embed(previous_ids.flatten(1))
    slots = torch.arange(1, config.block_size, device=anchors.device).expand_as(supervised)
    return Blocks(
        inputs=inputs,
        labels=tokens[..., 1:][supervised],
        slots=slots[supervised],
        supervised=supervised,
        teacher_states=take(final, inside[..., :-1])[supervised],
    )


def take(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gather along dimension 1: values `(batch, length, ...)` at positions `(batch, ...)`."""
    rows = torch.arange(values.shape[0], device=values.device).view(-1, *[1] * (positions.ndim - 1))
    return values[rows, positions]


def embedding_of(target, drafter) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the target's embedding as a drafter reads it, without gradient."""
    embedding = without_embed_norm(target.get_input_embeddings())

    def embed(token_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return embedding(token_ids).to(drafter.dtype)

    return embed


def output_layer_of(target) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the target's output layer, for states of any dtype."""
    head = target.get_output_embeddings()
    return lambda states: head(states.to(next(head.parameters()).dtype))
