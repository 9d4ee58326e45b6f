"""Prompt lookup beside the drafter: what followed the latest words earlier in the text joins the same tree."""

import math

import torch
from transformers import GenerationConfig

from .sequences import Sequences
from .tree import NodeTable

LONGEST_MATCH = 8  # tokens; longer ones are no more telling


class PromptLookup:
    """Finds where each row's latest tokens stood before, longest match first, and learns how far to trust the rest.

    Trust goes by the length of the match: two tokens in common say little, eight say that the text is being copied.

    Args:
        generation_config ([`GenerationConfig`]):
            Of the call; `prompt_lookup_num_tokens` and `max_matching_ngram_size` as transformers reads them, except
            that matches of up to eight tokens are told apart by default.
        batch (`int`):
            Rows of the call.

    Raises:
        ValueError: For settings that could find nothing.
    """

    def __init__(self, generation_config: GenerationConfig, batch: int):
        for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
            value = getattr(generation_config, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        self.tokens = generation_config.prompt_lookup_num_tokens
        self.longest = generation_config.max_matching_ngram_size or LONGEST_MATCH
        self.texts = [IndexedText() for _ in range(batch)]
        self.chains: list[list[int]] = [[] for _ in range(batch)]
        self.matches = [0] * batch  # tokens in common with the place where the chain was found
        # Found tokens that were tried, and those the target agreed with, by tokens matched before them.
        self.tried = [4.0] * (self.longest + 1)
        self.agreed = [4.0 * match / (match + 1.5) for match in range(self.longest + 1)]

    def find(
        self, rows: list[int], sequences: Sequences, noise: torch.Tensor | None = None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return the tokens that followed each row's latest ones before, and the probability of each.

        Args:
            rows (`list[int]`):
                Rows of the call that are still being written.
            sequences ([`Sequences`]):
                The texts so far.
            noise (`torch.FloatTensor` of shape `(rows, tokens, vocab)`, *optional*):
                Of the draws of the coming tokens, see [`Noise`].
        """
        for row in rows:
            text = self.texts[row]
            text.extend(sequences.prefix(row)[0, len(text.token_ids) :].tolist())
            place, self.matches[row] = text.longest_match(self.longest)
            room = min(self.tokens, sequences.room(row) - 1)
            self.chains[row] = text.token_ids[place : place + room] if self.matches[row] else []
        chains, trusts = [self.chains[row] for row in rows], [self.trusts(row) for row in rows]
        if noise is not None:
            trusts = [trusts_given(*row) for row in zip(noise, chains, trusts, strict=True)]
        return chains, trusts

    def trusts(self, row: int) -> list[float]:
        """Return the probability of each token of a row's chain, given those before it."""
        lengths = [min(self.matches[row] + depth, self.longest) for depth in range(len(self.chains[row]))]
        return [min(self.agreed[length] / self.tried[length], 0.99) for length in lengths]

    def observe(self, row: int, token_ids: list[int]) -> None:
        """Compare what was found with what the target chose.

        Args:
            row (`int`):
                Row of the call.
            token_ids (`list[int]`):
                The tokens it emitted in this round.
        """
        for depth, (found, chosen) in enumerate(zip(self.chains[row], token_ids, strict=False)):
            length = min(self.matches[row] + depth, self.longest)
            # Recent tokens count most: a text quotes in stretches.
            self.tried[length] = 0.9 * self.tried[length] + 1
            self.agreed[length] = 0.9 * self.agreed[length] + (found == chosen)
            if found != chosen:
                break


class IndexedText:
    """A growing text that knows where each token stands."""

    def __init__(self):
        self.token_ids: list[int] = []
        self.places: dict[int, list[int]] = {}

    def extend(self, token_ids: list[int]) -> None:
        """Add tokens at the end."""
        for token in token_ids:
            self.places.setdefault(token, []).append(len(self.token_ids))
            self.token_ids.append(token)

    def longest_match(self, most: int) -> tuple[int, int]:
        """Return where the text goes on after the longest match of its end, latest first, and the match's length."""
        ids, best, length = self.token_ids, 0, 0
        for place in reversed(self.places[ids[-1]][:-1]):
            match = 1
            while match < most and match <= place and ids[place - match] == ids[-1 - match]:
                match += 1
            if match > length:
                best, length = place + 1, match
            if length == most:
                break
        return best, length


def trusts_given(noise: torch.Tensor, chain: list[int], trusts: list[float]) -> list[float]:
    """Return the probability of each token of a chain once the noise of its draw is known.

    A token of probability `p` is drawn if `p / noise` exceeds the maximum of all others, whose noise stays unknown
    here: of `exp(-noise * (1 - p) / p)`, the mean over the noise is `p`.

    Args:
        noise (`torch.FloatTensor` of shape `(tokens, vocab)`):
            Of the draws of the coming tokens.
        chain (`list[int]`), trusts (`list[float]`):
            Tokens, and their probabilities before anything is known of the draws.
    """
    own = noise[torch.arange(len(chain)), torch.tensor(chain, dtype=torch.long)].tolist()
    return [math.exp(-value * (1 - trust) / trust) for value, trust in zip(own, trusts, strict=True)]


def graft(node: NodeTable, chain: list[int], trusts: list[float], tree_budget: int) -> NodeTable:
    """Merge a chain into a tree under one budget: the most probable nodes of both stay.

    Args:
        node ([`NodeTable`]):
            The drafted tree, best node first.
        chain (`list[int]`):
            Tokens after the root.
        trusts (`list[float]`):
            Probability of each, given those before it.
        tree_budget (`int`):
            Nodes of the result, root included.
    """
    paths: dict[tuple[int, ...], float] = {(): 0.0}
    walked: list[tuple[int, ...]] = [()]
    for parent, token, score in zip(node.parents[1:], node.token_ids[1:], node.path_log_probs[1:], strict=True):
        walked.append((*walked[parent], token))
        paths[walked[-1]] = score
    score = 0.0
    for depth, trust in enumerate(trusts[: len(chain)], start=1):
        score += math.log(max(trust, 1e-9))
        path = tuple(chain[:depth])
        paths[path] = max(score, paths.get(path, score))
    # A better child lifts its ancestors, so that the selection stays closed under parents.
    for path in sorted(paths, key=len, reverse=True):
        if path:
            paths[path[:-1]] = max(paths[path[:-1]], paths[path])
    best = sorted(paths, key=lambda path: (-paths[path], len(path), path))[:tree_budget]
    return table_from_paths(node.token_ids[0], best, paths)


def table_from_paths(root: int, ordered: list[tuple[int, ...]], scores: dict[tuple[int, ...], float]) -> NodeTable:
    """Number paths as nodes.

    Args:
        root (`int`):
            Token of the root.
        ordered (`list[tuple[int, ...]]`):
            Tokens from the root, which is left out, to each node; parents stand before children.
        scores (`dict[tuple[int, ...], float]`, nats):
            Log-probability of each path.
    """
    index = {path: node for node, path in enumerate(ordered)}
    parents = [-1 if not path else index[path[:-1]] for path in ordered]
    ancestors: list[int] = []
    for node, parent in enumerate(parents):
        ancestors.append((ancestors[parent] if parent >= 0 else 0) | 1 << node)
    return NodeTable(
        token_ids=[path[-1] if path else root for path in ordered],
        parents=parents,
        depths=[len(path) for path in ordered],
        path_log_probs=[scores[path] for path in ordered],
        ancestors=ancestors,
    )


__all__ = ["PromptLookup", "graft"]
