"""`tree_budget="auto"`: as many nodes per round as pay for themselves, down to none at all."""

import weakref

from .tree import DraftTree

SIZES = (8, 16, 32, 64)
PLAIN = 1  # a tree of the root alone: no draft, one token

# Seconds per round by tree size, learnt once per drafter and batch size and kept between calls.
_seconds: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


class AutoBudget:
    """Picks each round's tree size to maximise expected tokens per second, from measured round times.

    Rounds of every size are timed, the drafter's probabilities are calibrated by what was accepted, and while
    drafting does not beat one token per plain pass it rests, trying again after ever longer breaks.

    Args:
        drafter ([`PreTrainedModel`]):
            Whose measurements to use and extend.
        batch (`int`):
            Rows of the call.
    """

    def __init__(self, drafter, batch: int):
        self.seconds: dict[int, float] = _seconds.setdefault(drafter, {}).setdefault(batch, {})
        self.calibration = 1.0  # accepted tokens per expected one
        self.tokens = self.elapsed = 0.0  # decayed sums over drafted rounds
        self.drafted_rounds = self.resting = 0
        self.rest = 8
        self._expected = 0.0

    def drafts(self) -> bool:
        """Whether to draft in the coming round."""
        if PLAIN not in self.seconds:
            return False
        if self.resting > 0:
            self.resting -= 1
            return False
        return True

    def size(self, tree: DraftTree) -> int:
        """Return how many of a tree's nodes to verify; nodes stand best first, so any number is a tree.

        Args:
            tree ([`DraftTree`]):
                Of the largest size.
        """
        gains = self.calibration * tree.path_log_probs[:, 1:].exp().mean(dim=0).cumsum(0)
        available = tree.token_ids.shape[1]
        expected = {size: 1 + float(gains[size - 2]) for size in SIZES if size <= available} or {available: 1.0}
        untried = [size for size in expected if size not in self.seconds]
        best = untried[0] if untried else max(expected, key=lambda size: expected[size] / self.seconds[size])
        self._expected = (expected[best] - 1) / self.calibration
        return best

    def observe(self, tree: DraftTree, verdicts: list, seconds: float) -> None:
        """Learn from a round.

        Args:
            tree ([`DraftTree`]):
                What was verified, a root alone if nothing was drafted.
            verdicts (`list[Verdict]`):
                What each row accepted.
            seconds (`float`):
                Time of the whole round.
        """
        size = tree.token_ids.shape[1]
        tokens = sum(len(verdict.path) for verdict in verdicts) / len(verdicts)
        known = self.seconds.setdefault(size, seconds)
        # One slow round is noise; a drift, as the context grows, concerns every size.
        ratio = min(max(seconds / known, 0.5), 2.0)
        for other in self.seconds:
            self.seconds[other] *= ratio ** (0.2 if other == size else 0.05)
        if size == PLAIN:
            return
        self.drafted_rounds += 1
        self.tokens, self.elapsed = 0.85 * self.tokens + tokens, 0.85 * self.elapsed + self.seconds[size]
        if self._expected > 0:
            seen = min(max((tokens - 1) / self._expected, 0.1), 3.0)
            self.calibration += 0.1 * (seen - self.calibration)
        self._consider_a_rest()

    def _consider_a_rest(self) -> None:
        if self.tokens * self.seconds[PLAIN] >= self.elapsed:
            self.rest = 8
        elif self.drafted_rounds >= 4:
            self.resting, self.rest = self.rest, min(2 * self.rest, 128)
            self.drafted_rounds = 2  # a couple of rounds decide the next time
            self.tokens = self.elapsed = 0.0


__all__ = ["PLAIN", "SIZES", "AutoBudget"]
