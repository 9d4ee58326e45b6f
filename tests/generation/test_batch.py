"""Batches: every row writes what it writes alone and what plain `generate` writes for the batch."""

import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, StoppingCriteria

from hf_treeflash.decoding import TreeDecoding
from tests.families.checks import CLOSE, assert_same_cache, check_greedy, ending_at, own_columns
from tests.helpers.batches import OwnLimit, padded
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs

EOS_STEPS = [2, 9, 17]


@pytest.fixture(scope="module", params=["qwen3", "qwen3_sliding", "mistral"])
def target(request):
    return tiny_target(request.param)


@pytest.fixture(scope="module")
def full_target():
    return tiny_target()


@pytest.fixture
def drafter():
    return with_knobs(tiny_drafter(), tree_budget=32)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_rows_equal_the_plain_batch_and_themselves_alone(target, drafter, batch):
    inputs = padded(batch)
    eos = ending_at(target, inputs, [4, 11])
    settings = {"do_sample": False, "max_new_tokens": 26, "eos_token_id": eos}
    check_greedy(target, drafter, inputs, max_new_tokens=26)
    check_greedy(target, drafter, inputs, max_new_tokens=26, eos_token_id=eos)
    tree = target.generate(**inputs, assistant_model=drafter, **settings)
    for row in range(batch):
        own = inputs["attention_mask"][row].bool()
        alone = target.generate(inputs["input_ids"][row : row + 1, own], assistant_model=drafter, **settings)
        text = alone[0, int(own.sum()) :]
        assert torch.equal(tree[row, 14 : 14 + len(text)], text)
        assert (tree[row, 14 + len(text) :] == 2).all()  # the pad token


def test_an_end_of_text_id_that_is_also_the_pad_token(full_target, drafter):
    inputs = padded(3)
    eos = ending_at(full_target, inputs, [6])[0]
    settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": eos}
    plain = full_target.generate(**inputs, **settings)
    assert torch.equal(plain, full_target.generate(**inputs, assistant_model=drafter, **settings))


def test_finished_rows_leave_the_batch(full_target, drafter, monkeypatch):
    inputs, sizes = padded(4), []
    verify = TreeDecoding.verify
    monkeypatch.setattr(
        TreeDecoding, "verify", lambda self, state, tree: sizes.append(len(tree.depths)) or verify(self, state, tree)
    )
    eos = ending_at(full_target, inputs, [1, 8, 15])
    settings = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": eos, "return_dict_in_generate": True}
    output = full_target.generate(**inputs, assistant_model=drafter, **settings)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] == 4
    assert sum(sizes) == sum(len(lengths) for lengths in output.acceptance_lengths)


@pytest.mark.parametrize("masked", [True, False], ids=["padding masked", "padding read"])
def test_a_batch_goes_on_from_the_returned_cache(full_target, drafter, masked):
    """Rows that ended at different times are all in the cache, column by column where the sequences have them.

    What stands behind a row's end is padding; a user may mask it or not.
    """
    inputs = padded(4)
    eos = ending_at(full_target, inputs, EOS_STEPS)
    settings = {"do_sample": False, "max_new_tokens": 22, "return_dict_in_generate": True}
    first = full_target.generate(**inputs, assistant_model=drafter, eos_token_id=eos, **settings)
    assert len({end for _, end in own_columns(first, inputs["attention_mask"], eos)}) > 1
    mask = torch.zeros(first.sequences.shape, dtype=torch.long)
    for row, (start, end) in enumerate(own_columns(first, inputs["attention_mask"], eos)):
        mask[row, start:end] = 1
    mask[:, -1] = first.sequences[:, -1] != 2
    if not masked:
        mask[:, inputs["input_ids"].shape[1] :] = 1
    ids = torch.cat([first.sequences, prompt(4, batch=4, seed=8)], dim=1)
    mask = torch.cat([mask, torch.ones(4, 4, dtype=torch.long)], dim=1)
    plain = full_target.generate(**inputs, eos_token_id=eos, **settings)
    more = {**settings, "eos_token_id": None, "attention_mask": mask, "max_new_tokens": 8}
    theirs = full_target.generate(ids, past_key_values=plain.past_key_values, **more)
    ours = full_target.generate(ids, past_key_values=first.past_key_values, **more)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_a_cache_that_was_given_holds_every_row_afterwards(target, drafter):
    inputs = padded(4)
    eos = ending_at(target, inputs, EOS_STEPS)
    settings = {"do_sample": False, "max_new_tokens": 22, "eos_token_id": eos}
    ours, theirs = DynamicCache(config=target.config), DynamicCache(config=target.config)
    target.generate(**inputs, assistant_model=drafter, past_key_values=ours, **settings)
    target.generate(**inputs, past_key_values=theirs, **settings)
    assert_same_cache(ours, theirs, inputs["attention_mask"])


def test_a_cache_of_one_row_repeated_for_a_batch(full_target, drafter):
    settings = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "return_dict_in_generate": True}
    results = []
    for assistant in ({}, {"assistant_model": drafter}):
        first = full_target.generate(prompt(), **assistant, **settings)
        first.past_key_values.batch_repeat_interleave(3)
        ids = torch.cat([first.sequences.expand(3, -1), prompt(4, batch=3, seed=8)], dim=1)
        mask = torch.ones_like(ids)
        results.append(
            full_target.generate(
                ids, attention_mask=mask, past_key_values=first.past_key_values, **assistant, **settings
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)


class Interrupt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 30:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_an_interrupted_batch_leaves_whole_rows_in_a_given_cache(target, drafter):
    inputs, cache = padded(4), DynamicCache(config=target.config)
    eos = ending_at(target, inputs, [2])
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=30, eos_token_id=eos)
    with pytest.raises(KeyboardInterrupt):
        target.generate(
            **inputs,
            assistant_model=drafter,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=eos,
            stopping_criteria=[Interrupt()],
        )
    length = cache.get_seq_length()
    reference = DynamicCache(config=target.config)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, length - 14, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        target(plain[:, :length], attention_mask=mask, position_ids=positions, past_key_values=reference)
    for mine, theirs in zip(cache.layers, reference.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        if mine.keys.shape[2] == length:  # the prompts at least are there, each in its columns
            for row in range(4):
                start = int((inputs["attention_mask"][row] == 0).sum())
                torch.testing.assert_close(mine.keys[row, :, start:14], theirs.keys[row, :, start:14], **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "eager_sliding"])
