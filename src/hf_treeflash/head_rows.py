"""The AR head on a CPU: rows of the transitions are computed when a tree reaches them."""

from collections.abc import Callable

import numpy as np
import torch

Key = tuple[int, int, int]  # batch row, depth index, row of the transitions


class HeadRows:
    """The same rows as [`Transitions`], without the many that no tree of the wanted size reaches.

    Args:
        score (`Callable`):
            Given un-normed and normed states `(1, slots, hidden_size)`, embeddings of previous tokens
            `(1, rows, hidden_size)` and the slots they precede `(rows,)`, returns the next tokens and their
            log-probabilities, both `(1, rows, branching)`.
        embed (`Callable`):
            The target's input embedding.
        states (`tuple[torch.Tensor, torch.Tensor]`):
            Un-normed and normed states of the block, `(batch, depth, hidden_size)`.
        anchor_ids (`torch.LongTensor` of shape `(batch,)`):
            Newest committed tokens.
        shortlist (`torch.LongTensor` of shape `(batch, depth - 1, rows)`):
            Candidate tokens of each depth but the last.
        shortlist_log_probs (`torch.FloatTensor` of the same shape, nats):
            Their marginal log-probabilities; they decide which rows are computed together, not the tree.
    """

    def __init__(self, score: Callable, embed: Callable, states, anchor_ids, shortlist, shortlist_log_probs):
        self.score, self.embed = score, embed
        # The head takes slots of one sequence: the batch's blocks stand one after another.
        self.slots = states[0].shape[1]
        self.states = [part.flatten(0, 1)[None] for part in states]
        # What is small is looked up on the host, where it costs a fraction of a tensor operation.
        self.log_probs = shortlist_log_probs.tolist()
        # The anchor stands before the first depth, and after the last comes no token.
        self.previous = [[[anchor], *own] for anchor, own in zip(anchor_ids.tolist(), shortlist.tolist(), strict=True)]
        self.following = [
            [*(dict(zip(slot, range(len(slot)), strict=True)) for slot in slots[1:]), {}] for slots in self.previous
        ]
        self.computed: dict[Key, tuple] = {}
        self.missing: dict[Key, tuple] = {}  # rows that were read before they were computed, and what was guessed

    def read(self, index: int, depth: int, row: int) -> tuple[list[int], list[float], dict[int, int]]:
        """Return a row's next tokens, their log-probabilities (nats) and, by token, the rows that continue them.

        Of a row that is still missing these are a guess, the shortlist of its slot: so a tree built on it goes on
        below the row, and the rows it will most likely need there are computed with it.
        """
        key = index, depth, row
        if key in self.computed:
            return self.computed[key]
        if key not in self.missing:
            following = self.following[index][depth]
            self.missing[key] = list(following), self.log_probs[index][depth] if following else [], following
        return self.missing[key]

    @torch.no_grad()
    def compute(self, keys: list[Key]) -> None:
        """Compute rows, all in one batch."""
        self.missing = {}
        previous = np.array([self.previous[index][depth][row] for index, depth, row in keys], dtype=np.int64)
        slots = np.array([index * self.slots + depth for index, depth, _ in keys], dtype=np.int64)
        previous_embeds = self.embed(torch.from_numpy(previous))[None]
        token_ids, log_probs = self.score(*self.states, previous_embeds, torch.from_numpy(slots))
        rows = zip(keys, token_ids[0].tolist(), log_probs[0].tolist(), strict=True)
        self.computed |= {key: (tokens, own, self.following[key[0]][key[1]]) for key, tokens, own in rows}

    def compute_likely(self, count: int) -> None:
        """Compute the anchors' rows and the `count` rows of each batch row that its tree most likely reaches."""
        keys = [(index, 0, 0) for index in range(len(self.log_probs))]
        for index, slots in enumerate(self.log_probs):
            # The way down takes the best token of each slot. Given the one before it, a token is surer than its
            # marginal says: half the price.
            likely, price = [], 0.0
            for depth, log_probs in enumerate(slots, start=1):
                likely += [(-price - log_prob, depth, row) for row, log_prob in enumerate(log_probs)]
                price += log_probs[0] / 2
            keys += [(index, depth, row) for _, depth, row in sorted(likely)[:count]]
        self.compute(keys)


__all__ = ["HeadRows"]
