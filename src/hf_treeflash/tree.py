"""The draft tree, and its builder: the most probable nodes under the drafter's transitions."""

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

Permitted = Callable[[list[int]], torch.Tensor]
# A row's next tokens, their log-probabilities (nats), and by token the row of the next depth that continues it.
Children = tuple[list[int], list[float], dict[int, int]]


class NodeTable(NamedTuple):
    """One row's nodes as host lists, root first, parents before children."""

    token_ids: list[int]
    parents: list[int]
    depths: list[int]
    path_log_probs: list[float]
    ancestors: list[int]  # bit j of entry i: node i sees node j


@dataclass
class DraftTree:
    """Candidate continuations of one round, one tree per row; node 0 is the anchor.

    Attributes:
        token_ids (`torch.LongTensor` of shape `(batch, nodes)`):
            Token of each node.
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            Index of each node's parent, -1 for the root and for unused nodes.
        depths (`torch.LongTensor` of shape `(batch, nodes)`):
            Distance from the root.
        ancestor_mask (`torch.BoolTensor` of shape `(batch, nodes, nodes)`):
            Whether node `i` sees node `j`: its ancestors and itself.
        path_log_probs (`torch.FloatTensor` of shape `(batch, nodes)`, nats):
            Log-probability the drafter gives to the path from the root; -inf for unused nodes.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestor_mask: torch.Tensor
    path_log_probs: torch.Tensor

    @cached_property
    def children(self) -> list[dict[tuple[int, int], int]]:
        """For each row, the child node reached from (node, token)."""
        return [
            {(parent, token): node for node, (parent, token) in enumerate(zip(*row, strict=True)) if parent >= 0}
            for row in zip(self.parents.tolist(), self.token_ids.tolist(), strict=True)
        ]

    def first(self, nodes: int) -> "DraftTree":
        """Return the tree of the first nodes; parents stand before children, so any number is a tree."""
        if nodes >= self.token_ids.shape[1]:
            return self
        return DraftTree(
            self.token_ids[:, :nodes],
            self.parents[:, :nodes],
            self.depths[:, :nodes],
            self.ancestor_mask[:, :nodes, :nodes],
            self.path_log_probs[:, :nodes],
        )

    def to(self, device: torch.device) -> "DraftTree":
        """Move the tree to a device."""
        if self.token_ids.device == device:
            return self
        return DraftTree(*(getattr(self, field.name).to(device) for field in fields(self)))


def build_tree(transitions, anchor_ids: torch.Tensor, tree_budget: int) -> DraftTree:
    """Build the trees of the `tree_budget - 1` most probable nodes below each anchor.

    The order of nodes is deterministic: higher path log-probability first, then shallower, then smaller rank path
    (the ranks of the choices from the root down, compared in that order).

    Args:
        transitions ([`Transitions`] or, on a CPU, [`HeadRows`]):
            What the drafter proposes, see [`TreeFlashDraftModel.draft`].
        anchor_ids (`torch.LongTensor` of shape `(batch,)`):
            Newest committed tokens.
        tree_budget (`int`):
            Nodes per tree, root included.

    Returns:
        [`DraftTree`]: On the device of `transitions`; smaller than the budget where there are not enough candidates.

    Source: arXiv 2606.03819; the selection is OPT-Tree's (arXiv 2406.17276).
    """
    # Rows on demand are at home on the host; tables are where the target's output layer left them.
    device = transitions[0].device if isinstance(transitions, tuple) else torch.device("cpu")
    if device.type == "cpu":
        return tree_from_tables(build_tables(transitions, anchor_ids, tree_budget))
    return build_by_level(transitions, anchor_ids.to(device), tree_budget)


def build_tables(
    transitions, anchor_ids: torch.Tensor, tree_budget: int, permitted: Sequence[Permitted] | None = None
) -> list[NodeTable]:
    """Build the same trees on the host, one table per row, with what only the host can do.

    Args:
        transitions ([`Transitions`] or [`HeadRows`]):
            All rows of the tables, or rows that are computed as the trees reach them.
        permitted (`Sequence[Callable]`, *optional*):
            For each row, given tokens after the anchor, those that may follow, as a boolean tensor over the
            vocabulary. No node is spent on others, and the rest share their probability.
    """
    rows: Any = TableRows(transitions) if isinstance(transitions, tuple) else transitions
    anchors = anchor_ids.tolist()
    tables: dict[int, NodeTable] = {}
    while len(tables) < len(anchors):
        for index, anchor in enumerate(anchors):
            if index not in tables:
                allowed, guessed = None if permitted is None else permitted[index], len(rows.missing)
                table = best_first(functools.partial(rows.read, index), anchor, tree_budget, allowed)
                if len(rows.missing) == guessed:
                    tables[index] = table
        if rows.missing:
            rows.compute(list(rows.missing))
    return [tables[index] for index in range(len(anchors))]


class TableRows:
    """The rows of finished transitions, read as host lists when a tree reaches them.

    Args:
        transitions ([`Transitions`]):
            What the drafter proposes.
    """

    def __init__(self, transitions):
        self.tables = [table.cpu().numpy() for table in transitions]
        self.lists: dict[tuple[int, int, int], Children] = {}
        self.missing = ()  # nothing ever is

    def read(self, index: int, depth: int, row: int) -> Children:
        """Return a row's next tokens, their log-probabilities and the rows that continue them."""
        key = index, depth, row
        if key not in self.lists:
            token_ids, log_probs, rows = (table[key].tolist() for table in self.tables)
            self.lists[key] = token_ids, log_probs, dict(zip(token_ids, rows, strict=True))
        return self.lists[key]