def test_dictionary_outputs_of_unfinished_rows(implementation):
    """Scores, logits, states and attentions as plain decoding records them, while a row is being written."""
    target = tiny_target("qwen3_sliding" if implementation == "eager_sliding" else "qwen3")
    target.set_attn_implementation("eager")
    drafter, inputs = with_knobs(tiny_drafter(), tree_budget=24), padded(3)
    settings = {
        "do_sample": False,
        "max_new_tokens": 14,
        "eos_token_id": ending_at(target, inputs, [3, 8]),
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "output_attentions": True,
    }
    plain = target.generate(**inputs, **settings)
    tree = target.generate(**inputs, assistant_model=drafter, **settings)
    assert torch.equal(plain.sequences, tree.sequences)
    starts = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    text = plain.sequences[:, 14:].tolist()
    ends = [[i + 1 for i, token in enumerate(row) if token in settings["eos_token_id"]] for row in text]
    new_tokens = [min([*end, 14]) for end in ends]
    for field in ("scores", "logits", "hidden_states", "attentions"):
        ours, theirs = getattr(tree, field), getattr(plain, field)
        assert len(ours) == len(theirs)
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
            for mine, other in zip(a, b, strict=True):
                assert mine.shape == other.shape and mine.dtype == other.dtype
                for row, start in enumerate(starts):
                    if step >= new_tokens[row]:
                        assert not mine[row].any()  # nothing is made up for ended rows
                    elif step == 0 and field in ("hidden_states", "attentions"):  # the prompt's, padding aside
                        dim = 0 if field == "hidden_states" else 1
                        mine_, other_ = (x[row].narrow(dim, start, x.shape[dim + 1] - start) for x in (mine, other))
                        torch.testing.assert_close(mine_, other_, **CLOSE)
                    else:
                        torch.testing.assert_close(mine[row], other[row], **CLOSE)
    arguments = {"normalize_logits": True}
    ours = target.compute_transition_scores(tree.sequences, tree.scores, **arguments)
    theirs = target.compute_transition_scores(plain.sequences, plain.scores, **arguments)
    for row, count in enumerate(new_tokens):
        torch.testing.assert_close(ours[row, :count], theirs[row, :count], **CLOSE)


class SeenToken(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 14:] == self.token).any(dim=1)


def criteria(target, inputs):
    text = target.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)[:, 14:]
    return [OwnLimit([20, 17, 31]), SeenToken(int(text[1, 7]))]


@pytest.mark.parametrize("eos", [1, None], ids=["padded", "written on"])
@pytest.mark.parametrize("which", [0, 1], ids=["per row", "by token"])
def test_criteria_that_answer_for_each_row(target, drafter, eos, which):
    """With an end-of-text id ended rows are padded; without one plain decoding goes on writing all of them."""
    inputs = padded(3)
    settings = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": eos, "return_dict_in_generate": True}
    settings["output_scores"] = True
    results = []
    for assistant in ({}, {"assistant_model": drafter}):
        stop = [criteria(target, inputs)[which]]
        results.append(target.generate(**inputs, **assistant, stopping_criteria=stop, **settings))
    plain, tree = results
    assert torch.equal(plain.sequences, tree.sequences)
    assert len(plain.scores) == len(tree.scores)
    assert plain.past_key_values.get_seq_length() == tree.past_key_values.get_seq_length()


def tokenizer_of_letters() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({chr(97 + index): index for index in range(24)}, unk_token="a"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a")


def test_stop_strings(full_target, drafter):
    tokenizer = tokenizer_of_letters()
    inputs = padded(3)
    text = tokenizer.decode(ending_at(full_target, inputs, [0, 7, 0])[1:2])
    settings = {"do_sample": False, "max_new_tokens": 24, "stop_strings": text, "tokenizer": tokenizer}
    for eos in (1, None):
        plain = full_target.generate(**inputs, eos_token_id=eos, **settings)
        assert torch.equal(
            plain, full_target.generate(**inputs, assistant_model=drafter, eos_token_id=eos, **settings)
        )


def test_max_time_ends_all_rows(full_target, drafter):
    start = time.monotonic()
    texts = full_target.generate(
        **padded(3), assistant_model=drafter, max_time=0.05, max_length=500, do_sample=False, eos_token_id=1
    )
    assert time.monotonic() - start < 5 and texts.shape[0] == 3 and texts.shape[1] < 500


def test_embeddings_of_a_batch(full_target, drafter):
    inputs = padded(3)
    embeds = full_target.get_input_embeddings()(inputs["input_ids"])
    eos = ending_at(full_target, inputs, [3])
    settings = {"do_sample": False, "max_new_tokens": 18, "eos_token_id": eos, "return_dict_in_generate": True}
    settings |= {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    plain = full_target.generate(**settings)
    tree = full_target.generate(assistant_model=drafter, **settings)
    assert torch.equal(plain.sequences, tree.sequences)
    assert plain.past_key_values.get_seq_length() == tree.past_key_values.get_seq_length()
