"""Draws known ahead: the noise is plain decoding's, drafts rank by it, and neither text nor generator shows it."""

import itertools

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from hf_treeflash import decoding
from hf_treeflash.draft_head import DraftHead
from hf_treeflash.lookup import trusts_given
from hf_treeflash.noise import Noise
from tests.helpers.batches import padded
from tests.helpers.distribution import check_distribution, text_distribution
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs

CPU = torch.device("cpu")
SAMPLING = {"do_sample": True, "top_k": 0, "max_new_tokens": 25}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def both(target, drafter, inputs, seed: int = 0, **settings):
    """Generate plainly and with a drafter; return the texts, after comparing them and the next random number."""
    settings, texts, numbers = {**SAMPLING, **settings}, [], []
    for assistant in ({}, {"assistant_model": drafter}):
        torch.manual_seed(seed)
        texts.append(target.generate(**inputs, **settings, **assistant))
        numbers.append(torch.rand(1))
    assert torch.equal(*texts) and torch.equal(*numbers)
    return texts[0]


@pytest.mark.parametrize("vocab", [7, 24, 100, 2048, 32_000, 151_936])
def test_a_draw_of_torch_is_an_argmax_over_noise(vocab):
    """What all of this rests on, state of the generator included."""
    probabilities = [(3 * torch.randn(2, vocab)).softmax(dim=-1) for _ in range(3)]
    probabilities[1][:, : vocab // 2] = 0
    torch.manual_seed(1)
    drawn = [torch.multinomial(own, num_samples=1)[:, 0] for own in probabilities]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    for own, tokens in zip(probabilities, drawn, strict=True):
        assert torch.equal((own / torch.empty(2, vocab).exponential_()).argmax(dim=-1), tokens)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_noise_added_to_logits_tells_what_is_drawn(temperature):
    """A drafter that knew the target's logits would be right every time."""
    noise, logits = Noise(1, 8, CPU), 2 * torch.randn(12, 1, 50)
    for step in logits:
        foretold = None
        if noise.buffer is not None:
            foretold = (step - temperature * noise.ahead([0], 5)[:, 0].log()).argmax(dim=-1)
        drawn = noise.draw([0], step / temperature)
        assert foretold is None or torch.equal(drawn, foretold)


@pytest.mark.parametrize("capacity", [3, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_rows_draw_what_plain_steps_draw_however_far_they_are_apart(batch, capacity):
    steps, order = 30, torch.randperm(30 * batch) % batch
    scores = torch.randn(steps, batch, 40)
    torch.manual_seed(5)
    expected = torch.stack([torch.multinomial(own.softmax(dim=-1), num_samples=1)[:, 0] for own in scores])
    after = torch.rand(1)
    torch.manual_seed(5)
    noise, taken = Noise(batch, capacity, CPU), [0] * batch
    for row in order.tolist():
        if noise.buffer is not None:
            seen = noise.ahead([row], 3).clone()
            assert torch.equal(noise.ahead(list(range(batch)), 2)[row], seen[0, :2])
        assert noise.draw([row], scores[taken[row], row, None]) == expected[taken[row], row]
        taken[row] += 1
    assert torch.equal(torch.rand(1), after)
    assert len(noise.states) <= max(taken) - min(taken) + capacity + 1  # nothing is kept for what is past


def test_scores_that_are_no_distribution_fail_as_in_plain_decoding():
    noise = Noise(1, 4, CPU)
    for scores in (torch.full((1, 9), float("nan")), torch.full((1, 9), float("-inf"))):
        with pytest.raises(RuntimeError, match=r"inf|nan"):
            noise.draw([0], scores)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [None, [1], [7, 9]], ids=str)
def test_text_and_generator_are_plain_decodings(target, batch, eos, cache):
    drafter = with_knobs(tiny_drafter(num_target_layers=None), tree_budget=24)
    for seed in range(3):
        settings = {"eos_token_id": eos, "temperature": 0.9 + 0.3 * seed}
        texts = both(target, drafter, padded(batch), seed, **settings)
        torch.manual_seed(seed)
        tree = target.generate(**padded(batch), **SAMPLING, **settings, assistant_model=drafter, **cache)
        assert torch.equal(tree, texts)


@pytest.mark.parametrize("knobs", [{"tree_budget": "auto"}, {"draft_window": 4}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 12}, {"stop_strings": None}], ids=str)
def test_whatever_shapes_the_draft(target, knobs, settings):
    """Rounds without a draft, and quotations longer than a block, included."""
    drafter = with_knobs(tiny_drafter(), **knobs)
    plainly = {name: value for name, value in settings.items() if name != "prompt_lookup_num_tokens"}
    for seed in range(3):
        texts = both(target, drafter, {"input_ids": prompt(30).remainder(3) + 6}, seed, max_new_tokens=50, **plainly)
        torch.manual_seed(seed)
        again = {**SAMPLING, "max_new_tokens": 50, "assistant_model": drafter, **settings}
        assert torch.equal(target.generate(prompt(30).remainder(3) + 6, **again), texts)


class BreakOff(BaseStreamer):
    """Raises with a token in the middle of a text."""

    def __init__(self, count: int):
        self.left = count

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self):
        pass


