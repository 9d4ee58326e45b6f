"""
K3, tree build: the nodes with the highest path log-probability, exactly as best-first search finds them.

The tree of TreeFlash (arXiv 2606.03819). Log-probabilities never grow along a path, so the best nodes are closed under
parents. The kernel searches best-first with one frontier entry per node (its best child not yet taken), one program
per batch row; the oracle keeps the best nodes of every depth and then the best overall, which selects the same nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ._launch import LazyKernel, next_power_of_2, use_triton
from .ancestor_words import num_words, pack_ancestor_words

if TYPE_CHECKING:
    import triton.language as tl

# The search keeps a node's depth in 15 bits and its place in 16 bits of one key.
MAX_DEPTH, MAX_NODES = 1 << 15, 1 << 16


class Tree(NamedTuple):
    """
    A batch of trees. Node 0 is the root, parents come before their children, trailing nodes may be unused: those see
    only themselves, have depth 0, parent -1, token 0 and log-probability minus infinity.

    Attributes:
        token_ids (`torch.LongTensor` of shape `(batch, nodes)`):
            Token of each node; 0 for the root, whose token (the anchor) the caller knows.
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            Parent node, -1 for the root.
        depths (`torch.LongTensor` of shape `(batch, nodes)`):
            Distance to the root.
        ancestor_words (`torch.LongTensor` of shape `(batch, nodes, ceil(nodes / 64))`):
            Bit `j % 64` of word `j // 64` says that node `j` is the node itself or one of its ancestors.
        path_log_probs (`torch.FloatTensor` of shape `(batch, nodes)`):
            Sum of the log-probabilities from the root, fp32.
        num_nodes (`torch.LongTensor` of shape `(batch,)`):
            Nodes in use, the root included.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestor_words: torch.Tensor
    path_log_probs: torch.Tensor
    num_nodes: torch.Tensor


