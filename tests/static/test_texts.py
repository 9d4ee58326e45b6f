"""`cache_implementation="static"`: the texts are plain `generate`'s."""

import pytest
import torch
from transformers import TextStreamer

from tests.families.checks import ending_at
from tests.families.models import FAMILIES
from tests.helpers.batches import padded
from tests.helpers.distribution import check_distribution, text_distribution
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs
from tests.static.calls import drafter_of, generate, plainly, sessions, the_session

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "marginal"])
@pytest.mark.parametrize("budget", [2, 16, 33])
def test_greedy_equals_plain_generate_and_accepts_what_the_dynamic_path_accepts(family, head, budget):
    target, drafter = tiny_target(family), drafter_of(head, budget)
    static = generate(target, drafter)
    assert torch.equal(static.sequences, plainly(target))
    dynamic = generate(target, drafter, covered=False, cache_implementation=None)
    assert static.acceptance_lengths == dynamic.acceptance_lengths
    assert static.block_efficiency == dynamic.block_efficiency


@pytest.mark.parametrize(
    "name", ["Mistral, window below the block", "Qwen3, sliding layers", "Gemma 2", "GPT-OSS", "OLMo-2", "Qwen3-MoE"]
)
def test_windows_soft_caps_sinks_and_experts(name):
    target, drafter = BY_NAME[name].build(), drafter_of()
    static = generate(target, drafter, padded(3))
    assert torch.equal(static.sequences, plainly(target, padded(3)))


def test_rows_of_a_left_padded_batch_equal_the_plain_batch_and_themselves_alone(target):
    inputs, drafter = padded(4), drafter_of()
    eos = ending_at(target, inputs, [4, 11])
    for settings in ({}, {"eos_token_id": eos}):
        static = generate(target, drafter, inputs, **settings)
        assert torch.equal(static.sequences, plainly(target, inputs, **settings))
        dynamic = generate(target, drafter, inputs, covered=False, cache_implementation=None, **settings)
        assert static.acceptance_lengths == dynamic.acceptance_lengths
        for row in range(4):
            own = inputs["attention_mask"][row].bool()
            alone = generate(target, drafter, {"input_ids": inputs["input_ids"][row : row + 1, own]}, **settings)
            text = alone.sequences[0, int(own.sum()) :]
            assert torch.equal(static.sequences[row, 14 : 14 + len(text)], text)
            assert static.acceptance_lengths[row] == alone.acceptance_lengths[0]


@pytest.mark.parametrize(
    ("knobs", "config"),
    [
        ({"num_candidates": 1, "branching": 2}, {}),
        ({"num_candidates": 999, "branching": 999}, {}),
        ({"draft_temperature": 0.5, "tree_budget": 70}, {}),  # more nodes than a word has bits
        ({"draft_lm_head": "float8"}, {}),
        ({}, {"block_size": 2}),
        ({}, {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
    ids=["one candidate", "more candidates than tokens", "wide", "eight bits", "block of two", "sliding drafter"],
)
def test_other_knobs_and_drafters(target, knobs, config):
    drafter = with_knobs(drafter_of(**config), **knobs)
    static = generate(target, drafter, padded(2))
    assert torch.equal(static.sequences, plainly(target, padded(2)))
    dynamic = generate(target, drafter, padded(2), covered=False, cache_implementation=None)
    assert static.acceptance_lengths == dynamic.acceptance_lengths


def test_lengths_that_end_within_a_branch(target):
    drafter = drafter_of(False, 33)
    for new_tokens in (2, 3, 4, 6, 9):
        static = generate(target, drafter, max_new_tokens=new_tokens)
        assert torch.equal(static.sequences, plainly(target, max_new_tokens=new_tokens))
        assert sum(static.acceptance_lengths[0]) == new_tokens - 1


def test_positions_that_are_just_enough():
    target = tiny_target(max_position_embeddings=32)
    assert torch.equal(generate(target, drafter_of()).sequences, plainly(target))
    target = BY_NAME["OPT"].build(max_position_embeddings=32)  # a table of positions
    assert torch.equal(generate(target, drafter_of()).sequences, plainly(target))


def test_one_new_token_needs_no_round(target):
    drafter = drafter_of()
    assert torch.equal(generate(target, drafter, max_new_tokens=1).sequences, plainly(target, max_new_tokens=1))
    assert not sessions(drafter)


class EndsAt:
    """A criterion of the user's own."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, dtype=torch.bool)


def test_a_prompt_of_embeddings(target):
    inputs = {"inputs_embeds": target.get_input_embeddings()(prompt()).detach()}
    assert torch.equal(generate(target, drafter_of(), inputs).sequences, plainly(target, inputs))


def test_other_ways_to_stop(target):
    drafter = drafter_of(False, 33)
    for length in (9, 13, 20):
        static = generate(target, drafter, stopping_criteria=[EndsAt(length)])
        assert torch.equal(static.sequences, plainly(target, stopping_criteria=[EndsAt(length)]))
    assert generate(target, drafter, max_time=0.0).sequences.shape[1] == 8


class Pieces(TextStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streams_token_by_token(target):
    streamer = Pieces()
    static = generate(target, drafter_of(), streamer=streamer)
    assert streamer.ended and streamer.pieces[0] == prompt()[0].tolist()
    assert [token for (token,) in streamer.pieces[1:]] == static.sequences[0, 7:].tolist()


SAMPLERS = [
    {"temperature": 0.7},
    {"top_k": 5, "temperature": 1.3},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"typical_p": 0.8},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.01},
    {"suppress_tokens": [5, 6, 7], "renormalize_logits": True},
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_same_seed_same_text_as_plain_sampling(target, sampler):
    drafter, settings = drafter_of(), {"do_sample": True, "top_k": 0, **sampler}
    for seed in range(2):
        torch.manual_seed(seed)
        plain = plainly(target, **settings)
        torch.manual_seed(seed)
        assert torch.equal(generate(target, drafter, **settings).sequences, plain)


def test_a_seed_repeats_a_batch(target):
    drafter, texts = drafter_of(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(target, drafter, padded(3), do_sample=True, top_k=0).sequences)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_sampled_batches_have_the_targets_distribution():
    """Texts of a batch over five tokens against the exact distribution; batches of one equal plain sampling."""
    target = tiny_target(vocab_size=5, eos_token_id=None, bos_token_id=None, pad_token_id=None, initializer_range=0.15)
    drafter = tiny_drafter(vocab_size=5, mask_token_id=4, block_size=4)
    drafter = with_knobs(drafter, tree_budget=8, num_candidates=3, branching=3)
    ids, samples = torch.tensor([[1, 2]]), 4000
    distribution = text_distribution(target, ids, 3)
    torch.manual_seed(1234)
    texts: list[list[int]] = []
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "pad_token_id": 0}
    for _ in range(8):
        static = generate(target, drafter, {"input_ids": ids.expand(samples // 8, -1)}, **settings)
        assert static.block_efficiency > 1.1  # paths of several nodes, or the test shows little
        texts += static.sequences[:, 2:].tolist()
    check_distribution(distribution, texts)
    assert the_session(drafter).round.noise is not None
