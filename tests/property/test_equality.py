"""Random targets, drafters, prompts, batches, knobs, processors and stops: the text is plain `generate`'s.

`HF_TREEFLASH_CASES=5000` runs that many greedy cases, from a random seed that is printed, or from
`HF_TREEFLASH_SEED`.
"""

import functools
import os
import random

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, strategies
from transformers import StoppingCriteria, StoppingCriteriaList

from tests.families.models import FAMILIES
from tests.helpers.tiny import tiny_drafter, with_knobs

CASES = int(os.environ.get("HF_TREEFLASH_CASES", 0))
SEED = int(os.environ.get("HF_TREEFLASH_SEED", random.SystemRandom().randrange(2**32)))
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3, sliding layers", "Qwen3-MoE", "Gemma 2", "Gemma 3", "OLMo-2", "GPT-OSS")
BY_NAME = {family.name: family for family in FAMILIES if family.name in NAMES}
TIE = 1e-4  # rounding may decide between two tokens this close


def profile(cases: int):
    """Settings of one test: the same cases on every run, unless a longer run was asked for."""
    settings = hypothesis.settings(
        max_examples=CASES or cases,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: settings(hypothesis.seed(SEED)(test) if CASES else test)


@functools.cache
def target_of(name: str, seed: int, window: int, eager: bool):
    family = BY_NAME[name]
    overrides = dict(TINY)
    if "sliding_window" in family.extra:
        overrides["sliding_window"] = window
    if "layer_types" in family.extra:
        overrides["layer_types"] = ["sliding_attention", "full_attention"]
    target = family.build(seed, **overrides)
    if eager:
        target.set_attn_implementation("eager")
    return target


@functools.cache
def drafter_of(head: bool, seed: int, block_size: int, window: int | None):
    overrides = {**TINY, "num_target_layers": None, "target_layer_ids": [0, 1], "block_size": block_size}
    if window is not None:
        overrides |= {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    return tiny_drafter(head, seed, **overrides)


@strategies.composite
def pairs(draw, covered: bool = False):
    """A target, and what a call passes to draft for it: a drafter with knobs, at times n-grams of the text too.

    With `covered` nothing that static caches leave to dynamic ones.
    """
    budgets = strategies.integers(2, 40)
    window = draw(strategies.sampled_from([2, 4, 7, 16]))
    name, seed = draw(strategies.sampled_from(NAMES)), draw(strategies.integers(0, 2))
    target = target_of(name, seed, window, draw(strategies.booleans()))
    drafter = drafter_of(
        draw(strategies.booleans()),
        draw(strategies.integers(1, 2)),
        draw(strategies.sampled_from([2, 4, 8])),
        draw(strategies.sampled_from([None, None, 3, 9])),
    )
    drafter = with_knobs(
        drafter,
        tree_budget=draw(budgets if covered else budgets | strategies.just("auto")),
        num_candidates=draw(strategies.integers(1, 12)),
        branching=draw(strategies.integers(1, 12)),
        draft_temperature=draw(strategies.sampled_from([0.5, 1.0, 2.0])),
        draft_window=None if covered else draw(strategies.sampled_from([None, None, 3, 12])),
    )
    quotes = {} if covered else draw(strategies.sampled_from([{}, {}, {"prompt_lookup_num_tokens": 5}]))
    return target, {"assistant_model": drafter, **quotes}


@strategies.composite
def prompts(draw, most_rows: int):
    """Token ids with padding on the left of any row, and their mask; ids may be special tokens."""
    batch, length = draw(strategies.integers(1, most_rows)), draw(strategies.integers(1, 14))
    generator = torch.Generator().manual_seed(draw(strategies.integers(0, 1000)))
    ids = torch.randint(0, 24, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : draw(strategies.integers(0, length - 1))] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}


PROCESSORS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 3},
    {"encoder_repetition_penalty": 1.2},
    {"bad_words_ids": [[5], [7, 8]]},
    {"sequence_bias": [[[9], 1.5], [[4, 6], 3.0]]},
    {"suppress_tokens": [10, 11, 12]},
    {"begin_suppress_tokens": [4, 5, 6, 7]},
    {"min_new_tokens": 6},
    {"exponential_decay_length_penalty": (3, 1.3)},
    {"forced_eos_token_id": 3},
    {"renormalize_logits": True},
    {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 5 + row + i) % 24 for i in range(6)]},
]


class Contains(StoppingCriteria):
    """Ends a row once it has written a token twice."""

    def __init__(self, token: int, prompt_length: int):
        self.token, self.prompt_length = token, prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, self.prompt_length :] == self.token).sum(dim=1) >= 2


@strategies.composite
def stops(draw, prompt_length: int):
    """Length limits, end-of-text ids and criteria of the user's own."""
    tokens = strategies.integers(0, 23)
    settings = {
        "max_new_tokens": draw(strategies.integers(1, 18)),
        "eos_token_id": draw(strategies.none() | tokens | strategies.lists(tokens, min_size=2, max_size=4)),
        "pad_token_id": 2,
    }
    if draw(strategies.integers(0, 3)) == 0:
        criterion = Contains(draw(tokens), prompt_length)
        settings["stopping_criteria"] = StoppingCriteriaList([criterion])
    return settings


