"""A drafter that knows the texts: it proposes what the target will write, among decoys, and is wrong now and then."""

import math

import torch

from hf_treeflash.transitions import NextTokens
from tests.helpers.tiny import VOCAB, tiny_drafter, with_knobs


class Quotes:
    """Trees around known continuations, one per text of the batch.

    Depth `d` offers the text's token and three decoys; row 1 of a depth continues the decoys. At every fifth position
    the text's token is left out, so that no path is always accepted to its end.

    Args:
        texts (`list[list[int]]`):
            What follows each anchor.
        positions (`list[int]`):
            Positions of the anchors.
        depth (`int`):
            Of the trees.
    """

    def __init__(self, texts: list[list[int]], positions: list[int], depth: int):
        self.texts, self.positions, self.depth = texts, positions, depth

    def rows(self) -> "Quotes":
        return self

    def device_tables(self) -> None:
        return None

    def compute_guessed(self) -> list[int]:
        return []

    def read(self, text: int, depth: int, row: int) -> NextTokens:
        known, position = self.texts[text], self.positions[text] + depth
        decoys = [(7 * position + 5 * step + 3 * row + text) % VOCAB for step in range(4)]
        tokens = list(dict.fromkeys(decoys))
        quoted = row == 0 and depth < len(known) and position % 5 != 2
        if quoted:
            decoys = [token for token in tokens if token != known[depth]][:3]
            tokens = [*decoys[:1], known[depth], *decoys[1:]]
        probabilities = [0.15, 0.6, 0.15, 0.1] if quoted else [0.4, 0.3, 0.2, 0.1]
        log_probs = [math.log(p) for p in probabilities[: len(tokens)]]
        order = sorted(range(len(tokens)), key=lambda place: -log_probs[place])
        tokens = [tokens[place] for place in order]
        rows = {token: 1 for token in tokens} | ({known[depth]: 0} if quoted else {})
        return NextTokens(tokens, sorted(log_probs, reverse=True), rows if depth + 1 < self.depth else {})


def quoting_drafter(shape: dict | None = None, **knobs):
    """Return a drafter for any tiny target that quotes what its `texts` say (`knows`).

    Args:
        shape (`dict`, *optional*):
            Fields of its config, for targets of another shape.
        knobs:
            Its knobs.
    """
    drafter = with_knobs(tiny_drafter(**{"num_target_layers": None, **(shape or {})}), **{"tree_budget": 24, **knobs})
    read = type(drafter).draft
    drafter.texts = []

    def draft(anchor_ids, context, embed, lm_head, *, position_ids, **kwargs):
        read(drafter, anchor_ids, context, embed, lm_head, position_ids=position_ids, **kwargs)  # fills its cache
        slots = drafter.config.block_size
        positions = position_ids[:, -slots].tolist()
        found, candidates = [], list(drafter.texts)
        for anchor, position in zip(anchor_ids.tolist(), positions, strict=True):
            # Rows leave the batch, but keep their order.
            while candidates and (len(candidates[0]) <= position or candidates[0][position] != anchor):
                candidates.pop(0)
            found.append(candidates.pop(0)[position + 1 :] if candidates else [])
        return Quotes(found, positions, slots - 1)

    drafter.draft = draft
    return drafter


def knows(drafter, sequences: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Tell a drafter what the target wrote, padding of the prompts aside."""
    padding = (attention_mask == 0).sum(1).tolist()
    drafter.texts = [ids[left:] for ids, left in zip(sequences.tolist(), padding, strict=True)]


__all__ = ["knows", "quoting_drafter"]
