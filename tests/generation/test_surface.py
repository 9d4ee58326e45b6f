"""What `generate()` offers beside text: stops, streamers, dictionaries, conversations, pipelines."""

import copy

import pytest
import torch
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
)
from transformers.generation.streamers import BaseStreamer

from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def eager_target():
    model = tiny_target()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def drafter():
    return with_knobs(tiny_drafter(), tree_budget=48)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse

    letters = {chr(97 + index): index for index in range(24)}
    backend = Tokenizer(models.WordLevel(letters, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b", pad_token="c", unk_token="a")


def both(target, drafter, ids, **settings):
    settings = {"do_sample": False, "max_new_tokens": 40, **settings}
    return target.generate(ids, **settings), target.generate(ids, assistant_model=drafter, **settings)


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def test_every_eos_position_and_several_eos_ids(target, drafter):
    ids = prompt()
    plain = target.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[0, 7:].tolist()
    for token in dict.fromkeys(plain):
        for eos in (token, [token, 23], [plain[-1], token]):
            mine, tree = both(target, drafter, ids, eos_token_id=eos)
            assert torch.equal(mine, tree)


@pytest.mark.parametrize("new_tokens", range(1, 18))
def test_every_length_limit(target, drafter, new_tokens):
    plain, tree = both(target, drafter, prompt(), max_new_tokens=new_tokens, eos_token_id=None)
    assert torch.equal(plain, tree) and tree.shape[1] == 7 + new_tokens
    plain, tree = both(target, drafter, prompt(), max_new_tokens=None, max_length=7 + new_tokens)
    assert torch.equal(plain, tree)


def test_min_new_tokens_and_other_processors(target, drafter):
    ids = prompt()
    eos = int(target.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, -1])
    for settings in (
        {"eos_token_id": eos, "min_new_tokens": 20},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"suppress_tokens": [5, 6, 7], "forced_eos_token_id": 1},
        {"bad_words_ids": [[9], [10, 11]], "sequence_bias": [[[12], 2.0]]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [4 + len(ids) % 5, 5, 9]},
        {"encoder_repetition_penalty": 1.4},
    ):
        plain, tree = both(target, drafter, ids, **settings)
        assert torch.equal(plain, tree), settings


def test_streamers_get_each_token_once_in_order_and_nothing_after_the_end(target, drafter):
    ids = prompt()
    eos = int(target.generate(ids, max_new_tokens=15, do_sample=False, eos_token_id=None)[0, -1])
    for settings in ({"eos_token_id": None, "max_new_tokens": 13}, {"eos_token_id": eos}):
        streams = Recorder(), Recorder()
        target.generate(ids, do_sample=False, streamer=streams[0], **settings)
        target.generate(ids, do_sample=False, streamer=streams[1], assistant_model=drafter, **settings)
        assert streams[0].puts == streams[1].puts
        assert streams[1].ended


class StopAfter(StoppingCriteria):
    """Stop right after a token was seen a number of times in the new text."""

    def __init__(self, token, times):
        self.token, self.times, self.lengths = token, times, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return (input_ids[:, 7:] == self.token).sum(dim=1) >= self.times


def test_custom_criteria_cut_at_the_first_token_that_meets_them(target, drafter):
    ids = prompt()
    text = target.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)[0, 7:].tolist()
    for token in dict.fromkeys(text):
        criteria = StopAfter(token, 2), StopAfter(token, 2)
        settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None}
        plain = target.generate(ids, stopping_criteria=StoppingCriteriaList(criteria[:1]), **settings)
        tree = target.generate(
            ids, stopping_criteria=StoppingCriteriaList(criteria[1:]), assistant_model=drafter, **settings
        )
        assert torch.equal(plain, tree)
        assert criteria[0].lengths == criteria[1].lengths  # asked once per token, in order


def test_stop_strings_and_max_time(target, drafter, tokenizer):
    ids = prompt()
    text = tokenizer.decode(target.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)[0, 7:])
    for start in (3, 8, 20):
        plain, tree = both(target, drafter, ids, stop_strings=text[start : start + 2], tokenizer=tokenizer)
        assert torch.equal(plain, tree)
    tree = target.generate(
        ids,
        assistant_model=drafter,
        do_sample=False,
        eos_token_id=None,
        max_length=400,
        stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]),
    )
    assert tree.shape[1] == 8


