"""Compares ways to decode: same process, same prompts, interleaved, with the spread beside every median."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..knobs import KNOB_DEFAULTS
from .measuring import columns, machine, spread, synchronize
from .pairs import with_knobs, without_head


@dataclass(frozen=True)
class Arm:
    """One way to decode.

    Args:
        name (`str`):
            How tables call it.
        drafter ([`PreTrainedModel`], *optional*):
            What drafts, with its knobs; None for plain `generate`.
        options (`dict`, *optional*):
            Further arguments of `generate`.
        around (`Callable`, *optional*):
            Makes the context in which it decodes.
    """

    name: str
    drafter: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager] = nullcontext

    @property
    def is_static(self) -> bool:
        """Whether it decodes over static caches, where passes may be replayed without a call that could be counted."""
        return self.options.get("cache_implementation") == "static"

    @property
    def knobs(self) -> dict[str, Any]:
        """The drafting knobs this arm runs with; a chain and plain decoding have none."""
        if self.drafter is None or "speculation_type" in self.options:
            return {}
        return {knob: getattr(self.drafter.generation_config, knob) for knob in KNOB_DEFAULTS}


def standard_arms(drafter, **knobs) -> list[Arm]:
    """Return plain decoding, the chain, the marginal tree and, for a drafter with a head, the TreeFlash tree.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            The drafter; it is not changed, the arms hold views that share its weights.
        knobs:
            Drafting knobs of the trees; the drafter's own by default.
    """
    arms = [Arm("plain"), Arm("chain", drafter, {"speculation_type": "dflash"})]
    marginal = with_knobs(without_head(drafter), **knobs)
    arms.append(Arm(f"marginal tree B{marginal.generation_config.tree_budget}", marginal))
    if drafter.config.ar_head is not None:
        arms.append(tree_arm(drafter, **knobs))
    return arms


def tree_arm(drafter, **knobs) -> Arm:
    """Return the TreeFlash tree at some knobs, named after budget and candidates."""
    view = with_knobs(drafter, **knobs)
    config = view.generation_config
    return Arm(f"TreeFlash tree B{config.tree_budget} M{config.num_candidates}", view)


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
    progress: Callable[[int, int], None] = lambda done, total: None,
    **generate_kwargs,
) -> dict[str, Any]:
    """Measure each arm against the first on the same prompts.

    A first pass per prompt and arm warms up and records the text and the target's passes; then every repeat runs all
    arms on each prompt in turn, starting with another arm each time, so that a slow minute of the machine meets all
    arms alike. A speed-up is the quotient of the two arms' tokens per second within one repeat.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        arms (`Sequence[Arm]`):
            What to compare; the first is the baseline.
        prompts (`Sequence[torch.LongTensor]` of shape `(1, length)`):
            Prompts, decoded one by one.
        task (`str`, *optional*):
            Name of the prompts.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Tokens per prompt.
        repeats (`int`, *optional*, defaults to 7):
            Timed repeats over all prompts; 0 times nothing.
        seed (`int`, *optional*, defaults to 0):
            Seed of the first prompt; prompt `i` runs with `seed + i`, in every arm and repeat.
        progress (`Callable`, *optional*):
            Told after each text how many are done, and of how many.
        generate_kwargs:
            Further arguments of `generate` for all arms, such as `do_sample` and `temperature`.

    Returns:
        `dict`: Plain data: `task`, `settings`, `environment` and `arms`; each arm with `tau` (tokens per target pass,
        prefill excluded), `tokens_per_second` (prefill included) and `speedup` as median, least, greatest and all
        values, `identical` (same tokens as the baseline), `acceptance_rates` (share of passes that accept depth
        1, 2, ...), `distinct_4grams`, `tokens`, `passes` and `knobs`.

    An interrupt (Ctrl-C) ends the comparison with the arms and the repeats that are complete; `settings` then say how
    many repeats there were, and `interrupted`.
    """
    prompts = [prompt.to(target.device) for prompt in prompts]
    kwargs = {"max_new_tokens": max_new_tokens, **generate_kwargs}

    def decode(arm: Arm, index: int, **more):
        prompt = prompts[index]
        torch.manual_seed(seed + index)
        with arm.around():
            return target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                assistant_model=arm.drafter,
                **kwargs,
                **arm.options,
                **more,
            )

    done, total = 0, len(arms) * len(prompts) * (1 + repeats)

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    records: list[tuple[list[list[int]], list[int]]] = []
    seconds: list[list[float]] = [[] for _ in arms]
    interrupted = {}
    try:
        for arm in arms:
            records.append(_record(target, decode, arm, prompts, step))
        _time_interleaved(decode, arms, len(prompts), repeats, target.device, seconds, step)
    except KeyboardInterrupt:
        if not records:
            raise
        interrupted = {"interrupted": True}
        seconds = [times[: len(seconds[-1])] for times in seconds]  # of the repeats that all arms have run
    return {
        "task": task,
        "settings": {"prompts": len(prompts), "repeats": len(seconds[0]), "seed": seed, **kwargs, **interrupted},
        "environment": environment(target),
        "arms": [
            _summary(arm, record, records[0], times, seconds[0])
            for arm, record, times in zip(arms, records, seconds, strict=False)
        ],
    }


def _record(target, decode, arm: Arm, prompts, step: Callable[[], None]) -> tuple[list[list[int]], list[int]]:
    """Return an arm's texts, and the tokens of each of its target passes after the prompts'."""
    texts, passes = [], []
    for index, prompt in enumerate(prompts):
        recorder = RoundRecorder()
        with nullcontext() if arm.is_static else recorder.watching(target):
            streamer = None if arm.is_static else recorder
            output = decode(arm, index, streamer=streamer, return_dict_in_generate=True)
        texts.append(output.sequences[0, prompt.shape[1] :].tolist())
        if not arm.is_static:
            passes += [len(tokens) for tokens in recorder.rounds[1:]]
        else:  # as the call itself reports; plain decoding takes a pass per token
            passes += [1] * (len(texts[-1]) - 1) if arm.drafter is None else output.acceptance_lengths[0]
        step()
    return texts, passes


def _time_interleaved(decode, arms, prompts: int, repeats: int, device, seconds, step: Callable[[], None]) -> None:
    """Add each arm's seconds of every repeat to its list of them."""
    for repeat in range(repeats):
        times = [0.0 for _ in arms]
        for prompt in range(prompts):
            for turn in range(len(arms)):
                index = (turn + repeat + prompt) % len(arms)
                synchronize(device)
                start = time.perf_counter()
                decode(arms[index], prompt)
                synchronize(device)
                times[index] += time.perf_counter() - start
                step()
        for of_arm, elapsed in zip(seconds, times, strict=True):
            of_arm.append(elapsed)