@LazyKernel
def _build_tree_kernel(
    TOKENS, LOG_PROBS, NEXT, OUT_TOKENS, OUT_PARENTS, OUT_DEPTHS, OUT_WORDS, OUT_SCORES, OUT_COUNT,
    budget, levels, rows, branching,
    NODES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    base = batch * levels * rows * branching
    out = batch * budget
    neg_inf = float("-inf")
    inf = float("inf")
    node = tl.arange(0, NODES)
    node_bit = tl.full([NODES], 1, tl.int64) << (node % 64).to(tl.int64)
    root = node == 0
    first = tl.load(LOG_PROBS + base)
    # Frontier: path log-probability of the best child of a node that is not in the tree yet.
    frontier = tl.where(root, tl.where(tl.abs(first) < inf, first, neg_inf), neg_inf)
    score = tl.where(root, 0.0, neg_inf)
    row = tl.where(root, 0, -1)
    rank = tl.zeros([NODES], tl.int32)
    depth = tl.zeros([NODES], tl.int32)
    # Place in depth-first order and size of the subtree so far. Among nodes of one depth, the depth-first order is the
    # lexicographic order of the rank paths; and j is an ancestor of i where place[j] <= place[i] < place[j] + size[j].
    place = tl.zeros([NODES], tl.int32)
    size = tl.where(root, 1, 0)
    count = 1
    for i in range(1, budget):
        bits = tl.where(frontier == 0.0, 0.0, frontier).to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        tie = ((0x7FFF - depth) << 16) | (0xFFFF - place)
        key = tl.where(node < i, (ordered << 32) | tie.to(tl.int64), -0x7FFFFFFFFFFFFFFF)
        best = tl.max(key, 0)
        best_bits = (best >> 32).to(tl.int32)
        best_score = tl.where(best_bits < 0, best_bits ^ 0x7FFFFFFF, best_bits).to(tl.float32, bitcast=True)
        if best_score > neg_inf:
            is_parent = key == best
            parent = tl.sum(tl.where(is_parent, node, 0), 0)
            parent_row = tl.sum(tl.where(is_parent, row, 0), 0)
            parent_rank = tl.sum(tl.where(is_parent, rank, 0), 0)
            parent_size = tl.sum(tl.where(is_parent, size, 0), 0)
            parent_place = 0xFFFF - (best & 0xFFFF).to(tl.int32)
            new_depth = 0x7FFF - ((best >> 16) & 0x7FFF).to(tl.int32) + 1
            entry = base + parent_row * branching + parent_rank
            token = tl.load(TOKENS + entry)
            next_row = tl.load(NEXT + entry).to(tl.int32)
            has_sibling = parent_rank + 1 < branching
            sibling = tl.load(LOG_PROBS + entry + 1, mask=has_sibling, other=neg_inf)
            sibling = tl.where(tl.abs(sibling) < inf, sibling, neg_inf)
            child_row = tl.where(new_depth < levels, tl.where(next_row >= 0, new_depth * rows + next_row, -1), -1)
            child = tl.load(LOG_PROBS + base + child_row * branching, mask=child_row >= 0, other=neg_inf)
            child = tl.where(tl.abs(child) < inf, child, neg_inf)

            is_new = node == i
            ancestor = (node < i) & (place <= parent_place) & (parent_place < place + size)
            new_place = parent_place + parent_size
            place = tl.where(is_new, new_place, tl.where((node < i) & (place >= new_place), place + 1, place))
            size = tl.where(ancestor, size + 1, tl.where(is_new, 1, size))
            frontier = tl.where(is_parent, score + sibling, tl.where(is_new, best_score + child, frontier))
            score = tl.where(is_new, best_score, score)
            rank = tl.where(is_parent, rank + 1, rank)
            row = tl.where(is_new, child_row, row)
            depth = tl.where(is_new, new_depth, depth)
            count += 1

            tl.store(OUT_TOKENS + out + i, token)
            tl.store(OUT_PARENTS + out + i, parent.to(tl.int64))
            tl.store(OUT_DEPTHS + out + i, new_depth.to(tl.int64))
            tl.store(OUT_SCORES + out + i, best_score)
            for w in range(WORDS):
                member = (ancestor | is_new) & (node // 64 == w)
                tl.store(OUT_WORDS + (out + i) * WORDS + w, tl.sum(tl.where(member, node_bit, 0), 0))

    # The root and the unused nodes; disjoint from the nodes stored above, so the order of the stores does not matter.
    rest = (node < budget) & (root | (node >= count))
    nothing = tl.zeros([NODES], tl.int64)
    tl.store(OUT_TOKENS + out + node, nothing, mask=rest)
    tl.store(OUT_PARENTS + out + node, nothing - 1, mask=rest)
    tl.store(OUT_DEPTHS + out + node, nothing, mask=rest)
    tl.store(OUT_SCORES + out + node, tl.where(root, 0.0, neg_inf), mask=rest)
    for w in range(WORDS):
        tl.store(OUT_WORDS + (out + node) * WORDS + w, tl.where(node // 64 == w, node_bit, 0), mask=rest)
    tl.store(OUT_COUNT + batch, tl.max(nothing, 0) + count)


def _candidates(
    token_ids: torch.Tensor, log_probs: torch.Tensor, next_row: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The best `width` nodes of every depth as (score, token, parent, depth), shallower first, rank paths ascending
    within a depth; a parent is an index into the same list, -1 for the root.
    """
    batch, levels, _, branching = token_ids.shape
    neg_inf = float("-inf")
    score = log_probs.new_zeros(batch, 1)
    row = token_ids.new_zeros(batch, 1)
    index = token_ids.new_full((batch, 1), -1)
    found: list[tuple[torch.Tensor, ...]] = []
    total = 0
    for level in range(levels):
        source = row.clamp(min=0).unsqueeze(-1).expand(-1, -1, branching)
        step = log_probs[:, level].gather(1, source)
        step = step.masked_fill(~step.isfinite() | (row < 0).unsqueeze(-1), neg_inf)
        scores = (score.unsqueeze(-1) + step).flatten(1)
        kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :width].sort(dim=1).values
        score = scores.gather(1, kept)
        parent = index.gather(1, kept // branching)
        token = token_ids[:, level].gather(1, source).flatten(1).gather(1, kept)
        row = next_row[:, level].gather(1, source).flatten(1).gather(1, kept)
        index = torch.arange(total, total + kept.shape[1], device=kept.device).expand(batch, -1)
        total += kept.shape[1]
        found.append((score, token, parent, torch.full_like(parent, level + 1)))
    score, token, parent, depth = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return score, token, parent, depth


def build_tree_reference(
    token_ids: torch.Tensor, log_probs: torch.Tensor, next_row: torch.Tensor, tree_budget: int
) -> Tree:
    """Plain torch oracle of [`build_tree`], without host synchronisation."""
    width = tree_budget - 1
    score, token, parent, depth = _candidates(token_ids, log_probs.float(), next_row, max(width, 1))
    # Stable: among equal scores the list order, which is depth and then rank path, decides.
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :width]
    position = torch.zeros_like(parent).scatter(1, chosen, torch.ones_like(chosen).cumsum(1))
    score, token, parent, depth = (part.gather(1, chosen) for part in (score, token, parent, depth))
    parent = torch.where(parent < 0, 0, position.gather(1, parent.clamp(min=0)))
    used = score > float("-inf")
    missing = width - chosen.shape[1]

    def column(part: torch.Tensor, root: float, unused: float) -> torch.Tensor:
        return torch.nn.functional.pad(
            torch.nn.functional.pad(part.masked_fill(~used, unused), (1, 0), value=root), (0, missing), value=unused
        )

    parents = column(parent, -1, -1)
    depths = column(depth, 0, 0)
    nodes = torch.arange(tree_budget, device=parents.device)
    current = nodes.expand_as(parents)
    mask = torch.zeros(*parents.shape, tree_budget, dtype=torch.bool, device=parents.device)
    for _ in range(token_ids.shape[1] + 1):
        mask |= current.unsqueeze(-1) == nodes
        current = torch.where(current < 0, -1, parents.gather(1, current.clamp(min=0)))
    return Tree(
        token_ids=column(token, 0, 0),
        parents=parents,
        depths=depths,
        ancestor_words=pack_ancestor_words(mask),
        path_log_probs=column(score, 0.0, float("-inf")),
        num_nodes=used.sum(1) + 1,
    )


def build_tree(token_ids: torch.Tensor, log_probs: torch.Tensor, next_row: torch.Tensor, tree_budget: int) -> Tree:
    """
    Builds the tree of the `tree_budget - 1` nodes with the highest path log-probability, plus the root.

    Nodes come in best-first order: path log-probability descending, then depth ascending, then the tuple of child
    ranks along the path ascending. Entries whose log-probability is not finite are never used.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch, depth, rows, k)`):
            The children of a node of depth `d` (the root has depth 0) are one row of depth index `d`; the root's is
            row 0 of depth index 0.
        log_probs (`torch.FloatTensor` of shape `(batch, depth, rows, k)`):
            Their log-probabilities, at most 0, descending within a row, entries that are not finite last.
        next_row (`torch.LongTensor` of shape `(batch, depth, rows, k)`):
            The row of depth index `d + 1` that holds the children of that entry, -1 for a leaf.
        tree_budget (`int`):
            Number of nodes, the root included.

    Returns:
        [`Tree`] with `tree_budget` nodes per row.

    Raises:
        ValueError: if the shapes differ or the budget or the depth is out of range.
    """
    if token_ids.dim() != 4 or not token_ids.shape == log_probs.shape == next_row.shape:
        shapes = [tuple(t.shape) for t in (token_ids, log_probs, next_row)]
        raise ValueError(f"token_ids, log_probs and next_row must share a shape (batch, depth, rows, k), got {shapes}")
    batch, levels, rows, branching = token_ids.shape
    if not 1 <= tree_budget <= MAX_NODES:
        raise ValueError(f"tree_budget must be between 1 and {MAX_NODES}, got {tree_budget}")
    if not 1 <= levels < MAX_DEPTH:
        raise ValueError(f"depth must be between 1 and {MAX_DEPTH - 1}, got {levels}")
    if not use_triton(token_ids):
        return build_tree_reference(token_ids, log_probs, next_row, tree_budget)
    words = num_words(tree_budget)
    tree = Tree(
        token_ids=token_ids.new_empty(batch, tree_budget),
        parents=token_ids.new_empty(batch, tree_budget),
        depths=token_ids.new_empty(batch, tree_budget),
        ancestor_words=token_ids.new_empty(batch, tree_budget, words),
        path_log_probs=log_probs.new_empty(batch, tree_budget, dtype=torch.float32),
        num_nodes=token_ids.new_empty(batch),
    )
    _build_tree_kernel[(batch,)](
        token_ids.contiguous(), log_probs.float().contiguous(), next_row.contiguous(), *tree,
        tree_budget, levels, rows, branching,
        NODES=max(next_power_of_2(tree_budget), 32), WORDS=words, num_warps=1 if tree_budget <= 256 else 4,
    )  # fmt: skip
    return tree
