"""What a drafter proposes for one block: rows of likely next tokens, in tables or computed on demand."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from .compat import kernels, on_cpu

Key = tuple[int, int, int]  # text of the batch, depth index, row


class NextTokens(NamedTuple):
    """What may follow one token, as host lists, most likely first.

    Attributes:
        token_ids (`list[int]`):
            Next tokens.
        log_probs (`list[float]`, nats):
            Their log-probabilities.
        next_rows (`dict[int, int]`):
            By token, the row of the next depth index that continues it; a token without one is a leaf.
    """

    token_ids: list[int]
    log_probs: list[float]
    next_rows: dict[int, int]


class TransitionRows(Protocol):
    """Rows as a tree reads them while it grows on the host.

    Depth index `d` (0-based) describes the nodes of depth `d + 1`, and its row 0 at depth index 0 is the anchor's.
    What else a row's number stands for (a shortlisted token, a path, a node) is up to the drafter: a tree only hands
    on what `next_rows` of the row above says.
    """

    def read(self, text: int, depth: int, row: int) -> NextTokens:
        """Return a row. It may be a guess, see `compute_guessed`.

        Args:
            text (`int`):
                Which text of the batch.
            depth (`int`), row (`int`):
                Depth index and number of the row.
        """

    def compute_guessed(self) -> list[int]:
        """Compute all rows that were guessed; return the texts that read one, whose trees are to be built again."""


class Proposal(Protocol):
    """What [`~TreeFlashDraftModel.draft`] returns, whatever head the drafter has."""

    def rows(self) -> TransitionRows:
        """Return the rows for a tree that is built on the host."""

    def device_tables(self) -> "Transitions | None":
        """Return the rows for a tree that is built on a CUDA device; None if they are not there."""


class Transitions(NamedTuple):
    """The most likely next tokens after every shortlisted token, at every depth of a block.

    Depth index `d` (0-based) describes the nodes of depth `d + 1`. Its row `r` belongs to the `r`-th shortlisted
    token of the slot before; at depth index 0 only row 0, the anchor's, is meaningful. A marginal drafter has one row.

    Attributes:
        token_ids (`torch.LongTensor` of shape `(batch, depth, rows, branching)`):
            Next tokens, most likely first.
        log_probs (`torch.FloatTensor` of the same shape, nats):
            Their log-probabilities.
        next_row (`torch.LongTensor` of the same shape):
            The row of depth index `d + 1` that continues the token, or -1 where none does: such a node is a leaf.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    next_row: torch.Tensor

    @classmethod
    def marginal(
        cls, logits: torch.Tensor, branching: int, temperature: float, draw_noise: torch.Tensor | None = None
    ) -> "Transitions":
        """Build the one-row transitions of a drafter without a head.

        Args:
            logits (`torch.Tensor` of shape `(batch, depth, vocab)`):
                Of the slots after the anchor.
            branching (`int`), temperature (`float`), draw_noise (`torch.FloatTensor`, *optional*):
                See [`top_log_probs`].
        """
        top = top_log_probs(logits, branching, temperature, draw_noise)
        token_ids, log_probs = (table[:, :, None] for table in top)  # (batch, depth, 1, branching)
        next_row = torch.zeros_like(token_ids)
        next_row[:, -1] = -1
        return cls(token_ids, log_probs, next_row)

    @classmethod
    def conditional(cls, token_ids: torch.Tensor, log_probs: torch.Tensor, shortlist: torch.Tensor) -> "Transitions":
        """Arrange the anchor's row and the shortlists' rows by depth, and link each token to its row of the next one.

        Args:
            token_ids, log_probs (`torch.Tensor` of shape `(batch, 1 + (depth - 1) * rows, branching)`):
                The anchor's row, then `rows` rows for each further depth.
            shortlist (`torch.LongTensor` of shape `(batch, depth - 1, rows)`):
                Candidate tokens of each depth but the last.
        """
        batch, links, rows = shortlist.shape

        def by_depth(flat: torch.Tensor) -> torch.Tensor:
            first = flat[:, :1, None].expand(-1, -1, rows, -1)  # (batch, 1, rows, branching)
            further = flat[:, 1:].view(batch, links, rows, flat.shape[-1])  # (batch, depth - 1, rows, branching)
            return torch.cat([first, further], dim=1)

        token_ids, log_probs = by_depth(token_ids), by_depth(log_probs)  # (batch, depth, rows, branching)
        # A shortlist has a token once at most; behind the last depth there is none.
        following = F.pad(shortlist, (0, 0, 0, 1), value=-1)[:, :, None, None]  # (batch, depth, 1, 1, rows)
        places = torch.arange(1, rows + 1, device=shortlist.device)
        next_row = ((token_ids[..., None] == following) * places).amax(dim=-1) - 1
        return cls(token_ids, log_probs, next_row)

    def rows(self) -> "TableRows":
        """Return the tables' rows for a tree that is built on the host."""
        return TableRows(self)

    def device_tables(self) -> "Transitions | None":
        """Return the tables themselves if they are on a CUDA device."""
        return None if on_cpu(self.token_ids.device) else self


