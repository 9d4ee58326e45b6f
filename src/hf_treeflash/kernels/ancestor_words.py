"""Ancestor masks as int64 words: bit `j % 64` of word `j // 64` of a node says that it sees node `j`."""

from __future__ import annotations

import torch

WORD_BITS = 64


def num_words(num_nodes: int) -> int:
    """Returns the number of int64 words that hold one bit per node."""
    return -(-num_nodes // WORD_BITS)


def pack_ancestor_words(ancestor_mask: torch.Tensor) -> torch.Tensor:
    """
    Packs a boolean ancestor mask.

    Args:
        ancestor_mask (`torch.BoolTensor` of shape `(..., nodes, nodes)`):
            True where the node of the row sees the node of the column (ancestors and itself).

    Returns:
        `torch.LongTensor` of shape `(..., nodes, words)`, `words = ceil(nodes / 64)`.
    """
    nodes = ancestor_mask.shape[-1]
    words = num_words(nodes)
    padded = torch.nn.functional.pad(ancestor_mask, (0, words * WORD_BITS - nodes))
    bits = padded.unflatten(-1, (words, WORD_BITS)).to(torch.int64)
    # Bits of one word are distinct powers of two, so their sum is their union, also where bit 63 wraps to the sign.
    return (bits << torch.arange(WORD_BITS, device=bits.device)).sum(-1)


def unpack_ancestor_words(ancestor_words: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """
    Unpacks ancestor words.

    Args:
        ancestor_words (`torch.LongTensor` of shape `(..., words)`):
            The words of any number of nodes.
        num_nodes (`int`):
            How many columns to return.

    Returns:
        `torch.BoolTensor` of shape `(..., num_nodes)`.
    """
    shifts = torch.arange(WORD_BITS, device=ancestor_words.device)
    bits = (ancestor_words.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :num_nodes].bool()


def dense_tree_mask(
    ancestor_words: torch.Tensor,
    prefix_length: torch.Tensor,
    kv_start: torch.Tensor,
    kv_length: int,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """
    Writes out who sees what in tree attention: a node sees the prefix, its ancestors and itself.

    Args:
        ancestor_words (`torch.LongTensor` of shape `(batch, nodes, words)`):
            Which nodes a node sees.
        prefix_length (`torch.LongTensor` of shape `(batch,)`):
            Slot of node 0.
        kv_start (`torch.LongTensor` of shape `(batch,)`):
            First valid slot.
        kv_length (`int`):
            Number of key/value slots at hand. Caches of sliding layers drop the oldest slots: if fewer than
            `prefix + nodes` are left, they are the last ones.
        sliding_window (`int`, *optional*):
            Hide tokens that are this many positions or more before a node. A node's position is that of the last
            prefix token plus one plus its depth.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, nodes, kv_length)`, True where a node sees a slot.
    """
    nodes = ancestor_words.shape[1]
    prefix, start = prefix_length[:, None, None], kv_start[:, None, None]
    dropped = (prefix.amax() + nodes - kv_length).clamp(min=0)
    slots = torch.arange(kv_length, device=ancestor_words.device) + dropped
    ancestors = unpack_ancestor_words(ancestor_words, nodes)
    column = slots - prefix
    in_tail = (column >= 0) & (column < nodes)
    column = column.clamp(0, nodes - 1)
    sees_node = ancestors.gather(-1, column.expand(-1, nodes, -1))
    mask = ((slots >= start) & (slots < prefix)) | (in_tail & sees_node)
    if sliding_window is not None:
        depth = ancestors.sum(-1) - 1
        key_position = torch.where(in_tail, prefix + depth.unsqueeze(1).gather(-1, column), slots)
        mask &= prefix + depth.unsqueeze(-1) - key_position < sliding_window
    return mask.unsqueeze(1)
