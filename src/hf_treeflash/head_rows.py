"""The AR head on a CPU: rows of the transitions are computed when a tree reaches them."""

from collections.abc import Callable

import numpy as np
import torch

from .tree import Children

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
            Their marginal log-probabilities; only their order counts.
    """

    def __init__(self, score: Callable, embed: Callable, states, anchor_ids, shortlist, shortlist_log_probs):
        self.score, self.embed = score, embed
        # The head takes slots of one sequence: the batch's blocks stand one after another.
        self.states = [part.flatten(0, 1)[None] for part in states]
        # What is small is looked up on the host, where it costs a fraction of a tensor operation. The target, which
        # scores the tokens, may be on another device than the drafter.
        self.log_probs = shortlist_log_probs.float().cpu().numpy()
        self.depth = shortlist.shape[1] + 1
        # The anchor stands before the first depth, and after the last comes no token.
        self.previous = [[[anchor], *slots] for anchor, slots in zip(anchor_ids.tolist(), shortlist.tolist(), strict=True)]
        self.following = [
            [*({token: row for row, token in enumerate(slot)} for slot in slots[1:]), {}] for slots in self.previous
        ]
        self.computed: dict[Key, Children] = {}

    def read(self, index: int, depth: int, row: int) -> Children | None:
        """Return a row's next tokens, their log-probabilities and the rows that continue them, or None."""
        return self.computed.get((index, depth, row))

    @torch.no_grad()
    def compute(self, missing: list[Key]) -> None:
        """Compute rows, all in one batch."""
        keys = list(dict.fromkeys(missing))
        previous = torch.tensor([self.previous[index][depth][row] for index, depth, row in keys])
        slots = torch.tensor([index * self.depth + depth for index, depth, _ in keys])
        token_ids, log_probs = self.score(*self.states, self.embed(previous)[None], slots)
        rows = zip(keys, token_ids[0].tolist(), log_probs[0].tolist(), strict=True)
        self.computed |= {key: (tokens, own, self.following[key[0]][key[1]]) for key, tokens, own in rows}

    def compute_likely(self, count: int) -> None:
        """Compute the anchors' rows and the `count` rows of each batch row that its tree most likely reaches."""
        batch, links, rows = self.log_probs.shape
        keys = [(index, 0, 0) for index in range(batch)]
        if links:
            # The way down takes the best token of each slot. Given the one before it, a token is surer than its
            # marginal says: half the price.
            best = self.log_probs[:, :, :1] / 2
            likely = (self.log_probs + best.cumsum(axis=1) - best).reshape(batch, -1)
            places = np.argsort(-likely, axis=1, kind="stable")[:, :count]
            keys += [
                (index, place // rows + 1, place % rows) for index, own in enumerate(places.tolist()) for place in own
            ]
        self.compute(keys)


__all__ = ["HeadRows"]
