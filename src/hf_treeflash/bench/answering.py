"""One text, generated with or without a drafter: its rounds as they come, and how long they took."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..compat import CACHE
from .compare import RoundRecorder
from .measuring import synchronize

OnRound = Callable[[list[int], float | None, float], None]


class Answer(NamedTuple):
    """A generated text.

    Attributes:
        token_ids (`list[int]`):
            What was generated, the end-of-text token included.
        acceptance_lengths (`list[int]`):
            Tokens of each target pass after the prompt's.
        prompt_seconds (`float`):
            Until the first token.
        seconds (`float`):
            From the first token to the last.
        cache ([`Cache`], *optional*):
            The target's, which a next turn goes on from.
    """

    token_ids: list[int]
    acceptance_lengths: list[int]
    prompt_seconds: float
    seconds: float
    cache: Any

    @property
    def block_efficiency(self) -> float | None:
        """Tokens per target pass, the prompt's aside; None where there was no other."""
        return sum(self.acceptance_lengths) / len(self.acceptance_lengths) if self.acceptance_lengths else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of what follows the first token."""
        return (len(self.token_ids) - 1) / self.seconds if len(self.token_ids) > 1 and self.seconds > 0 else None


class TimedRounds(RoundRecorder):
    """Hands each round on with what was reached so far.

    Args:
        on_round (`Callable`):
            Called with a round's tokens, the block efficiency and the tokens per second so far.
        by_passes (`bool`):
            Whether the target's passes can be counted; replayed graphs make no calls, and every token is handed on
            as it comes, as if it were a round.
    """

    def __init__(self, on_round: OnRound, by_passes: bool = True):
        super().__init__(self._hand_on)
        self.told, self.by_passes = on_round, by_passes
        self.started = time.perf_counter()
        self.first: float | None = None  # when the first token came
        self.tokens = self.passes = 0

    def put(self, value: torch.Tensor) -> None:
        """Take tokens; the first that come are the prompt's."""
        super().put(value)
        if self.rounds and self.rounds[-1]:
            self.first = time.perf_counter() if self.first is None else self.first
            if not self.by_passes:
                self._hand_on(value.flatten().tolist())

    def end(self) -> None:
        """Hand the last round on."""
        if self.by_passes:
            super().end()

    def _hand_on(self, tokens: list[int]) -> None:
        if not tokens:
            return  # a pass that wrote nothing, such as a part of a long prompt's
        if self.tokens:
            self.passes += 1
        self.tokens += len(tokens)
        tau = (self.tokens - 1) / self.passes if self.passes and self.by_passes else None
        elapsed = time.perf_counter() - (self.first or self.started)
        self.told(tokens, tau, (self.tokens - 1) / elapsed if elapsed > 0 else 0.0)


def answer(
    target,
    drafter,
    input_ids: torch.Tensor,
    *,
    on_round: OnRound = lambda *_: None,
    cache: Any = None,
    seed: int = 0,
    **generate_kwargs,
) -> Answer:
    """Generate one text.

    Args:
        target ([`PreTrainedModel`]), drafter ([`PreTrainedModel`], *optional*):
            The pair; no drafter: plain decoding.
        input_ids (`torch.LongTensor` of shape `(1, length)`):
            The prompt, with what the cache holds.
        on_round (`Callable`, *optional*):
            See [`TimedRounds`].
        cache ([`Cache`], *optional*):
            What the target has read already.
        seed (`int`, *optional*, defaults to 0):
            Of what is sampled.
        generate_kwargs:
            Further arguments of `generate`.

    Returns:
        [`Answer`]
    """
    ids = input_ids.to(target.device)
    is_static = generate_kwargs.get("cache_implementation") == "static"
    recorder = TimedRounds(on_round, by_passes=not is_static)
    if cache is not None:
        generate_kwargs[CACHE] = cache
    torch.manual_seed(seed)
    with recorder.watching(target):
        output = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=drafter,
            streamer=recorder,
            return_dict_in_generate=True,
            **generate_kwargs,
        )
    synchronize(target.device)
    ended = time.perf_counter()
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    lengths = [1] * (len(tokens) - 1) if drafter is None else output.acceptance_lengths[0]
    first = recorder.first or ended
    return Answer(tokens, lengths, first - recorder.started, ended - first, output.get(CACHE))


__all__ = ["Answer", "OnRound", "answer"]
