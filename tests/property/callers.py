"""What callers bring to a call, as they write it; everything notes what it was asked, and in which order."""

import random

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tests.helpers.tiny import VOCAB

Calls = list  # of comparable values, in order


class Criterion(StoppingCriteria):
    def __init__(self, calls: Calls, rows: int, draws: random.Random):
        self.calls, self.rows, self.count = calls, rows, 0
        self.done, self.token = [False] * rows, draws.randrange(VOCAB)
        self.limits = torch.tensor([draws.randint(4, 30) for _ in range(rows)])

    def __call__(self, input_ids, scores, **kwargs):
        self.count += 1
        self.calls.append((type(self).__name__, input_ids.tolist(), None if scores is None else len(scores)))
        return self.verdict(input_ids)


class HarnessCriterion(Criterion):
    """A verdict per row, kept, and one answer for the whole batch."""

    def verdict(self, input_ids):
        for row, done in enumerate(self.done):
            self.done[row] = done or int(input_ids[row, -1]) == self.token
        return False not in self.done


class FromCall(Criterion):
    """True from a certain call on."""

    def verdict(self, input_ids):
        return self.count >= int(self.limits[0])


class OwnLimits(Criterion):
    """Ends each row after a number of tokens of its own."""

    def verdict(self, input_ids):
        return input_ids.shape[1] >= self.limits


class SomeRow(Criterion):
    """Ends all rows once one of them has written a token twice, of ids that it flattens."""

    def verdict(self, input_ids):
        return bool((input_ids.view(-1) == self.token).sum() > 2 * self.rows)


class LastToken(Criterion):
    """Ends a row by its last token; keeps nothing."""

    def verdict(self, input_ids):
        return input_ids[:, -1] == self.token


class Callback(Criterion):
    """Never ends anything: progress bars, time-outs and loggers are written like this."""

    def verdict(self, input_ids):
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Processor(LogitsProcessor):
    def __init__(self, calls: Calls, rows: int, draws: random.Random):
        self.calls, self.rows, self.last, self.record = calls, rows, None, []
        self.bias = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(draws.randrange(100)))

    def __call__(self, input_ids, scores):
        self.calls.append((type(self).__name__, input_ids.tolist()))
        scores = self.processed(input_ids, scores)
        self.record.append(scores)
        return scores


class Recording(Processor):
    """Changes nothing."""

    def processed(self, input_ids, scores):
        return scores


class OtherRows(Processor):
    """Discourages what any row wrote last."""

    def processed(self, input_ids, scores):
        return scores.index_fill(1, input_ids[:, -1].unique(), -30.0)


class Momentum(Processor):
    """Mixes in its own last scores, of all rows."""

    def processed(self, input_ids, scores):
        self.last = scores if self.last is None else 0.5 * scores + 0.5 * self.last
        return self.last


class RowBias(Processor):
    """Has a bias for every row."""

    def processed(self, input_ids, scores):
        return scores + 2 * self.bias


class Draws(Processor):
    """Draws random numbers of its own from the default generator."""

    def processed(self, input_ids, scores):
        return scores + torch.rand(scores.shape)


class InPlace(Processor):
    """Writes into the scores that it is given."""

    def processed(self, input_ids, scores):
        scores[:, 5:7] = float("-inf")
        return scores


class LengthBias(Processor):
    """Goes by the number of its calls."""

    def processed(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([len(self.record) % VOCAB]), -30.0)


class Streamer:
    def __init__(self, calls: Calls, rows: int, draws: random.Random):
        self.calls = calls

    def put(self, value):
        self.calls.append(("put", tuple(value.shape), value.tolist()))

    def end(self):
        self.calls.append(("end",))


def reading(calls: Calls, rows: int, draws: random.Random):
    step = draws.randint(2, 7)

    def allowed(row, ids):
        return [(int(ids[-1]) * step + row + i) % VOCAB for i in range(6)]

    return allowed


def counting(calls: Calls, rows: int, draws: random.Random):
    def allowed(row, ids):
        calls.append(("allowed", int(row), ids.tolist()))
        return [token for token in range(VOCAB) if (token + len(calls)) % 3]

    return allowed


def raising(calls: Calls, rows: int, draws: random.Random):
    """A function that knows no way on from some texts."""
    end = draws.randrange(VOCAB)
    following = {token: [(token * 5 + i) % VOCAB for i in range(5)] for token in range(VOCAB) if token != end}

    def allowed(row, ids):
        return following[int(ids[-1])]

    return allowed


CRITERIA = HarnessCriterion, FromCall, OwnLimits, SomeRow, LastToken, Callback
PROCESSORS = Recording, OtherRows, Momentum, RowBias, Draws, InPlace, LengthBias
FUNCTIONS = reading, counting, raising


def draw_objects(draws: random.Random) -> list:
    """Return what a caller brings, as kinds: nothing, or up to three of them."""
    kinds = [*CRITERIA, *PROCESSORS, Streamer, *FUNCTIONS]
    some = draws.sample(kinds, draws.choice([0, 0, 1, 1, 2, 3]))
    functions = [kind for kind in some if kind in FUNCTIONS]
    return [kind for kind in some if kind not in functions[1:]]


def made(kinds: list, calls: Calls, rows: int, seed: int) -> dict:
    """Return new objects of some kinds as arguments of `generate`."""
    draws, arguments = random.Random(seed), {}
    for kind in kinds:
        given = kind(calls, rows, draws)
        if kind in FUNCTIONS:
            arguments["prefix_allowed_tokens_fn"] = given
        elif kind is Streamer:
            arguments["streamer"] = given
        elif issubclass(kind, Criterion):
            arguments.setdefault("stopping_criteria", StoppingCriteriaList()).append(given)
        else:
            arguments.setdefault("logits_processor", LogitsProcessorList()).append(given)
    return arguments


def state_of(arguments: dict) -> list:
    """Return what the objects hold after a call, as tensors and plain values."""
    held = []
    for criterion in arguments.get("stopping_criteria", ()):
        held += [criterion.count, criterion.done]
    for processor in arguments.get("logits_processor", ()):
        held.append(len(processor.record))
    return held


__all__ = ["draw_objects", "made", "state_of"]