@pytest.mark.parametrize("count", range(1, 12))
def test_a_call_that_breaks_off_leaves_the_generator_where_plain_decoding_does(target, count):
    drafter, numbers = with_knobs(tiny_drafter(), tree_budget=32), []
    for assistant in ({}, {"assistant_model": drafter}):
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt):
            target.generate(prompt(), **SAMPLING, streamer=BreakOff(count), **assistant)
        numbers.append(torch.rand(1))
    assert torch.equal(*numbers)


class Dice(LogitsProcessor):
    """Draws random numbers of its own from the generator that tokens are drawn from."""

    def __call__(self, input_ids, scores):
        return scores + torch.randn_like(scores)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_processor_that_draws_from_the_same_generator(target, batch):
    both(target, tiny_drafter(), padded(batch), logits_processor=LogitsProcessorList([Dice()]))


def sampled_pairs(pairs: int = 3000):
    """Return two halves of the vocabulary each that pairs of rows took after the same text, and their distribution."""
    target = tiny_target(vocab_size=4, eos_token_id=None, bos_token_id=None, pad_token_id=None, initializer_range=0.15)
    drafter = with_knobs(tiny_drafter(vocab_size=4, mask_token_id=3, block_size=4), tree_budget=6, branching=3)
    ids, joint = torch.tensor([[1, 2]]), {}
    single = text_distribution(target, ids, 3).items()
    for (one, p), (other, q) in itertools.product(single, single):
        key = tuple(token // 2 for token in (*one[1:], *other[1:]))
        joint[key] = joint.get(key, 0.0) + p * q
    torch.manual_seed(99)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "pad_token_id": 0, "assistant_model": drafter}
    texts = []
    for _ in range(2 * pairs // 600):
        output = target.generate(ids.expand(600, -1), **settings, return_dict_in_generate=True)
        assert output.block_efficiency > 1.1  # paths of several nodes, or this shows little
        texts.append(output.sequences[:, 3:] // 2)
    return joint, torch.cat(texts).view(pairs, 4).tolist()


def test_rows_have_the_targets_distribution_one_by_one_and_jointly():
    check_distribution(*sampled_pairs())


@pytest.mark.parametrize("reuse", ["another row's", "the last token's"])
def test_a_reused_noise_would_be_seen(monkeypatch, reuse):
    """What the test above can tell: the draws of two rows, or of two tokens, with the same noise."""
    drawn, ahead = {}, Noise.ahead

    def mutant(self, rows, tokens):
        noise = ahead(self, rows, tokens)
        if tokens > 1:
            return noise
        row, token = rows[0], self.taken[rows[0]]
        drawn[row, token] = noise.clone()
        key = (row - row % 2, token) if reuse == "another row's" else (row, token - (token == 2))
        return drawn.get(key, noise)

    monkeypatch.setattr(Noise, "ahead", mutant)
    with pytest.raises(AssertionError):
        check_distribution(*sampled_pairs())


def test_a_quoted_tokens_trust_given_its_noise():
    """On average it is what it was; the likelier a draw, the more is trusted."""
    noise = torch.empty(5_000, 1, 5).exponential_()
    for trust in (0.02, 0.5, 0.97):
        given = [trusts_given(own, [3], [trust])[0] for own in noise]
        assert abs(sum(given) / len(given) - trust) < 0.02
    one, other = (trusts_given(torch.tensor([[0.1, 2.0]]), [token], [0.6])[0] for token in (0, 1))
    assert one > 0.6 > other
    assert trusts_given(torch.tensor([[40.0]]), [0], [1e-9]) == [0.0]


@pytest.mark.parametrize("head", [True, False], ids=["head", "marginal"])
def test_noise_makes_drafts_longer(target, monkeypatch, head):
    """Fewer passes for the same texts, even by an untrained drafter."""
    drafter = with_knobs(tiny_drafter(head), tree_budget=16)
    passes = {}
    for known in (True, False):
        if not known:
            monkeypatch.setattr(decoding.TreeDecoding, "draw_noise", lambda self, noise: None)
        passes[known] = 0
        for seed in range(12):
            torch.manual_seed(seed)
            settings = {**SAMPLING, "assistant_model": drafter, "return_dict_in_generate": True}
            output = target.generate(prompt(seed=seed), **settings)
            passes[known] += len(output.acceptance_lengths[0])
    assert passes[True] < passes[False]


@pytest.mark.parametrize("top_k", [3, None])
def test_what_top_k_would_cut_of_a_draft_ranks_lower(monkeypatch, top_k):
    """By a few nats at the call's temperature; with all tokens kept, and in greedy calls, nothing is lowered."""
    seen, call = set(), DraftHead.__call__

    def watched(self, states):
        seen.add(self.likely)
        logits = call(self, states)
        if self.likely is not None:
            own = self.scale(self._products(states))
            lower = own < own.topk(3, dim=-1).values[..., -1:]
            torch.testing.assert_close(own - logits, 1.5 * 0.8 * lower.float(), atol=1e-5, rtol=0)
        return logits

    monkeypatch.setattr(DraftHead, "__call__", watched)
    target, drafter = tiny_target(), tiny_drafter()
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_k": top_k or 0, "eos_token_id": None}
    texts = []
    for assistant in (None, drafter):
        torch.manual_seed(5)
        texts.append(target.generate(prompt(), assistant_model=assistant, **settings))
    assert torch.equal(*texts) and seen == {(3, 1.5 * 0.8) if top_k else None}
    target.generate(prompt(), assistant_model=drafter, max_new_tokens=4, do_sample=False)
    assert None in seen