def best_first(
    read: Callable[[int, int], Children], anchor: int, tree_budget: int, permitted: Permitted | None = None
) -> NodeTable:
    """Pop the best open node until the budget is spent; only rows of the nodes on the tree are ever read.

    Args:
        read (`Callable[[int, int], Children]`):
            Given depth index and row, its next tokens, their log-probabilities and the rows that continue them.
        anchor (`int`), tree_budget (`int`), permitted (`Callable`, *optional*):
            See [`build_tables`], of one row.
    """
    node = NodeTable([anchor], [-1], [0], [0.0], [1])
    token_ids, parents, depths, path_log_probs, ancestors = node
    frontier: list[tuple] = []

    def open_row(parent: int, depth: int, row: int, ranks: tuple, score: float) -> None:
        """Offer the children of a node, which a row of the transitions describes."""
        children = read(depth, row)
        if permitted is not None:
            children = _permitted_children(children, permitted(_path_to(node, parent)))
        push(score, (*ranks, 0), parent, children)

    def push(score: float, ranks: tuple, parent: int, children: tuple) -> None:
        # An entry stands for one child and, once taken, offers the next sibling. Ranks are unique: nothing after
        # them is ever compared.
        log_probs, rank = children[1], ranks[-1]
        if rank < len(log_probs) and log_probs[rank] > float("-inf"):
            heapq.heappush(frontier, (-score - log_probs[rank], len(ranks), ranks, parent, children, score))

    open_row(0, 0, 0, (), 0.0)
    while frontier and len(token_ids) < tree_budget:
        total, depth, ranks, parent, children, score = heapq.heappop(frontier)
        rank, index = ranks[-1], len(token_ids)
        token = children[0][rank]
        token_ids.append(token)
        parents.append(parent)
        depths.append(depth)
        path_log_probs.append(-total)
        ancestors.append(ancestors[parent] | 1 << index)
        push(score, (*ranks[:-1], rank + 1), parent, children)
        row = children[2].get(token, -1)
        if row >= 0 and len(token_ids) < tree_budget:
            open_row(index, depth, row, ranks, -total)
    return node


def _path_to(node: NodeTable, index: int) -> list[int]:
    """Return the tokens from the anchor, which is left out, to a node."""
    path: list[int] = []
    while index > 0:
        path.append(node.token_ids[index])
        index = node.parents[index]
    return path[::-1]


def _permitted_children(children: Children, permitted: torch.Tensor) -> Children:
    """Drop children that may not be emitted and give their probability to the others."""
    kept = [rank for rank, token in enumerate(children[0]) if permitted[token]]
    token_ids, log_probs, rows = children
    mass = sum(math.exp(log_probs[rank]) for rank in kept)
    rest = math.log(mass) if mass > 0 else 0.0
    return [token_ids[rank] for rank in kept], [log_probs[rank] - rest for rank in kept], rows


def tree_from_tables(rows: list[NodeTable]) -> DraftTree:
    """Stack rows of host lists, padding shorter ones with unused nodes that see only themselves."""
    nodes = max(len(row.token_ids) for row in rows)

    def stack(field: str, pad: float, dtype: type = np.int64) -> torch.Tensor:
        lists = [getattr(row, field) for row in rows]
        # numpy reads lists several times faster
        return torch.from_numpy(np.array([values + [pad] * (nodes - len(values)) for values in lists], dtype=dtype))

    masks = [row.ancestors + [1 << node for node in range(len(row.ancestors), nodes)] for row in rows]
    width = (nodes + 7) // 8
    packed = b"".join(word.to_bytes(width, "little") for words in masks for word in words)
    octets = np.frombuffer(packed, dtype=np.uint8).reshape(len(rows), nodes, width)
    sees = np.unpackbits(octets, axis=2, count=nodes, bitorder="little").view(np.bool_)
    return DraftTree(
        token_ids=stack("token_ids", 0),
        parents=stack("parents", -1),
        depths=stack("depths", 0),
        ancestor_mask=torch.from_numpy(sees),
        path_log_probs=stack("path_log_probs", float("-inf"), np.float32),
    )


