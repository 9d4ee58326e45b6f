"""The draft tree and its builders, on the host and on a device: the most probable nodes of what a drafter proposes."""

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from .compat import kernels
from .transitions import NextTokens, Proposal, TransitionRows, Transitions

WORD_BITS = 64

Permitted = Callable[[list[int]], torch.Tensor]


class NodeTable(NamedTuple):
    """One text's nodes as host lists, root first, parents before children."""

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
        ancestor_words (`torch.LongTensor` of shape `(batch, nodes, ceil(nodes / 64))`):
            Bit `j % 64` of word `j // 64` of node `i` says that it sees node `j`: its ancestors and itself.
        path_log_probs (`torch.FloatTensor` of shape `(batch, nodes)`, nats):
            Log-probability the drafter gives to the path from the root; -inf for unused nodes.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestor_words: torch.Tensor
    path_log_probs: torch.Tensor

    @cached_property
    def ancestor_mask(self) -> torch.Tensor:
        """Whether node `i` sees node `j`; bool, `(batch, nodes, nodes)`."""
        words, nodes = self.ancestor_words, self.token_ids.shape[1]
        if words.device.type == "cpu":  # numpy unpacks several times faster
            octets = np.unpackbits(words.numpy().view(np.uint8), axis=2, count=nodes, bitorder="little")
            return torch.from_numpy(octets.view(np.bool_))
        bits = words[..., None] >> torch.arange(WORD_BITS, device=words.device) & 1  # (batch, nodes, words, 64)
        return bits.flatten(2)[..., :nodes].bool()

    @cached_property
    def children(self) -> list[dict[tuple[int, int], int]]:
        """For each row, the child node reached from (node, token)."""
        # In one copy: the host waits for each.
        rows = torch.stack([self.parents, self.token_ids], dim=1).tolist()
        return [
            {(parent, token): node for node, (parent, token) in enumerate(zip(*row, strict=True)) if parent >= 0}
            for row in rows
        ]

    def first(self, nodes: int) -> "DraftTree":
        """Return the tree of the first nodes; parents stand before children, so any number is a tree.

        Args:
            nodes (`int`):
                How many, root included.
        """
        if nodes >= self.token_ids.shape[1]:
            return self
        return DraftTree(
            self.token_ids[:, :nodes],
            self.parents[:, :nodes],
            self.depths[:, :nodes],
            self.ancestor_words[:, :nodes, : -(-nodes // WORD_BITS)],
            self.path_log_probs[:, :nodes],
        )

    def to(self, device: torch.device) -> "DraftTree":
        """Move the tree to a device."""
        if self.token_ids.device == device:
            return self
        return DraftTree(*(getattr(self, field.name).to(device) for field in fields(self)))


def build_tree(proposal: Proposal, anchor_ids: torch.Tensor, tree_budget: int) -> DraftTree:
    """Build the trees of the `tree_budget - 1` most probable nodes below each anchor.

    The order of nodes is deterministic: higher path log-probability first, then shallower, then smaller rank path
    (the ranks of the choices from the root down, compared in that order).

    Args:
        proposal ([`Transitions`] or [`HeadRows`]):
            What the drafter proposes, see [`TreeFlashDraftModel.draft`].
        anchor_ids (`torch.LongTensor` of shape `(batch,)`):
            Newest committed tokens.
        tree_budget (`int`):
            Nodes per tree, root included.

    Returns:
        [`DraftTree`]: On the device of the proposal. On the host it is smaller than the budget where there are not
        enough candidates; on a device, which cannot know, the nodes it lacks are unused.

    Source: arXiv 2606.03819; the selection is OPT-Tree's (arXiv 2406.17276).
    """
    tables = proposal.device_tables()
    if tables is None or kernels is None:
        return tree_from_tables(build_tables(proposal.rows(), anchor_ids, tree_budget))
    return build_on_device(tables, anchor_ids, tree_budget)


def build_on_device(transitions: Transitions, anchor_ids: torch.Tensor, tree_budget: int) -> DraftTree:
    """Build the same trees where the tables are, without the host; path log-probabilities are added up in float32.

    Args:
        transitions ([`Transitions`]):
            The tables.
        anchor_ids (`torch.LongTensor` of shape `(batch,)`), tree_budget (`int`):
            See [`build_tree`].
    """
    tree = kernels.build_tree(*transitions, tree_budget)
    token_ids = torch.cat([anchor_ids.to(tree.token_ids.device)[:, None], tree.token_ids[:, 1:]], dim=1)
    return DraftTree(token_ids, tree.parents, tree.depths, tree.ancestor_words, tree.path_log_probs)


def build_tables(
    rows: TransitionRows, anchor_ids: torch.Tensor, tree_budget: int, permitted: Sequence[Permitted] | None = None
) -> list[NodeTable]:
    """Build the same trees on the host, one table per text, with what only the host can do.

    Args:
        rows ([`TransitionRows`]):
            What the drafter proposes.
        anchor_ids (`torch.LongTensor` of shape `(batch,)`), tree_budget (`int`):
            See [`build_tree`].
        permitted (`Sequence[Callable]`, *optional*):
            For each text, given tokens after the anchor, those that may follow, as a boolean tensor over the
            vocabulary. No node is spent on others, and the rest share their probability.
    """
    anchors = anchor_ids.tolist()
    tables: dict[int, NodeTable] = {}
    unbuilt = list(range(len(anchors)))
    while unbuilt:
        for text in unbuilt:
            allowed = None if permitted is None else permitted[text]
            tables[text] = best_first(functools.partial(rows.read, text), anchors[text], tree_budget, allowed)
        unbuilt = rows.compute_guessed()
    return [tables[text] for text in range(len(anchors))]


def best_first(
    read: Callable[[int, int], NextTokens], anchor: int, tree_budget: int, permitted: Permitted | None = None
) -> NodeTable:
    """Pop the best open node until the budget is spent; only rows of the nodes on the tree are ever read.

    Args:
        read (`Callable[[int, int], NextTokens]`):
            Returns the row of a depth index and a number.
        anchor (`int`), tree_budget (`int`), permitted (`Callable`, *optional*):
            See [`build_tables`], of one text.
    """
    node = NodeTable([anchor], [-1], [0], [0.0], [1])
    token_ids, parents, depths, path_log_probs, ancestors = node
    frontier: list[tuple] = []

    def open_row(parent: int, depth: int, row: int, ranks: tuple, score: float) -> None:
        """Offer the children of a node, which a row describes."""
        children = read(depth, row)
        if permitted is not None:
            children = _permitted_children(children, permitted(_path_to(node, parent)))
        push(score, (*ranks, 0), parent, children)

    def push(score: float, ranks: tuple, parent: int, children: NextTokens) -> None:
        # An entry stands for one child and, once taken, offers the next sibling. Ranks are unique: nothing after
        # them is ever compared.
        log_probs, rank = children.log_probs, ranks[-1]
        if rank < len(log_probs) and log_probs[rank] > float("-inf"):
            heapq.heappush(frontier, (-score - log_probs[rank], len(ranks), ranks, parent, children, score))

    open_row(0, 0, 0, (), 0.0)
    while frontier and len(token_ids) < tree_budget:
        total, depth, ranks, parent, children, score = heapq.heappop(frontier)
        rank, index = ranks[-1], len(token_ids)
        token = children.token_ids[rank]
        token_ids.append(token)
        parents.append(parent)
        depths.append(depth)
        path_log_probs.append(-total)
        ancestors.append(ancestors[parent] | 1 << index)
        push(score, (*ranks[:-1], rank + 1), parent, children)
        row = children.next_rows.get(token, -1)
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


def _permitted_children(children: NextTokens, permitted: torch.Tensor) -> NextTokens:
    """Drop children that may not be emitted and give their probability to the others."""
    token_ids, log_probs, next_rows = children
    kept = [rank for rank, token in enumerate(token_ids) if permitted[token]]
    mass = sum(math.exp(log_probs[rank]) for rank in kept)
    rest = math.log(mass) if mass > 0 else 0.0
    return NextTokens([token_ids[rank] for rank in kept], [log_probs[rank] - rest for rank in kept], next_rows)


def tree_from_tables(rows: list[NodeTable]) -> DraftTree:
    """Stack the tables of a batch, padding shorter ones with unused nodes that see only themselves.

    Args:
        rows (`list[NodeTable]`):
            One per text.
    """
    nodes = max(len(row.token_ids) for row in rows)

    def stack(field: str, pad: float, dtype: type = np.int64) -> torch.Tensor:
        lists = [getattr(row, field) for row in rows]
        # numpy reads lists several times faster
        return torch.from_numpy(np.array([values + [pad] * (nodes - len(values)) for values in lists], dtype=dtype))

    masks = [row.ancestors + [1 << node for node in range(len(row.ancestors), nodes)] for row in rows]
    width = -(-nodes // WORD_BITS)
    packed = bytearray().join(word.to_bytes(8 * width, "little") for words in masks for word in words)
    words = np.frombuffer(packed, dtype="<i8").reshape(len(rows), nodes, width)  # (batch, nodes, words)
    return DraftTree(
        token_ids=stack("token_ids", 0),
        parents=stack("parents", -1),
        depths=stack("depths", 0),
        ancestor_words=torch.from_numpy(words),
        path_log_probs=stack("path_log_probs", float("-inf"), np.float32),
    )


def root_only(anchor_ids: torch.Tensor) -> DraftTree:
    """Return trees of nothing but a root: plain decoding.

    Args:
        anchor_ids (`torch.LongTensor` of shape `(batch,)`):
            Newest committed tokens.
    """
    token_ids = anchor_ids[:, None]
    zeros = torch.zeros_like(token_ids)
    return DraftTree(token_ids, zeros - 1, zeros, torch.ones_like(zeros[..., None]), zeros.float())


def chains(token_ids: torch.Tensor) -> DraftTree:
    """Return trees without branches: a text each.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch, nodes)`):
            The texts.
    """
    batch, nodes = token_ids.shape
    places = torch.arange(nodes, device=token_ids.device).expand(batch, -1)
    words = chain_words(nodes).to(token_ids.device).expand(batch, -1, -1)
    return DraftTree(token_ids, places - 1, places, words, torch.zeros(batch, nodes, device=token_ids.device))


def chain_words(nodes: int) -> torch.Tensor:
    """Return the ancestor words of a tree without branches, `(nodes, ceil(nodes / 64))`, see [`DraftTree`]."""
    width = -(-nodes // WORD_BITS) * WORD_BITS
    sees = np.tril(np.ones((nodes, width), dtype=np.bool_))
    return torch.from_numpy(np.packbits(sees, axis=1, bitorder="little").view(np.int64))


__all__ = [
    "WORD_BITS",
    "DraftTree",
    "NodeTable",
    "build_on_device",
    "build_tables",
    "build_tree",
    "chain_words",
    "chains",
    "root_only",
    "tree_from_tables",
]