@strategies.composite
def processors(draw, ends: bool):
    chosen = draw(strategies.lists(strategies.sampled_from(range(len(PROCESSORS))), max_size=3, unique=True))
    settings = functools.reduce(lambda settings, index: settings | PROCESSORS[index], chosen, {})
    if not ends:  # plain decoding cannot hasten an end that does not exist
        settings.pop("exponential_decay_length_penalty", None)
    return settings


def gap_at_first_difference(plain, tree: torch.Tensor) -> float:
    """Return the smallest distance of plain decoding's two best scores where rows first differ."""
    start = plain.sequences.shape[1] - len(plain.scores)
    gaps = []
    for row, ids in enumerate(plain.sequences):
        width = min(len(ids), tree.shape[1])
        differs = (ids[:width] != tree[row, :width]).nonzero()
        if len(differs):
            best = plain.scores[int(differs[0]) - start][row].topk(2).values
            gaps.append(float(best[0] - best[1]))
    return min(gaps, default=float("inf"))


counts = {"cases": 0, "discarded": 0}


@profile(500)
@hypothesis.given(strategies.data())
def greedy_cases(data):
    target, drafting = data.draw(pairs())
    inputs = data.draw(prompts(4))
    settings = {"do_sample": False, **data.draw(stops(inputs["input_ids"].shape[1]))}
    settings |= data.draw(processors(ends=settings["eos_token_id"] is not None))
    plain = target.generate(**inputs, **settings)
    tree = target.generate(**inputs, **drafting, **settings)
    counts["cases"] += 1
    if not torch.equal(plain, tree):
        told = target.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
        assert gap_at_first_difference(told, tree) < TIE, (settings, plain, tree)
        counts["discarded"] += 1


def test_greedy_texts():
    counts.update(cases=0, discarded=0)
    if CASES:
        print(f"seed {SEED}, {CASES} cases")
    greedy_cases()
    print(counts)
    assert counts["cases"] >= 500
    assert counts["discarded"] < 0.01 * counts["cases"]


SAMPLERS = [
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"typical_p": 0.8},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.01},
    {"top_h": 0.6},
]


STATIC_SAMPLERS = [settings for settings in SAMPLERS if "top_h" not in settings]
STATIC_PROCESSORS = [{}, {"suppress_tokens": [10, 11, 12]}, {"suppress_tokens": [4]}]
used: set[str] = set()


def check_sampled_text(target, drafting: dict, inputs: dict, seed: int, settings: dict):
    """Compare a text and the random number after the call with plain decoding's; return the drafted call's output."""
    torch.manual_seed(seed)
    try:
        plain = target.generate(**inputs, **settings)
    except (RuntimeError, ValueError):  # older processors turn some combinations into NaN: there is nothing to equal
        hypothesis.reject()
    after = torch.rand(1)
    torch.manual_seed(seed)
    output = target.generate(**inputs, **drafting, **settings, return_dict_in_generate=True)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(output.sequences, plain)
    counts["cases"] += 1
    used.update(settings)
    return output


@profile(220)
@hypothesis.given(strategies.data())
def sampling_cases(data):
    target, drafting = data.draw(pairs())
    inputs = data.draw(prompts(1))
    settings = {"do_sample": True, "top_k": 0, **data.draw(stops(inputs["input_ids"].shape[1]))}
    settings |= data.draw(strategies.sampled_from(SAMPLERS))
    settings |= data.draw(processors(ends=settings["eos_token_id"] is not None))
    check_sampled_text(target, drafting, inputs, data.draw(strategies.integers(0, 1000)), settings)


@profile(100)
@hypothesis.given(strategies.data())
def static_sampling_cases(data):
    target, drafting = data.draw(pairs(covered=True))
    inputs = data.draw(prompts(1))
    settings = {"do_sample": True, "top_k": 0, **data.draw(stops(inputs["input_ids"].shape[1]))}
    for some in (STATIC_SAMPLERS, STATIC_PROCESSORS):
        settings |= data.draw(strategies.sampled_from(some))
    drafting["cache_implementation"] = "static"
    output = check_sampled_text(target, drafting, inputs, data.draw(strategies.integers(0, 1000)), settings)
    assert output.past_key_values is None, "left to dynamic caches"


@pytest.mark.skipif(bool(CASES), reason="a longer run is one of greedy cases")
def test_sampled_texts_with_the_same_seed():
    counts.update(cases=0)
    sampling_cases()
    assert counts["cases"] >= 200
    assert used.issuperset(set().union(*SAMPLERS, *PROCESSORS))


@pytest.mark.skipif(bool(CASES), reason="a longer run is one of greedy cases")
def test_sampled_texts_with_the_same_seed_over_static_caches():
    counts.update(cases=0)
    static_sampling_cases()
    assert counts["cases"] >= 100
