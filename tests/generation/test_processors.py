"""Every processor plain `generate` accepts gives plain `generate`'s text, for one row and for batches."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkingConfig,
)

from tests.families.checks import check_greedy, check_sampling
from tests.helpers.batches import padded
from tests.helpers.tiny import VOCAB, tiny_drafter, tiny_target, with_knobs


def allowed_by_row(row: int, ids: torch.Tensor) -> list[int]:
    """A constraint that differs between rows and depends on the text."""
    return [4 + (int(ids[-1]) + 3 * row) % 16, 5 + row, 9, 12 + row]


GREEDY = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram": {"encoder_no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[9], [10, 11], [5, 6, 7]]},
    "sequence_bias": {"sequence_bias": [[[12], 2.0], [[13, 14], 5.0], [[7, 8], -4.0]]},
    "min_length": {"eos_token_id": 9, "min_length": 26},
    "min_new_tokens": {"eos_token_id": 9, "min_new_tokens": 9},
    "forced_eos": {"eos_token_id": 1, "forced_eos_token_id": 1},
    "forced_bos": {"forced_bos_token_id": 0},
    "suppress": {"suppress_tokens": [5, 6, 7, 8, 9, 10]},
    "begin_suppress": {"begin_suppress_tokens": list(range(4, 20))},
    "exponential_decay": {"eos_token_id": 1, "exponential_decay_length_penalty": (4, 1.4)},
    "prefix_allowed_tokens": {"prefix_allowed_tokens_fn": allowed_by_row},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize": {"renormalize_logits": True, "repetition_penalty": 1.2},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "guidance": {"guidance_scale": 1.6},
    "negative_prompt": {"guidance_scale": 1.6, "negative_prompt_ids": torch.tensor([[5, 9, 7]])},
    "all": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[9]], "min_new_tokens": 5},
}
SAMPLED = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "top_h": {"top_h": 0.5},
    "min_p": {"min_p": 0.1},
    "typical": {"typical_p": 0.6},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.02},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=4)},
    "renormalize": {"top_k": 6, "renormalize_logits": True},
    "guidance": {"guidance_scale": 1.3, "top_k": 8},
    "everything": {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
    | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[9]], "renormalize_logits": True},
}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture
def drafter():
    return with_knobs(tiny_drafter(), tree_budget=32)


def for_batch(settings: dict, batch: int) -> dict:
    """Return the settings with a negative prompt for each row."""
    if "negative_prompt_ids" not in settings:
        return settings
    return {**settings, "negative_prompt_ids": torch.randint(4, VOCAB, (batch, 3))}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", GREEDY.values(), ids=GREEDY)
def test_greedy(target, drafter, settings, batch):
    check_greedy(target, drafter, padded(batch), **for_batch(settings, batch))


@pytest.mark.parametrize("settings", [*SAMPLED.values(), *GREEDY.values()], ids=[*SAMPLED, *GREEDY])
def test_same_seed(target, drafter, settings):
    settings = {"top_k": 0, "temperature": 1.0, **settings}
    check_sampling(target, drafter, padded(1), seeds=range(2), **settings)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_batches_run(target, drafter, name):
    """Rows that advance at their own pace draw in another order than plain decoding, so only the shape can agree."""
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "eos_token_id": None, **SAMPLED[name]}
    texts = target.generate(**padded(3), assistant_model=drafter, **settings)
    assert texts.shape == (3, 14 + 12)


class Recording(LogitsProcessor):
    """A user's processor with a state: it leans on how often it was called and on what it saw last."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        scores[:, 4 + self.calls % 20] += 2.0  # in place, as users do
        if self.calls:
            scores = scores - 0.1 * self.seen[-2][1]
        self.calls += 1
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_processor_with_a_state_is_called_once_per_token_in_order(target, drafter, do_sample):
    settings = {"do_sample": do_sample, "max_new_tokens": 25, "eos_token_id": None, "top_k": 0}
    results, recordings = [], []
    for assistant in ({}, {"assistant_model": drafter}):
        recordings.append(Recording())
        torch.manual_seed(4)
        processors = LogitsProcessorList([recordings[-1]])
        results.append(target.generate(**padded(1), logits_processor=processors, **assistant, **settings))
    assert torch.equal(*results)
    plain, tree = recordings
    assert plain.calls == tree.calls == 25
    for (ids, scores), (other_ids, other_scores) in zip(plain.seen, tree.seen, strict=True):
        assert torch.equal(ids, other_ids) and scores.dtype == other_scores.dtype
        torch.testing.assert_close(scores, other_scores, atol=2e-4, rtol=1e-3)


def test_a_processor_is_never_copied(target, drafter):
    class Uncopyable(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    settings = {"do_sample": False, "max_new_tokens": 5, "logits_processor": LogitsProcessorList([Uncopyable()])}
    for batch in (1, 3):
        plain = target.generate(**padded(batch), **settings)
        assert torch.equal(plain, target.generate(**padded(batch), assistant_model=drafter, **settings))


def test_a_constraint_is_told_the_right_row(target, drafter):
    seen = set()

    def allowed(row, ids):
        seen.add((row, tuple(ids[:14].tolist())))
        return allowed_by_row(row, ids)

    inputs = padded(3)
    check_greedy(target, drafter, inputs, prefix_allowed_tokens_fn=allowed)
    assert seen == {(row, tuple(ids)) for row, ids in enumerate(inputs["input_ids"].tolist())}


def test_a_penalty_that_ignores_the_prompt(target, drafter):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=14)])
    check_greedy(target, drafter, padded(3), logits_processor=processors)


def test_guidance_does_not_disturb_the_drafter(target, drafter, monkeypatch):
    """The unconditional passes run the target too; what the drafter reads is only the text's own states."""
    settings = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None, "return_dict_in_generate": True}
    monkeypatch.setattr(
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
        "__call__",
        lambda self, ids, scores: [scores, self.get_unconditional_logits(ids)][0],
    )
    plain = target.generate(**padded(1), assistant_model=drafter, **settings)
    guided = target.generate(**padded(1), assistant_model=drafter, guidance_scale=2.0, **settings)
    assert guided.acceptance_lengths == plain.acceptance_lengths


def test_a_constraint_with_dead_ends_off_the_text(target, drafter):
    """Drafts are pruned by constraints too, and may ask about texts the target would never write."""
    inputs = padded(3)
    texts = target.generate(**inputs, do_sample=False, max_new_tokens=25, eos_token_id=None)

    def allowed(row, ids):
        return list(range(VOCAB)) if torch.equal(texts[row, : len(ids)], ids) else []

    settings = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None, "prefix_allowed_tokens_fn": allowed}
    assert torch.equal(texts, target.generate(**inputs, assistant_model=drafter, **settings))