class TableRows:
    """The rows of finished tables, as host lists once a tree reaches them.

    Args:
        transitions ([`Transitions`]):
            The tables.
    """

    def __init__(self, transitions: Transitions):
        self.tables = [table.cpu().numpy() for table in transitions]
        self.lists: dict[Key, NextTokens] = {}

    def read(self, text: int, depth: int, row: int) -> NextTokens:
        """Return a row, see [`TransitionRows`]."""
        key = text, depth, row
        if key not in self.lists:
            token_ids, log_probs, next_rows = (table[key].tolist() for table in self.tables)
            self.lists[key] = NextTokens(token_ids, log_probs, dict(zip(token_ids, next_rows, strict=True)))
        return self.lists[key]

    def compute_guessed(self) -> list[int]:
        """Return no text: nothing is ever guessed."""
        return []


class HeadRows:
    """The rows of [`Transitions`] without the many that no tree of the wanted size reaches, for a head on a CPU.

    Args:
        score (`Callable`):
            Given the slots' tensors `(1, slots, ...)`, embeddings of previous tokens `(1, rows, size)` and the slots
            they precede `(rows,)`, returns the next tokens and their log-probabilities, both `(1, rows, branching)`.
        embed (`Callable`):
            Embeds previous tokens.
        states (`tuple[torch.Tensor, ...]`):
            The slots' tensors that `score` reads first, each `(batch, depth, ...)`.
        anchor_ids (`torch.LongTensor` of shape `(batch,)`):
            Newest committed tokens.
        shortlist (`torch.LongTensor` of shape `(batch, depth - 1, rows)`):
            Candidate tokens of each depth but the last.
        shortlist_log_probs (`torch.FloatTensor` of the same shape, nats):
            Their marginal log-probabilities; they decide which rows are computed together, not the tree.
    """

    def __init__(
        self,
        score: Callable,
        embed: Callable,
        states: tuple[torch.Tensor, ...],
        anchor_ids: torch.Tensor,
        shortlist: torch.Tensor,
        shortlist_log_probs: torch.Tensor,
    ):
        self.score, self.embed = score, embed
        # The head takes slots of one sequence: the batch's blocks stand one after another.
        self.slots = states[0].shape[1]
        self.states = [part.flatten(0, 1)[None] for part in states]  # (1, batch * depth, hidden_size)
        # What is small is looked up on the host, where it costs a fraction of a tensor operation.
        self.log_probs = shortlist_log_probs.tolist()
        # The anchor stands before the first depth, and after the last comes no token.
        self.previous = [[[anchor], *own] for anchor, own in zip(anchor_ids.tolist(), shortlist.tolist(), strict=True)]
        self.following = [
            [*(dict(zip(slot, range(len(slot)), strict=True)) for slot in slots[1:]), {}] for slots in self.previous
        ]
        self.computed: dict[Key, NextTokens] = {}
        self.guessed: dict[Key, NextTokens] = {}  # rows that were read before they were computed

    def rows(self) -> "HeadRows":
        """Return itself: a tree on the host is what its rows are computed for."""
        return self

    def device_tables(self) -> None:
        """Return None: there are no tables."""

    def read(self, text: int, depth: int, row: int) -> NextTokens:
        """Return a row; one that is not computed yet is guessed.

        The guess is the shortlist of its slot: so a tree built on it goes on below the row, and the rows it will most
        likely need there are computed with it.
        """
        key = text, depth, row
        if key in self.computed:
            return self.computed[key]
        if key not in self.guessed:
            following = self.following[text][depth]
            log_probs = self.log_probs[text][depth] if following else []
            self.guessed[key] = NextTokens(list(following), log_probs, following)
        return self.guessed[key]

    def compute_guessed(self) -> list[int]:
        """Compute all rows that were guessed; return the texts that read one."""
        keys = list(self.guessed)
        if keys:
            self.compute(keys)
        return sorted({text for text, _, _ in keys})

    @torch.no_grad()
    def compute(self, keys: list[Key]) -> None:
        """Compute rows, all in one batch.

        Args:
            keys (`list[tuple[int, int, int]]`):
                Text, depth index and number of each.
        """
        self.guessed = {}
        previous = np.array([self.previous[text][depth][row] for text, depth, row in keys], dtype=np.int64)
        slots = np.array([text * self.slots + depth for text, depth, _ in keys], dtype=np.int64)
        previous_embeds = self.embed(torch.from_numpy(previous))[None]  # (1, rows, hidden_size)
        token_ids, log_probs = self.score(*self.states, previous_embeds, torch.from_numpy(slots))
        rows = zip(keys, token_ids[0].tolist(), log_probs[0].tolist(), strict=True)
        self.computed |= {key: NextTokens(tokens, own, self.following[key[0]][key[1]]) for key, tokens, own in rows}

    def compute_likely(self, count: int) -> None:
        """Compute the anchors' rows and those that trees most likely reach.

        Args:
            count (`int`):
                Rows of each text.
        """
        keys = [(text, 0, 0) for text in range(len(self.log_probs))]
        for text, slots in enumerate(self.log_probs):
            # The way down takes the best token of each slot. Given the one before it, a token is surer than its
            # marginal says: half the price.
            likely, price = [], 0.0
            for depth, log_probs in enumerate(slots, start=1):
                likely += [(-price - log_prob, depth, row) for row, log_prob in enumerate(log_probs)]
                price += log_probs[0] / 2
            keys += [(text, depth, row) for _, depth, row in sorted(likely)[:count]]
        self.compute(keys)


