"""Prompt lookup beside the drafter: what followed the latest words earlier in the text joins the same tree."""

import math

from transformers import GenerationConfig
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .sequences import Sequences
from .tree import NodeTable


class PromptLookup:
    """Finds continuations of each row's last n-gram and learns how far they can be trusted.

    Args:
        generation_config ([`GenerationConfig`]):
            Of the call; `prompt_lookup_num_tokens` and `max_matching_ngram_size` as transformers reads them.
        batch (`int`):
            Rows of the call.
    """

    def __init__(self, generation_config: GenerationConfig, batch: int):
        self.finder = PromptLookupCandidateGenerator(
            num_output_tokens=generation_config.prompt_lookup_num_tokens,
            max_matching_ngram_size=generation_config.max_matching_ngram_size or 2,
            max_length=generation_config.max_length,
        )
        self.chains: list[list[int]] = [[] for _ in range(batch)]
        # Found tokens that were tried, and those the target agreed with; one of two to begin with.
        self.tried, self.agreed = 2.0, 1.0

    def find(self, rows: list[int], sequences: Sequences) -> tuple[list[list[int]], float]:
        """Return the tokens that followed each row's last n-gram before, and the probability of each token.

        Args:
            rows (`list[int]`):
                Rows of the call that are still being written.
            sequences ([`Sequences`]):
                The texts so far.
        """
        for row in rows:
            prefix = sequences.prefix(row)
            found, _ = self.finder.get_candidates(prefix)
            self.chains[row] = found[0, prefix.shape[1] :].tolist()
        return [self.chains[row] for row in rows], self.trust

    def observe(self, row: int, token_ids: list[int]) -> None:
        """Compare what was found with what the target chose."""
        for found, chosen in zip(self.chains[row], token_ids, strict=False):
            self.tried += 1
            if found != chosen:
                break
            self.agreed += 1
        # Recent tokens count most: a text quotes in stretches.
        self.tried, self.agreed = 0.9 * self.tried, 0.9 * self.agreed

    @property
    def trust(self) -> float:
        """Probability that a found token is the target's choice, given those before it were."""
        return min(self.agreed / self.tried, 0.99)


def graft(node: NodeTable, chain: list[int], trust: float, tree_budget: int) -> NodeTable:
    """Merge a chain into a tree under one budget: the most probable nodes of both stay.

    Args:
        node ([`NodeTable`]):
            The drafted tree, best node first.
        chain (`list[int]`):
            Tokens after the root.
        trust (`float`):
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
    for depth in range(1, len(chain) + 1):
        score += math.log(trust)
        path = tuple(chain[:depth])
        paths[path] = max(score, paths.get(path, score))
    # A better child lifts its ancestors, so that the selection stays closed under parents.
    for path in sorted(paths, key=len, reverse=True):
        if path:
            paths[path[:-1]] = max(paths[path[:-1]], paths[path])
    best = sorted(paths, key=lambda path: (-paths[path], len(path), path))[:tree_budget]
    return table_from_paths(node.token_ids[0], best, paths)


def table_from_paths(root: int, ordered: list[tuple[int, ...]], scores: dict[tuple[int, ...], float]) -> NodeTable:
    """Number paths, which stand parents first, as nodes."""
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
