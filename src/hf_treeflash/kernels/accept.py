"""
K4, accept: the longest path of the tree on which every token is the one the target chose.

The target chose one token per node, by argmax or by sampling, so the walk of TreeFlash (arXiv 2606.03819) needs no
loop: a node is on the path if its token and those of all its ancestors match the choice made at their parents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._launch import LazyKernel, next_power_of_2, use_triton
from .ancestor_words import num_words, unpack_ancestor_words

if TYPE_CHECKING:
    import triton.language as tl


@LazyKernel
def _accept_kernel(
    TOKENS, PARENTS, WORDS, NUM_NODES, TARGETS, PATH, LENGTH, NEXT_TOKEN, nodes, words,
    NODES: tl.constexpr, WORDS_BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    base = batch * nodes
    node = tl.arange(0, NODES)
    word = tl.arange(0, WORDS_BLOCK)
    used = node < tl.load(NUM_NODES + batch)
    parent = tl.load(PARENTS + base + node, mask=used, other=-1)
    token = tl.load(TOKENS + base + node, mask=used, other=0)
    choice = tl.load(TARGETS + base + tl.maximum(parent, 0), mask=used, other=0)
    matches = used & ((node == 0) | ((parent >= 0) & (token == choice)))
    bit = tl.full([NODES], 1, tl.int64) << (node % 64).to(tl.int64)
    matched = matches[:, None] & (node[:, None] // 64 == word[None, :])
    # One word per 64 nodes; distinct bits, so the sum is the union.
    matched_words = tl.sum(tl.where(matched, bit[:, None], 0), 0)
    own_words = tl.load(
        WORDS + (base + node)[:, None] * words + word[None, :], mask=used[:, None] & (word < words)[None, :], other=0
    )
    unmatched = tl.max(((own_words & ~matched_words[None, :]) != 0).to(tl.int32), 1)
    accepted = (matches & (unmatched == 0)).to(tl.int32)
    # The accepted nodes are one path and parents come first, so counting them gives their places on it.
    length = tl.sum(accepted, 0)
    tl.store(PATH + base + tl.cumsum(accepted, 0) - 1, node.to(tl.int64), mask=accepted != 0)
    tl.store(PATH + base + node, tl.full([NODES], -1, tl.int64), mask=(node >= length) & (node < nodes))
    tl.store(LENGTH + batch, length.to(tl.int64))
    last = tl.max(tl.where(accepted != 0, node, 0), 0)
    tl.store(NEXT_TOKEN + batch, tl.load(TARGETS + base + last))


def accept_reference(
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    ancestor_words: torch.Tensor,
    num_nodes: torch.Tensor,
    target_tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch oracle of [`accept`]."""
    nodes = token_ids.shape[1]
    node = torch.arange(nodes, device=token_ids.device)
    used = node < num_nodes.unsqueeze(1)
    matches = (token_ids == target_tokens.gather(1, parents.clamp(min=0))) & (parents >= 0) & used
    matches |= node == 0
    ancestors = unpack_ancestor_words(ancestor_words, nodes)
    accepted = (matches.unsqueeze(1) | ~ancestors).all(-1) & used
    length = accepted.sum(1)
    # Rejected nodes are written to one spare column.
    place = torch.where(accepted, accepted.cumsum(1) - 1, nodes)
    path = token_ids.new_full((token_ids.shape[0], nodes + 1), -1).scatter(1, place, node.expand_as(place))[:, :nodes]
    path = path.masked_fill(node >= length.unsqueeze(1), -1)
    last = path.amax(1, keepdim=True)
    return path, length, target_tokens.gather(1, last).squeeze(1)


def accept(
    token_ids: torch.Tensor,
    parents: torch.Tensor,
    ancestor_words: torch.Tensor,
    num_nodes: torch.Tensor,
    target_tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Walks each tree along the target's choices. Siblings carry distinct tokens and parents come before their children.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch, nodes)`):
            Tokens of the nodes; that of the root, node 0, is not looked at.
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            Parent node, -1 for the root.
        ancestor_words (`torch.LongTensor` of shape `(batch, nodes, ceil(nodes / 64))`):
            Bit `j % 64` of word `j // 64` says that node `j` is the node itself or one of its ancestors.
        num_nodes (`torch.LongTensor` of shape `(batch,)`):
            Nodes in use, at least 1.
        target_tokens (`torch.LongTensor` of shape `(batch, nodes)`):
            The token the target chose after each node.

    Returns:
        `tuple` of the path, int64 of shape `(batch, nodes)`: accepted nodes from the root down, padded with -1; its
        length, int64 of shape `(batch,)`, the root included; and the target's token after its last node, int64 of
        shape `(batch,)`.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    batch, nodes = token_ids.shape
    words = num_words(nodes)
    if not parents.shape == target_tokens.shape == (batch, nodes) or ancestor_words.shape != (batch, nodes, words):
        shapes = [tuple(t.shape) for t in (token_ids, parents, ancestor_words, target_tokens)]
        raise ValueError(f"token_ids, parents, ancestor_words and target_tokens do not fit each other: {shapes}")
    if not use_triton(token_ids):
        return accept_reference(token_ids, parents, ancestor_words, num_nodes, target_tokens)
    path = token_ids.new_empty(batch, nodes)
    length, next_token = token_ids.new_empty(2, batch).unbind()
    inputs = (token_ids, parents, ancestor_words, num_nodes, target_tokens)
    _accept_kernel[(batch,)](
        *(t.contiguous() for t in inputs), path, length, next_token, nodes, words,
        NODES=next_power_of_2(nodes), WORDS_BLOCK=next_power_of_2(words), num_warps=4,
    )  # fmt: skip
    return path, length, next_token