def top_log_probs(
    logits: torch.Tensor,
    k: int,
    temperature: float,
    draw_noise: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `k` most likely tokens of each row and their log-probabilities (float32, nats).

    Args:
        logits (`torch.Tensor` of shape `(batch, rows, vocab)`):
            Of the draft.
        k (`int`):
            At most so many tokens.
        temperature (`float`):
            What the logits, with their noise, are divided by.
        draw_noise (`torch.FloatTensor` of shape `(batch, slots, vocab)`, *optional*):
            What the draw of each slot's token adds to logits.
        slots (`torch.LongTensor` of shape `(rows,)`, *optional*):
            The slot each row belongs to; by default there is one row per slot.

    Returns:
        `tuple[torch.LongTensor, torch.FloatTensor]`: both of shape `(batch, rows, k)`.
    """
    if kernels is not None and not on_cpu(logits.device):
        return kernels.head_select(logits, min(k, logits.shape[-1]), temperature, draw_noise, slots)
    if draw_noise is not None:
        logits = logits + (draw_noise if slots is None else draw_noise.index_select(1, slots))
    logits = logits if temperature == 1.0 else logits / temperature
    top = logits.log_softmax(dim=-1, dtype=torch.float32).topk(min(k, logits.shape[-1]), dim=-1)
    return top.indices, top.values


__all__ = ["HeadRows", "NextTokens", "Proposal", "TableRows", "TransitionRows", "Transitions", "top_log_probs"]
