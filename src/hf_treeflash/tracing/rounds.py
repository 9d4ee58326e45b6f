"""What is kept of a round: its tree, what both models thought of it, the path, the tokens, the time."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..tree import DraftTree
from ..verify import Verdict

DRAFTED, FOUND, OWN = "drafted", "found", "own"  # where a token came from


@dataclass
class TracedRound:
    """One round of one text.

    Attributes:
        token_ids (`list[int]`), parents (`list[int]`):
            Of the tree's nodes, root first, as in [`DraftTree`].
        drafter (`list[float]`):
            Probability the drafter gives each node after its parent. Where the noise of the coming draws is known, it
            is that of being drawn; of what prompt lookup found, it is how far that is trusted, if that is more.
        target (`list[float]`):
            Probability the target gives it there, before processors.
        found (`list[bool]`):
            Whether a node stands on what prompt lookup found in the text; the drafter may have proposed it, too.
        path (`list[int]`):
            Accepted nodes, root first.
        emitted (`list[int]`):
            The round's tokens; the last is the target's own.
        certainty (`list[float]`):
            Probability the target gave each of them, before processors.
        milliseconds (`dict[str, float]`):
            Time of each stage.
    """

    token_ids: list[int]
    parents: list[int]
    drafter: list[float]
    target: list[float]
    found: list[bool]
    path: list[int]
    emitted: list[int]
    certainty: list[float]
    milliseconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_prompt(cls, prompt_ids: list[int], first: int) -> "TracedRound":
        """Return the round of the prompt's pass, which drafts nothing."""
        root = prompt_ids[-1:] or [first]
        return cls(root, [-1], [1.0], [1.0], [False], [0], [first], [])

    @classmethod
    def of_walk(
        cls, tree: DraftTree, index: int, verdict: Verdict, logits: torch.Tensor, chain: list[int]
    ) -> "TracedRound":
        """Read a round off what its walk had before it.

        Args:
            tree ([`DraftTree`]), index (`int`):
                The trees, and the text's place among them.
            verdict ([`Verdict`]):
                What was accepted.
            logits (`torch.Tensor` of shape `(nodes, vocab)`):
                The target's at the nodes.
            chain (`list[int]`):
                What prompt lookup found to follow the anchor.
        """
        parents = tree.parents[index].tolist()
        used = 1 + sum(parent >= 0 for parent in parents)  # on a device, the last may be unused
        token_ids, parents = tree.token_ids[index, :used].tolist(), parents[:used]
        scores = tree.path_log_probs[index, :used].double().exp().tolist()
        logits = logits.float()
        norms = logits.logsumexp(dim=-1)  # (nodes,)

        def target_of(nodes: list[int], tokens: list[int]) -> list[float]:
            at, chosen_ids = torch.tensor([nodes, tokens], dtype=torch.long, device=logits.device)
            chosen = logits[at, chosen_ids]
            return (chosen - norms[at]).exp().tolist()

        return cls(
            token_ids=token_ids,
            parents=parents,
            drafter=[1.0, *(score / (scores[p] or 1.0) for score, p in zip(scores[1:], parents[1:], strict=True))],
            target=[1.0, *target_of(parents[1:], token_ids[1:])],
            found=nodes_on(tree.children[index], chain, used),
            path=verdict.path,
            emitted=verdict.token_ids,
            certainty=target_of(verdict.path, verdict.token_ids),
        )

    @property
    def shown_ids(self) -> set[int]:
        """The token ids of the tree, and the target's own."""
        return {*self.token_ids, *self.emitted}

    @property
    def origins(self) -> list[str]:
        """Where each of the round's tokens came from."""
        accepted = [FOUND if self.found[node] else DRAFTED for node in self.path[1:]]
        return [*accepted, OWN][: len(self.emitted)]

    def to_dict(self, pieces: list[str]) -> dict[str, Any]:
        """Return the round as plain data.

        Args:
            pieces (`list[str]`):
                What each of its tokens adds to the text.
        """
        return {
            "tokens": self.token_ids,
            "parents": self.parents,
            "lanes": lanes(self.parents, self.drafter, self.path),
            "drafter": [round(value, 4) for value in self.drafter],
            "target": [round(value, 4) for value in self.target],
            "found": [node for node, found in enumerate(self.found) if found],
            "path": self.path,
            "emitted": self.emitted,
            "pieces": pieces,
            "origins": self.origins,
            "certainty": [round(value, 4) for value in self.certainty],
            "ms": {name: round(value, 3) for name, value in self.milliseconds.items()},
        }


@dataclass
class TracedText:
    """One text of a call.

    Attributes:
        prompt_ids (`list[int]`):
            The prompt, without padding.
        settings (`dict`):
            Of the call: models, knobs, machine.
        rounds (`list[TracedRound]`):
            The prompt's pass first.
    """

    prompt_ids: list[int]
    settings: dict[str, Any]
    rounds: list[TracedRound] = field(default_factory=list)

    def to_dict(self, tokenizer) -> dict[str, Any]:
        """Return the text as plain data."""
        ids = [token for round in self.rounds for token in round.emitted]
        texts = iter(pieces(tokenizer, self.prompt_ids, ids))
        return {
            "settings": self.settings,
            "prompt": tokenizer.decode(self.prompt_ids),
            "rounds": [round.to_dict([next(texts) for _ in round.emitted]) for round in self.rounds],
        }


def nodes_on(children: dict[tuple[int, int], int], chain: list[int], nodes: int) -> list[bool]:
    """Return which nodes stand on a chain of tokens below the root."""
    found, node = [False] * nodes, 0
    for token in chain:
        if (node, token) not in children:
            break
        node = children[node, token]
        found[node] = True
    return found


def lanes(parents: list[int], drafter: list[float], path: list[int]) -> list[int]:
    """Return the line each node is drawn on: the accepted path on line 0, the target's own token behind it.

    Args:
        parents (`list[int]`), drafter (`list[float]`), path (`list[int]`):
            As in [`TracedRound`].
    """
    below: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            below[parent].append(node)
    lane = [0] * len(parents)
    free = {len(path): 1}  # of each depth, the first line without a node
    stack = [(0, 0)]
    while stack:  # in this order no two edges cross
        node, depth = stack.pop()
        lane[node] = max(free.get(depth, 0), lane[max(parents[node], 0)])
        free[depth] = lane[node] + 1
        below[node].sort(key=lambda child: (child in path, drafter[child]))
        stack += [(child, depth + 1) for child in below[node]]
    return lane


def pieces(tokenizer, before: list[int], ids: list[int]) -> list[str]:
    """Return what each token adds to a text; a character of several tokens comes with the last of them.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            The text's.
        before (`list[int]`), ids (`list[int]`):
            Tokens that the text begins with, and those asked about.
    """
    tail = [*before[-8:], *ids]
    start, read = 0, len(tail) - len(ids)
    found = []
    for end in range(read + 1, len(tail) + 1):
        known, now = tokenizer.decode(tail[start:read]), tokenizer.decode(tail[start:end])
        whole = not now.endswith("\N{REPLACEMENT CHARACTER}") or end == len(tail)
        found.append(now[len(known) :] if whole else "")
        if whole:
            start, read = read, end
    return found


__all__ = ["DRAFTED", "FOUND", "OWN", "TracedRound", "TracedText", "lanes", "pieces"]
