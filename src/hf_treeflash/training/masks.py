"""What the blocks of a training pass see: one rule, as a dense mask or as a FlexAttention block mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..block_rule import BlockRule, block_rules

MaskRule = Callable[..., torch.Tensor]


def block_mask_rule(anchors: torch.Tensor, document_ids: torch.Tensor, block_size: int, layer: BlockRule) -> MaskRule:
    """Return the rule for keys `[context 0 .. length - 1 | block 0 | block 1 | ...]` and queries `[block 0 | ...]`.

    A slot of block j sees the context strictly before anchor j in the anchor's document (at decoding time the target
    has not processed its newest token yet) and the slots of its own block, as far as its layer shows them.

    Args:
        anchors (`torch.LongTensor` of shape `(batch, blocks)`):
            Where blocks start.
        document_ids (`torch.LongTensor` of shape `(batch, length)`):
            The document of each context position; -1 for padding.
        block_size (`int`):
            Slots per block, the anchor's included.
        layer ([`BlockRule`]):
            What the layer shows.

    Returns:
        `Callable`: `rule(batch, head, query, key)` for broadcastable index tensors; a `mask_mod` of FlexAttention.
    """
    length = document_ids.shape[1]

    def rule(batch, head, query, key):
        block, slot = query // block_size, query % block_size
        anchor = anchors[batch, block]
        column = torch.where(key < length, key, 0)
        document = document_ids[batch, anchor]
        in_context = (key < length) & (key < anchor) & (document_ids[batch, column] == document)
        key_block, key_slot = (key - length) // block_size, (key - length) % block_size
        in_block = (key >= length) & (key_block == block)
        # Slot k stands at position anchor + k.
        place = torch.where(key < length, key, anchor + key_slot)
        return (in_context | in_block) & layer.sees(anchor + slot, place, anchor)

    return rule


def dense_mask(rule: MaskRule, batch: int, queries: int, keys: int, device) -> torch.Tensor:
    """Evaluate a rule everywhere; bool, `(batch, 1, queries, keys)`."""
    rows = torch.arange(batch, device=device)[:, None, None]
    query = torch.arange(queries, device=device)[None, :, None]
    key = torch.arange(keys, device=device)[None, None, :]
    return rule(rows, 0, query, key)[:, None]


def flex_mask(rule: MaskRule, batch: int, queries: int, keys: int, device) -> BlockMask:
    """Evaluate a rule by tiles, for FlexAttention."""
    return create_block_mask(rule, batch, None, queries, keys, device=device)


def attention_masks(drafter, anchors: torch.Tensor, document_ids: torch.Tensor) -> dict:
    """Return the mask of each kind of layer of a drafter, in the form its attention takes.

    Raises:
        ValueError: If it takes no such masks.
    """
    config, (batch, length) = drafter.config, document_ids.shape
    if config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            f"Blocks cannot be trained with {config._attn_implementation!r}, which takes no masks; load the drafter "
            "with `attn_implementation='sdpa'` or 'flex_attention'."
        )
    queries = anchors.shape[1] * config.block_size
    size = (batch, queries, length + queries, anchors.device)
    masks: dict[str, Any] = {}
    for kind, layer in block_rules(config).items():
        rule = block_mask_rule(anchors, document_ids, config.block_size, layer)
        if config._attn_implementation == "flex_attention":
            masks[kind] = flex_mask(rule, *size)
            continue
        masks[kind] = dense_mask(rule, *size)
        if config._attn_implementation == "eager":  # adds the mask to the scores
            hidden = torch.finfo(drafter.dtype).min
            masks[kind] = torch.zeros_like(masks[kind], dtype=drafter.dtype).masked_fill_(~masks[kind], hidden)
    return masks
