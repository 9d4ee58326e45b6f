"""Rows that leave a batch and come back: what a given cache holds when texts are cut, or when a call breaks off."""

import pytest
import torch
from transformers import DynamicCache

from hf_treeflash.choice import Uploaded
from tests.families.checks import assert_same_cache, drafter_for, ending_at
from tests.helpers.batches import OwnLimit, padded
from tests.helpers.pair_on_disk import letter_tokenizer
from tests.helpers.quoting import knows, quoting_drafter
from tests.helpers.tiny import tiny_target


@pytest.mark.parametrize("family", ["qwen3", "qwen3_sliding", "mistral"])
def test_rows_whose_texts_end_together_leave_plain_decodings_cache(family):
    """Without an end-of-text id every row is written until the slowest has met a criterion of the caller's."""
    target, inputs = tiny_target(family), padded(3)
    drafter = drafter_for(target, head=False, tree_budget=32)
    settings = {"do_sample": False, "max_new_tokens": 80, "eos_token_id": None, "return_dict_in_generate": True}
    for limits in ([20, 17, 31], [60, 24, 18], [18, 20, 19]):
        plain = target.generate(**inputs, stopping_criteria=[OwnLimit(limits)], **settings)
        tree = target.generate(**inputs, assistant_model=drafter, stopping_criteria=[OwnLimit(limits)], **settings)
        assert torch.equal(plain.sequences, tree.sequences)
        assert_same_cache(tree.past_key_values, plain.past_key_values, inputs["attention_mask"])


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_rows_that_ran_ahead_are_cut_back(family):
    """A row that has met its stop string is written on until the others have; one may get ahead of where all end."""
    target, inputs, ahead = tiny_target(family), padded(3), []
    settings = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "return_dict_in_generate": True}
    for stops in ("k", "j", "b"):
        stopping = settings | {"stop_strings": [stops], "tokenizer": letter_tokenizer()}
        plain = target.generate(**inputs, **stopping)
        longer = target.generate(**inputs, **settings)
        drafter = quoting_drafter(tree_budget=32)
        knows(drafter, longer.sequences, inputs["attention_mask"])
        tree = target.generate(**inputs, assistant_model=drafter, **stopping)
        assert torch.equal(plain.sequences, tree.sequences)
        assert_same_cache(tree.past_key_values, plain.past_key_values, inputs["attention_mask"])
        new = plain.sequences.shape[1] - inputs["input_ids"].shape[1]
        ahead += [1 + sum(lengths) - new for lengths in tree.acceptance_lengths]
    assert max(ahead) > 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_sliding"])
def test_a_closing_pass_that_raises_leaves_every_row_in_a_given_cache(family):
    target, inputs = tiny_target(family), padded(3)
    drafter, calls = drafter_for(target), []
    settings = {"do_sample": False, "max_new_tokens": 22, "eos_token_id": ending_at(target, inputs, [2, 9])}

    def counting(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise KeyboardInterrupt

    target.lm_head.register_forward_pre_hook(counting)
    caches, fails_at = [], -1
    for _ in range(2):
        caches.append(DynamicCache(config=target.config))
        calls.clear()
        try:
            target.generate(**inputs, assistant_model=drafter, past_key_values=caches[-1], **settings)
            fails_at = len(calls)  # the last pass of the same call is the closing one
        except KeyboardInterrupt:
            pass
    whole, broken = caches
    assert fails_at > 0 and broken.get_seq_length() == whole.get_seq_length()
    for mine, theirs in zip(broken.layers, whole.layers, strict=True):
        assert type(mine) is type(theirs) and mine.keys.shape == theirs.keys.shape
        missing = (mine.keys != theirs.keys).any(dim=(1, 3))  # (batch, columns)
        # The closing pass adds what rows read after they had ended: the first did so at its third new token.
        assert not missing[:, : inputs["input_ids"].shape[1] + 2].any()


def test_an_index_goes_to_a_device_once():
    index = Uploaded(torch.tensor([3, 1]))
    device = torch.device("meta")
    assert index.on(device) is index.on(device) and index.on(torch.device("cpu")).tolist() == [3, 1]
