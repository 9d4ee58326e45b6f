"""Odd inputs, one line each, that come out as from plain `generate`: texts and errors alike."""

import copy

import pytest
import torch
from transformers import StoppingCriteria, TextStreamer

from tests.helpers.misuse import filled_cache
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs


@pytest.fixture(scope="module")
def shared():
    return tiny_target()


def broken(model, value: float, names: str = ""):
    """Return a model some of whose weights are no numbers."""
    for name, parameter in model.named_parameters():
        if names in name:
            parameter.data.view(-1)[::3] = value
    return model


class Grumpy(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise LookupError("a criterion of the user's own")


def left_over(value: int, batch: int = 3, length: int = 7):
    """Return a batch with a row that is all `value` and masked throughout."""
    ids, mask = prompt(length, batch=batch), torch.ones(batch, length, dtype=torch.long)
    ids[1], mask[1] = value, 0
    return {"input_ids": ids, "attention_mask": mask}


def right_padded():
    ids, mask = prompt(8, batch=3), torch.ones(3, 8, dtype=torch.long)
    ids[1, 5:], mask[1, 5:] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


NAN, SAMPLE = float("nan"), {"do_sample": True, "top_k": 0}

# What has to come out as from plain `generate`, texts and errors alike.
AS_PLAIN = {
    "target of NaN": {"target": lambda: broken(tiny_target(), NAN)},
    "target of NaN, sampling": {"target": lambda: broken(tiny_target(), NAN), **SAMPLE},
    "target of NaN in one layer": {"target": lambda: broken(tiny_target(), NAN, "layers.2")},
    "drafter of NaN": {"drafter": lambda: broken(tiny_drafter(), NAN)},
    "drafter of NaN, batch": {"drafter": lambda: broken(tiny_drafter(), NAN), "input_ids": prompt(batch=3)},
    "drafter of infinities": {"drafter": lambda: broken(tiny_drafter(), float("inf"))},
    "drafter with a head of NaN": {"drafter": lambda: broken(tiny_drafter(), NAN, "ar_head")},
    "headless drafter of NaN": {"drafter": lambda: broken(tiny_drafter(False), NAN, "layers.1")},
    "drafter of half precision": {"drafter": lambda: tiny_drafter().half()},
    "drafter in training mode": {"drafter": lambda: tiny_drafter(attention_dropout=0.5).train()},
    "budget beyond everything": {"drafter": lambda: with_knobs(tiny_drafter(), tree_budget=4096)},
    "more candidates than tokens": {
        "drafter": lambda: with_knobs(tiny_drafter(), num_candidates=999, branching=999),
    },
    "block beyond the positions": {"target": lambda: tiny_target(max_position_embeddings=9)},
    "prompt beyond the positions": {
        "target": lambda: tiny_target(max_position_embeddings=16),
        "input_ids": prompt(30),
    },
    "drafter beyond its positions": {"drafter": lambda: tiny_drafter(max_position_embeddings=8)},
    "target as its own assistant": {"drafter": lambda: tiny_target()},
    "empty batch": {"input_ids": torch.empty(0, 5, dtype=torch.long)},
    "no prompt and no first token": {"input_ids": None, "bos_token_id": None},
    "prompt of mask tokens": {"input_ids": torch.full((1, 9), 3)},
    "prompt of pad tokens": {"input_ids": torch.full((1, 9), 2)},
    "prompt of one token": {"input_ids": torch.tensor([[7]])},
    "all-pad row": left_over(2),
    "all-masked row of text": left_over(9),
    "mask of zeros": {"attention_mask": torch.zeros(1, 7, dtype=torch.long)},
    "right padding": right_padded(),
    "hole in the mask": {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]])},
    "mask of floats": {"attention_mask": torch.ones(1, 7)},
    "mask of truths": {"attention_mask": torch.tensor([[False, True, True, True, True, True, True]])},
    "mask of another batch": {"attention_mask": torch.tensor([[0] + [1] * 6] * 2)},
    "mask of four dimensions": {"attention_mask": torch.ones(1, 1, 7, 7)},
    "ids of one dimension": {"input_ids": prompt()[0]},
    "ids of floats": {"input_ids": prompt().float()},
    "ids of 32 bits": {"input_ids": prompt().int()},
    "ids beyond the vocabulary": {"input_ids": torch.tensor([[5, 24, 6]])},
    "negative ids": {"input_ids": torch.tensor([[5, -1, 6]])},
    "ids as a list": {"input_ids": [[5, 6, 7]]},
    "ids on meta": {"input_ids": prompt().to("meta")},
    "embeddings of another width": {"input_ids": None, "inputs_embeds": torch.randn(1, 5, 16)},
    "positions given": {"position_ids": torch.arange(3, 10)[None]},
    "no new tokens": {"max_new_tokens": 0},
    "negative length": {"max_new_tokens": -2},
    "length below the prompt": {"max_new_tokens": None, "max_length": 3},
    "temperature of zero": {"do_sample": True, "temperature": 0.0},
    "top-p beyond one": {"do_sample": True, "top_p": 1.5},
    "end of text beyond the vocabulary": {"eos_token_id": 999},
    "negative end of text": {"eos_token_id": -1},
    "stop strings without a tokenizer": {"stop_strings": ["a"]},
    "streamer of a batch": {"input_ids": prompt(batch=2), "streamer": TextStreamer(tokenizer=None)},
    "criterion that raises": {"stopping_criteria": [Grumpy()]},
    "cache of another batch": {"cache": lambda target: filled_cache(target, batch=2)},
    "cache of another depth": {"cache": lambda target: filled_cache(tiny_target(num_hidden_layers=2))},
    "cache of other heads": {"cache": lambda target: filled_cache(tiny_target(num_key_value_heads=4))},
    "cache as tuples": {"cache": lambda target: ((torch.zeros(1, 2, 3, 8),) * 2,) * 4},
    "cache and its implementation": {
        "cache": lambda target: filled_cache(target),
        "cache_implementation": "dynamic_full",
    },
}


def outcome(target, case: dict, **assistant):
    """Return the text, or the kind of error."""
    case = {key: copy.deepcopy(value) if key == "stopping_criteria" else value for key, value in case.items()}
    if "cache" in case:
        case["past_key_values"] = case.pop("cache")(target)
    settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "input_ids": prompt(), **case}
    torch.manual_seed(0)
    try:
        return target.generate(**settings, **assistant)
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", AS_PLAIN.values(), ids=AS_PLAIN)
def test_treated_as_plain_generate_treats_it(shared, case):
    case = dict(case)
    target = case.pop("target")() if "target" in case else shared
    drafter = case.pop("drafter", tiny_drafter)()
    plain, tree = outcome(target, case), outcome(target, case, assistant_model=drafter)
    if isinstance(plain, Exception):
        assert type(tree) is type(plain), (plain, tree)
    else:
        assert not isinstance(tree, Exception), tree
        assert torch.equal(plain, tree)
    assert not any(module._forward_hooks for module in target.modules())