@pytest.mark.parametrize("do_sample", [False, True])
def test_dictionary_outputs_are_shaped_and_valued_as_plain(eager_target, drafter, do_sample):
    settings = {
        "do_sample": do_sample,
        "max_new_tokens": 14,
        "eos_token_id": None,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "output_attentions": True,
    }
    torch.manual_seed(3)
    plain = eager_target.generate(prompt(), **settings)
    torch.manual_seed(3)
    tree = eager_target.generate(prompt(), assistant_model=drafter, **settings)
    assert torch.equal(plain.sequences, tree.sequences)
    close = {"atol": 2e-4, "rtol": 1e-3}
    for field in ("scores", "logits"):
        mine, theirs = getattr(tree, field), getattr(plain, field)
        assert len(mine) == len(theirs) == 14
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, **close)
    for field in ("hidden_states", "attentions"):
        for a, b in zip(getattr(tree, field), getattr(plain, field), strict=True):
            assert len(a) == len(b)
            for mine, theirs in zip(a, b, strict=True):
                torch.testing.assert_close(mine, theirs, **close)
    arguments = {"sequences": tree.sequences, "scores": tree.scores, "normalize_logits": True}
    torch.testing.assert_close(
        eager_target.compute_transition_scores(**arguments),
        eager_target.compute_transition_scores(plain.sequences, plain.scores, normalize_logits=True),
        **close,
    )
    assert sum(tree.acceptance_lengths[0]) == 13
    assert tree.block_efficiency == 13 / len(tree.acceptance_lengths[0])


def test_a_conversation_continues_from_the_returned_cache(target, drafter):
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "return_dict_in_generate": True}
    plain_cache = tree_cache = None
    ids = prompt()
    for turn in range(3):
        plain = target.generate(ids, past_key_values=plain_cache, **settings)
        tree = target.generate(ids, past_key_values=tree_cache, assistant_model=drafter, **settings)
        assert torch.equal(plain.sequences, tree.sequences)
        assert plain.past_key_values.get_seq_length() == tree.past_key_values.get_seq_length()
        plain_cache, tree_cache = plain.past_key_values, copy.deepcopy(tree.past_key_values)
        ids = torch.cat([tree.sequences, prompt(5, seed=turn)], dim=1)
    # A cache that plain decoding made works too: the drafter then has only read the new tokens.
    mixed = target.generate(ids, past_key_values=copy.deepcopy(plain_cache), assistant_model=drafter, **settings)
    assert torch.equal(mixed.sequences, target.generate(ids, past_key_values=plain_cache, **settings).sequences)


def test_the_drafter_remembers_the_conversation(target, drafter):
    """A second turn drafts exactly as if the whole conversation had been one prompt."""
    settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "return_dict_in_generate": True}
    first = target.generate(prompt(), assistant_model=drafter, **settings)
    ids = torch.cat([first.sequences, prompt(3, seed=9)], dim=1)
    # Untrained text may hold the pad token, which `generate` would take for padding.
    settings["attention_mask"] = torch.ones_like(ids)
    whole = target.generate(ids, assistant_model=drafter, **settings)
    turn = target.generate(ids, assistant_model=drafter, past_key_values=first.past_key_values, **settings)
    assert turn.acceptance_lengths == whole.acceptance_lengths


def test_emitted_mask_tokens_are_kept(target, drafter):
    plain, tree = both(target, drafter, prompt(), sequence_bias=[[[3], 100.0]], max_new_tokens=6)
    assert tree[0, 7:].tolist() == [3] * 6 and torch.equal(plain, tree)


def test_prompts_as_embeddings_and_chunked_prefill(target, drafter):
    ids = prompt(20)
    embeds = target.get_input_embeddings()(ids)
    settings = {"do_sample": False, "max_new_tokens": 15, "eos_token_id": None}
    plain = target.generate(inputs_embeds=embeds, **settings)
    assert torch.equal(plain, target.generate(inputs_embeds=embeds, assistant_model=drafter, **settings))
    whole = target.generate(ids, assistant_model=drafter, return_dict_in_generate=True, **settings)
    chunked = target.generate(
        ids, assistant_model=drafter, prefill_chunk_size=6, return_dict_in_generate=True, **settings
    )
    assert torch.equal(whole.sequences, chunked.sequences)
    assert whole.acceptance_lengths == chunked.acceptance_lengths


def test_left_padded_prompt(target, drafter):
    ids = torch.cat([torch.full((1, 4), 2), prompt()], dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    plain, tree = both(target, drafter, ids, attention_mask=mask, eos_token_id=None)
    assert torch.equal(plain, tree)


def test_pipeline(target, drafter, tokenizer):
    pipe = TextGenerationPipeline(model=target, tokenizer=tokenizer, assistant_model=drafter)
    plain = TextGenerationPipeline(model=target, tokenizer=tokenizer)
    config = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=2)
    assert pipe("efgh", generation_config=config) == plain("efgh", generation_config=config)


def test_a_bare_prompt_is_enough(target, drafter):
    settings = {"max_new_tokens": 9, "do_sample": False, "bos_token_id": 0, "eos_token_id": None}
    assert torch.equal(target.generate(**settings), target.generate(assistant_model=drafter, **settings))
