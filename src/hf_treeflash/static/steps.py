"""The parts of a round that are compiled, each by itself: both models, and the small operations around them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import Cache

from ..compat import CACHE


def draft(drafter, *args, **kwargs):
    """Run the drafter; see [`TreeFlashDraftModel.draft`]."""
    return drafter.draft(*args, **kwargs)


def verify(target, layer_ids: list[int], token_ids, position_ids, cache: Cache, attention: dict):
    """Run the target over the nodes of trees; return its logits and its states at some layers, concatenated."""
    outputs = target(
        input_ids=token_ids,
        position_ids=position_ids,
        use_cache=True,
        output_hidden_states=True,
        return_dict=True,
        **{CACHE: cache},
        **attention,
    )
    return outputs.logits, torch.cat([outputs.hidden_states[layer + 1] for layer in layer_ids], dim=-1)


def place_block(
    lengths: torch.Tensor, counts: torch.Tensor, offsets: torch.Tensor, longest: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Place what a drafter reads: the states of the last path, padded to the longest, and a block.

    Args:
        lengths (`torch.LongTensor` of shape `(batch,)`):
            Slot of the anchor.
        counts (`torch.LongTensor` of shape `(batch,)`):
            States of the path, which end before the anchor.
        offsets (`torch.LongTensor` of shape `(batch,)`):
            From slots to positions.
        longest (`int`), block (`int`):
            Of the path and of the block.

    Returns:
        `tuple` of slots and positions, each a `torch.LongTensor` of shape `(batch, longest + block)`.
    """
    columns = torch.arange(longest, device=lengths.device)
    context = (lengths - counts)[:, None] + columns
    slots = lengths[:, None] + columns[:block]
    # A path shorter than the longest leaves filler, which goes behind the block, where no mask shows it.
    filler = columns >= counts[:, None]
    positions = torch.cat([context, slots], dim=1) + offsets[:, None]
    return torch.cat([context + block * filler, slots], dim=1), positions


def place_tree(
    token_ids: torch.Tensor,
    depths: torch.Tensor,
    anchors: torch.Tensor,
    lengths: torch.Tensor,
    limits: torch.Tensor,
    offsets: torch.Tensor,
    first: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place the nodes of trees that are to be verified.

    Args:
        token_ids, depths (`torch.LongTensor` of shape `(batch, nodes)`):
            Of the nodes, root first, whose token is not looked at.
        anchors (`torch.LongTensor` of shape `(batch,)`):
            Tokens of the roots.
        lengths, limits (`torch.LongTensor` of shape `(batch,)`):
            Slot of the root, and how many the text may take.
        offsets (`torch.LongTensor` of shape `(batch,)`):
            From slots to positions.
        first (`torch.LongTensor` of shape `(batch,)`):
            Length before the call's first token.

    Returns:
        `tuple` of four `torch.LongTensor` of shape `(batch, nodes)`: tokens, slots, positions, and which token of its
        row each node's choice would be, counted from the call's first one.
    """
    token_ids = torch.cat([anchors[:, None], token_ids[:, 1:]], dim=1)
    slots = lengths[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)
    depths = lengths[:, None] + depths
    # No position that the text cannot reach: some targets know only so many.
    positions = depths.minimum(limits[:, None] - 1) + offsets[:, None]
    return token_ids, slots, positions, depths - first[:, None]


def follow(
    path: torch.Tensor,
    counts: torch.Tensor,
    choices: torch.Tensor,
    states: torch.Tensor,
    limits: torch.Tensor,
    lengths: torch.Tensor,
    anchors: torch.Tensor,
    pending_counts: torch.Tensor,
    pending: torch.Tensor,
    active: torch.Tensor,
    emitted: torch.Tensor,
) -> None:
    """Advance rows along their paths.

    Args:
        path (`torch.LongTensor` of shape `(batch, width)`):
            Accepted nodes, root first, padded with -1.
        counts (`torch.LongTensor` of shape `(batch,)`):
            How many they are.
        choices (`torch.LongTensor` of shape `(batch, nodes)`):
            The target's, after every node.
        states (`torch.Tensor` of shape `(batch, nodes, size)`):
            The target's, for the drafter.
        limits (`torch.LongTensor` of shape `(batch,)`):
            Lengths at which rows end.
        lengths, anchors, pending_counts, pending, active, emitted (`torch.Tensor`):
            The state of [`StaticRound`], which is written.
    """
    nodes = F.pad(path.clamp(min=0), (0, pending.shape[1] - path.shape[1]))
    tokens = choices.gather(1, nodes)
    newest = tokens.gather(1, counts[:, None] - 1)[:, 0]
    counts = counts * active
    anchors.copy_(torch.where(active, newest, anchors))
    pending.copy_(states.gather(1, nodes[..., None].expand(-1, -1, states.shape[-1])))
    pending_counts.copy_(counts)
    lengths.add_(counts)
    active.logical_and_(lengths < limits)
    emitted.copy_(torch.cat([tokens, counts[:, None]], dim=1))


class Steps(NamedTuple):
    """The functions above, as they are or compiled."""

    place_block: Callable = place_block
    draft: Callable = draft
    place_tree: Callable = place_tree
    verify: Callable = verify
    follow: Callable = follow

    def compiled(self, options: dict) -> "Steps":
        """Return them compiled by `torch.compile` with some options."""
        return Steps(*(torch.compile(step, **options) for step in self))


__all__ = ["Steps"]
