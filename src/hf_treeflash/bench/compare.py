"""Compares ways to decode: same process, same prompts, interleaved, with the spread beside every median."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .arms import Arm
from .calls import Calls
from .differences import differences
from .measuring import machine, spread, synchronize


class RoundRecorder(BaseStreamer):
    """Groups emitted tokens by the target pass that chose them, seen from outside any decoding loop.

    All tokens of a round but the last are drafted ones the target accepted; the last is the target's own choice.

    Args:
        on_round (`Callable`, *optional*):
            Called with a round's tokens once it is complete.

    Attributes:
        rounds (`list[list[int]]`):
            Tokens of each pass; the first is the prompt's.
    """

    def __init__(self, on_round: Callable[[list[int]], None] | None = None):
        self.rounds: list[list[int]] = []
        self.on_round = on_round

    def put(self, value: torch.Tensor) -> None:
        if self.rounds:  # before the first pass, `generate` streams the prompt
            self.rounds[-1] += value.flatten().tolist()

    def end(self) -> None:
        if self.on_round is not None and self.rounds:
            self.on_round(self.rounds[-1])

    @contextmanager
    def watching(self, target) -> Iterator["RoundRecorder"]:
        """Count the target's passes while the context is open."""

        def new_round(module, args) -> None:
            self.end()
            self.rounds.append([])

        handle = target.get_decoder().register_forward_pre_hook(new_round)
        try:
            yield self
        finally:
            handle.remove()


def compare(
    target,
    arms: Sequence[Arm],
    prompts: Sequence[torch.Tensor],
    *,
    task: str = "prompts",
    max_new_tokens: int = 128,
    repeats: int = 7,
    seed: int = 0,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **generate_kwargs,
) -> dict[str, Any]:
    """Measure each arm against the first on the same prompts.

    A first pass per batch and arm warms up and records the texts and the target's passes; then every repeat runs all
    arms on each batch in turn, starting with another arm each time, so that a slow minute of the machine meets all
    arms alike. A speed-up is the quotient of the two arms' tokens per second within one repeat.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        arms (`Sequence[Arm]`):
            What to compare; the first is the baseline. Larger batches leave out what transformers drafts for single
            texts only.
        prompts (`Sequence[torch.LongTensor]` of shape `(1, length)`):
            Prompts.
        task (`str`, *optional*):
            Name of the prompts.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Tokens per prompt, at most.
        repeats (`int`, *optional*, defaults to 7):
            Timed repeats over all prompts; 0 times nothing.
        seed (`int`, *optional*, defaults to 0):
            Seed of the first batch; batch `i` runs with `seed + i`, in every arm and repeat.
        batch_size (`int`, *optional*, defaults to 1):
            Prompts decoded together, left-padded.
        progress (`Callable`, *optional*):
            Told after each generation how many are done, and of how many.
        generate_kwargs:
            Further arguments of `generate` for all arms, such as `do_sample` and `temperature`.

    Returns:
        `dict`: Plain data: `task`, `settings`, `environment` and `arms`; each arm with `tau` (tokens per target pass,
        prefill excluded), `tokens_per_second` (prefill included) and `speedup` as median, least, greatest and all
        values, `identical` (same tokens as the baseline), `differences` (see [`differences`]), `promises_text`
        (whether they ought to be the same), `acceptance_rates` (share of passes that accept depth 1, 2, ...),
        `distinct_4grams`, `tokens`, `passes`, `method` and `knobs`.

    An interrupt (Ctrl-C) ends the comparison with the arms and the repeats that are complete; `settings` then say how
    many repeats there were, and `interrupted`.
    """
    if batch_size > 1:
        arms = [arm for arm in arms if arm.is_ours or arm.is_plain]
    calls = Calls(target, prompts, batch_size, seed, {"max_new_tokens": max_new_tokens, **generate_kwargs})
    total, done = len(arms) * len(calls.batches) * (1 + repeats), 0

    def decode(arm: Arm, index: int, **more):
        nonlocal done
        output = calls.decode(arm, index, **more)
        done += 1
        progress(done, total)
        return output

    records: list[tuple[list[list[int]], list[int]]] = []
    seconds: list[list[float]] = [[] for _ in arms]
    interrupted = {}
    try:
        for arm in arms:
            records.append(_recorded(decode, calls, arm))
        _time_interleaved(decode, arms, len(calls.batches), repeats, target.device, seconds)
    except KeyboardInterrupt:
        if not records:
            raise
        interrupted = {"interrupted": True}
        seconds = [times[: len(seconds[-1])] for times in seconds]  # of the repeats that all arms have run
    greedy = not generate_kwargs.get("do_sample", target.generation_config.do_sample)
    return {
        "task": task,
        "settings": {
            "prompts": len(prompts),
            "repeats": len(seconds[0]),
            "seed": seed,
            "batch_size": batch_size,
            **calls.generate_kwargs,
            **interrupted,
        },
        "environment": environment(target),
        "arms": [
            {
                **_summary(arm, record, records[0], times, seconds[0]),
                "differences": differences(target, prompts, records[0][0], record[0]),
                "promises_text": greedy or arm.is_ours or arm.is_plain,
            }
            for arm, record, times in zip(arms, records, seconds, strict=False)
        ],
    }


