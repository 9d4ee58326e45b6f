"""The AR head on a CPU: rows of the transitions are computed when a tree reaches them."""

from collections.abc import Callable

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
            Their marginal log-probabilities; only their order counts.
    """

    def __init__(self, score: Callable, embed: Callable, states, anchor_ids, shortlist, shortlist_log_probs):
        self.score, self.embed, self.log_probs = score, embed, shortlist_log_probs
        # The head takes slots of one sequence: the batch's blocks stand one after another.
        self.states = [part.flatten(0, 1)[None] for part in states]
        first = anchor_ids[:, None, None].expand(-1, 1, shortlist.shape[2])
        self.previous = torch.cat([first, shortlist], dim=1)
        # After the last depth comes none: no token has the id -1.
        self.following = torch.cat([shortlist, torch.full_like(first, -1)], dim=1)
        self.computed: dict[Key, tuple] = {}

    def read(self, index: int, depth: int, row: int) -> tuple[list[int], list[float], list[int]] | None:
        """Return a row's next tokens, their log-probabilities and the rows that continue them, or None."""
        return self.computed.get((index, depth, row))

    def compute(self, missing: list[Key]) -> None:
        """Compute rows, all in one batch."""
        keys = list(dict.fromkeys(missing))
        index, depth, row = torch.tensor(keys).unbind(dim=1)
        previous = self.embed(self.previous[index, depth, row])[None]
        token_ids, log_probs = self.score(*self.states, previous, index * self.previous.shape[1] + depth)
        token_ids, log_probs = token_ids[0], log_probs[0]
        same = token_ids[:, :, None] == self.following[index, depth][:, None]
        next_row = torch.where(same.any(dim=-1), same.byte().argmax(dim=-1), -1)
        self.computed.update(
            zip(keys, zip(token_ids.tolist(), log_probs.tolist(), next_row.tolist(), strict=True), strict=True)
        )

    def compute_likely(self, count: int) -> None:
        """Compute the anchors' rows and the `count` rows of each batch row that its tree most likely reaches."""
        batch, links, rows = self.log_probs.shape
        keys = [(index, 0, 0) for index in range(batch)]
        if links:
            # The way down takes the best token of each slot. Given the one before it, a token is surer than its
            # marginal says: half the price.
            way = torch.nn.functional.pad(self.log_probs[:, :-1, 0], (1, 0)).cumsum(dim=1) / 2
            likely = (self.log_probs + way[..., None]).flatten(1)
            places = likely.topk(min(count, links * rows), dim=1).indices
            keys += [
                (index, place // rows + 1, place % rows) for index, own in enumerate(places.tolist()) for place in own
            ]
        self.compute(keys)


__all__ = ["HeadRows"]