def root_only(anchor_ids: torch.Tensor) -> DraftTree:
    """Return trees without branches: plain decoding."""
    token_ids = anchor_ids[:, None]
    zeros = torch.zeros_like(token_ids)
    return DraftTree(token_ids, zeros - 1, zeros, torch.ones_like(zeros[..., None], dtype=torch.bool), zeros.float())


def build_by_level(transitions, anchor_ids: torch.Tensor, tree_budget: int) -> DraftTree:
    """Build the same trees with batched tensor operations and no host synchronisation.

    A selected node of depth `d` has a selected parent and fewer than `tree_budget - 1` better nodes at its own depth,
    so keeping the best `tree_budget - 1` of every depth and then the best of all is exact.
    """
    batch, depth, _, _ = transitions.token_ids.shape
    width = tree_budget - 1
    rows = torch.zeros(batch, 1, dtype=torch.long, device=anchor_ids.device)
    scores = torch.zeros(batch, 1, dtype=torch.float64, device=anchor_ids.device)
    levels = []
    for level in range(depth):
        level_nodes = _expand(transitions, level, rows, scores, width)
        levels.append(level_nodes)
        scores, rows = level_nodes[0], level_nodes[3]
    scores, parents, tokens, _ = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    depths = torch.cat([torch.full_like(level[1], i + 1) for i, level in enumerate(levels)], dim=1)
    # Levels are shallow to deep and each is in rank-path order, so a stable sort settles every tie as promised.
    scores, chosen = scores.sort(dim=1, descending=True, stable=True)
    scores, kept = scores[:, :width], chosen[:, :width]
    order = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    place = torch.empty_like(chosen).scatter_(1, chosen, order)
    parents = _global_parents(parents, place, [level[1].shape[1] for level in levels]).gather(1, kept)
    used = scores > float("-inf")
    return _assemble(
        anchor_ids,
        tokens.gather(1, kept).masked_fill(~used, 0),
        parents.masked_fill(~used, -1),
        depths.gather(1, kept).masked_fill(~used, 0),
        scores,
        max_depth=depth,
    )


def _expand(transitions, level: int, rows: torch.Tensor, scores: torch.Tensor, width: int):
    """Return the best `width` children of one level's nodes in rank-path order: scores, parents, tokens, rows."""
    batch, parents = rows.shape
    branching = transitions.token_ids.shape[-1]
    index = rows.clamp(min=0)[..., None].expand(-1, -1, branching)
    tokens, log_probs, next_rows = (table[:, level].gather(1, index).flatten(1) for table in transitions)
    children = scores[..., None] + log_probs.view(batch, parents, branching).double()
    children = children.masked_fill((rows < 0)[..., None] | ~children.isfinite(), float("-inf")).flatten(1)
    best = children.sort(dim=1, descending=True, stable=True).indices[:, :width]
    best = best.sort(dim=1).values
    parent = best // branching
    return children.gather(1, best), parent, tokens.gather(1, best), next_rows.gather(1, best)


def _global_parents(parents: torch.Tensor, place: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Turn positions within the level above into node indices (root 0, the rest in sorted order)."""
    result, start = [torch.zeros_like(parents[:, : widths[0]])], 0
    for width, above in zip(widths[1:], widths, strict=False):
        level = parents[:, start + above : start + above + width]
        result.append(place.gather(1, level + start) + 1)
        start += above
    return torch.cat(result, dim=1)


def _assemble(anchor_ids, tokens, parents, depths, scores, max_depth: int) -> DraftTree:
    """Put the root in front and derive the ancestor mask by following parents upwards."""
    pad = torch.nn.functional.pad
    token_ids = torch.cat([anchor_ids[:, None], tokens], dim=1)
    parents, depths, scores = pad(parents, (1, 0), value=-1), pad(depths, (1, 0)), pad(scores, (1, 0))
    nodes = token_ids.shape[1]
    mask = torch.eye(nodes, dtype=torch.bool, device=tokens.device).repeat(len(tokens), 1, 1)
    above = parents.clamp(min=0)[..., None].expand(-1, -1, nodes)
    real = (parents >= 0)[..., None]
    for _ in range(max_depth):
        mask = mask | mask.gather(1, above) & real
    return DraftTree(token_ids, parents, depths, mask, scores.float())


__all__ = ["DraftTree", "NodeTable", "build_by_level", "build_tables", "build_tree", "root_only", "tree_from_tables"]