def _recorded(decode, calls: Calls, arm: Arm) -> tuple[list[list[int]], list[int]]:
    """Return an arm's texts, and the tokens of each target pass after the prompts'."""
    texts, passes = [], []
    for index in range(len(calls.batches)):
        recorder = None if arm.is_ours or arm.is_plain else RoundRecorder()
        with nullcontext() if recorder is None else recorder.watching(calls.target):
            output = decode(arm, index, streamer=recorder, return_dict_in_generate=True)
        of_batch = calls.texts(output.sequences, index)
        texts += of_batch
        if recorder is not None:
            passes += [len(tokens) for tokens in recorder.rounds[1:]]
        elif arm.is_plain:
            passes += [1] * sum(len(text) - 1 for text in of_batch)
        else:
            passes += itertools.chain.from_iterable(output.acceptance_lengths)
    return texts, passes


def _time_interleaved(decode, arms, batches: int, repeats: int, device: torch.device, seconds) -> None:
    """Add each arm's seconds of every repeat to its list of them."""
    for repeat in range(repeats):
        times = [0.0 for _ in arms]
        for batch in range(batches):
            for turn in range(len(arms)):
                index = (turn + repeat + batch) % len(arms)
                synchronize(device)
                start = time.perf_counter()
                decode(arms[index], batch)
                synchronize(device)
                times[index] += time.perf_counter() - start
        for of_arm, elapsed in zip(seconds, times, strict=True):
            of_arm.append(elapsed)


def _summary(arm: Arm, record, baseline, seconds: list[float], baseline_seconds: list[float]) -> dict[str, Any]:
    texts, lengths = record
    tokens, baseline_tokens = (sum(map(len, side[0])) for side in (record, baseline))
    speed = [tokens / time for time in seconds]
    baseline_speed = [baseline_tokens / time for time in baseline_seconds]
    return {
        "name": arm.name,
        "method": arm.method or arm.name,
        "knobs": arm.knobs,
        "tau": sum(lengths) / len(lengths) if lengths else None,
        "tokens_per_second": spread(speed),
        "speedup": spread([a / b for a, b in zip(speed, baseline_speed, strict=True)]),
        "identical": texts == baseline[0],
        "acceptance_rates": acceptance_rates(lengths),
        "distinct_4grams": distinct_ngrams(texts),
        "tokens": tokens,
        "passes": len(lengths),
    }


def acceptance_rates(lengths: Sequence[int]) -> list[float]:
    """Return the share of verify passes that accepted a drafted token at depth 1, 2, ...

    Args:
        lengths (`Sequence[int]`):
            Tokens each pass emitted, the extra token included.
    """
    return [sum(length > depth for length in lengths) / len(lengths) for depth in range(1, max(lengths, default=0))]


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Return the share of n-grams that are the first of their kind in their text; repetition flatters τ."""
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    total = sum(map(len, grams))
    return sum(len(set(text)) for text in grams) / total if total else None


def environment(target) -> dict[str, Any]:
    """Describe where and with what target a measurement was made."""
    dtype = str(target.dtype).removeprefix("torch.")
    return {**machine(target.device), "dtype": dtype, "attention": target.config._attn_implementation}
