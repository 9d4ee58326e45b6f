"""`tree_budget="auto"`: as many nodes per round as pay for themselves, down to none at all."""

from dataclasses import dataclass, field

from .knobs import AUTO_SIZES
from .memory import recall, remember
from .tree import DraftTree

PLAIN = 1  # a tree of the root alone: no draft, one token
RESTS = (128, 256)  # rounds of the longest rest, at first and after failing again and again


@dataclass
class Learnt:
    """What holds for a drafter at any batch size, kept between calls."""

    accepted: float = 4.0  # drafted tokens the target agreed with, decayed
    foreseen: float = 4.0  # those the drafter's probabilities promised
    slope: float = 0.0  # seconds per node and row
    budgets: dict[int, "AutoBudget"] = field(default_factory=dict)


def auto_budget(drafter, batch: int) -> "AutoBudget":
    """Return the controller of a drafter at a batch size; calls go on where the last one stopped.

    Args:
        drafter ([`Drafter`]):
            Whose measurements to go on from.
        batch (`int`):
            Rows of the call.
    """
    learnt = recall("budget", drafter) or Learnt()
    remember("budget", learnt, drafter)
    return learnt.budgets.setdefault(batch, AutoBudget(batch, learnt))


class AutoBudget:
    """Picks each round's tree size to maximise expected tokens per second, from measured round times.

    The smallest size is tried first and a larger one only when it promises more. Drafting that loses against plain
    decoding rests until the loss is a few percent of the time since.

    Args:
        batch (`int`):
            Rows of the call.
        learnt ([`Learnt`]):
            What to share with other batch sizes.
    """

    def __init__(self, batch: int, learnt: Learnt):
        self.batch, self.learnt = batch, learnt
        self.seconds: dict[int, float] = {}  # per round, by tree size
        self.rounds = self.resting = self.picked = 0
        self.longest_rest = RESTS[0]
        self.tokens = self.elapsed = 0.0  # decayed sums over drafted rounds
        self._foreseen: float | None = None  # drafted tokens promised in this round, if it drafts

    def drafts(self) -> bool:
        """Whether to draft in the coming round."""
        self._foreseen = None
        if PLAIN not in self.seconds:
            return False
        if self.resting > 0:
            self.resting -= 1
            return False
        return True

    @property
    def limit(self) -> int:
        """Nodes worth drafting in the coming round: one size more than was picked last."""
        return next((size for size in AUTO_SIZES if size > self.picked), AUTO_SIZES[-1])

    def size(self, tree: DraftTree) -> int:
        """Return how many of a tree's nodes to verify; nodes stand best first, so any number is a tree.

        Args:
            tree ([`DraftTree`]):
                Of `limit` nodes.
        """
        available = tree.token_ids.shape[1]
        gains = tree.path_log_probs[:, 1:].exp().mean(dim=0).cumsum(0).tolist()
        foreseen = {size: gains[size - 2] for size in AUTO_SIZES if size <= available}
        foreseen = foreseen or {available: gains[-1] if gains else 0.0}
        trust = self.learnt.accepted / self.learnt.foreseen
        best, best_rate = min(foreseen), 0.0
        for size, gain in foreseen.items():
            untried = size not in self.seconds
            if untried and best_rate * self.seconds[PLAIN] < 0.8 and size > best:
                break  # where small trees clearly lose, larger ones are not worth a try
            rate = (1 + trust * gain) / self._estimate(size)
            if rate > best_rate:
                best, best_rate = size, rate
            if untried:  # one step up at a time
                break
        self._foreseen, self.picked = foreseen[best], best
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
        if self._foreseen is None or size > PLAIN:  # else a draft came to nothing, and was not free
            self._time(size, seconds)
        if self._foreseen is None:
            return
        # A batch is done when its last row is: the slower half counts twice.
        lengths = sorted(len(verdict.path) for verdict in verdicts)
        lengths += lengths[: len(lengths) // 2]
        tokens = sum(lengths) / len(lengths)
        learnt, promised = self.learnt, self._foreseen
        # Half of what was seen and half of what was foreseen: one round alone is chance.
        seen = 0.5 * (tokens + 1 + promised * learnt.accepted / learnt.foreseen)
        learnt.accepted = 0.95 * learnt.accepted + tokens - 1 + 1e-3
        learnt.foreseen = 0.95 * learnt.foreseen + promised + 1e-3
        self.rounds += 1
        self.tokens = 0.85 * self.tokens + seen
        self.elapsed = 0.85 * self.elapsed + self._estimate(size if size > PLAIN else min(AUTO_SIZES))
        self._consider_a_rest()

    def _estimate(self, size: int) -> float:
        """Seconds of a round: measured, or drawn on from the next smaller size."""
        below = max((known for known in self.seconds if known <= size), default=PLAIN)
        return self.seconds[below] + self.learnt.slope * self.batch * (size - below)

    def _time(self, size: int, seconds: float) -> None:
        if size not in self.seconds:
            # What runs for the first time may be slow for that alone.
            self.seconds[size] = min(seconds, 2 * self._estimate(size)) if len(self.seconds) > 1 else seconds
        ratio = min(seconds / self.seconds[size], 2.0)
        self.seconds[size] *= ratio ** (0.5 if ratio < 1 else 0.25)
        for other in self.seconds:
            if other > PLAIN < size and other != size:
                self.seconds[other] *= 0.995  # what is passed over looks better, until it is tried again
        below = max((known for known in self.seconds if PLAIN < known < size), default=None)
        if below is not None:
            self.learnt.slope = max(self.seconds[size] - self.seconds[below], 0) / ((size - below) * self.batch)

    def _consider_a_rest(self) -> None:
        """The clearer the loss, the fewer rounds decide; a rest is as long as makes the loss 1.5 % of it."""
        plain = self.seconds[PLAIN]
        rate = self.tokens * plain / self.elapsed
        if rate >= 1:
            self.longest_rest = RESTS[0]
        elif rate < 1 - 0.4 / self.rounds:
            lost = self.elapsed / plain - self.tokens
            self.resting = min(max(8, int(lost / 0.015)), self.longest_rest)
            self.longest_rest = min(2 * self.longest_rest, RESTS[1])
            self.rounds, self.tokens, self.elapsed = 1, 0.0, 0.0  # the next time one clear loss is enough


__all__ = ["PLAIN", "AutoBudget", "auto_budget"]