def _summary(arm: Arm, record, baseline, seconds: list[float], baseline_seconds: list[float]) -> dict[str, Any]:
    texts, lengths = record
    tokens, baseline_tokens = (sum(map(len, side[0])) for side in (record, baseline))
    speed = [tokens / time for time in seconds]
    baseline_speed = [baseline_tokens / time for time in baseline_seconds]
    return {
        "name": arm.name,
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


def table_rows(result: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Lay a comparison out as text cells: a heading, then one row per arm."""
    rows = [("", "tokens per pass", "tokens/s", "speed-up (least to greatest)", "identical")]
    for arm in result["arms"]:
        speed, gain = arm["tokens_per_second"], arm["speedup"]
        rows.append(
            (
                arm["name"],
                "n/a" if arm["tau"] is None else f"{arm['tau']:.2f}",
                "n/a" if speed is None else f"{speed['median']:.0f}",
                "n/a" if gain is None else f"{gain['median']:.2f} ({gain['min']:.2f} to {gain['max']:.2f})",
                "yes" if arm["identical"] else "no",
            )
        )
    return rows


def text_table(result: dict[str, Any]) -> str:
    """Lay a comparison out for a terminal."""
    lines = [columns(table_rows(result))]
    if result["arms"][0]["distinct_4grams"] is not None:  # repetition flatters every drafter
        lines.append(f"distinct 4-grams of the plain text: {result['arms'][0]['distinct_4grams']:.2f}")
    return "\n".join(lines)
