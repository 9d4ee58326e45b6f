"""Bad inputs, one line each: refused by name before anything runs, or treated exactly as plain `generate` does."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
)

from hf_treeflash import TreeFlashDraftModel
from tests.generation.test_misuse import refuse
from tests.tiny import prompt, tiny_drafter, tiny_target, with_knobs


@pytest.fixture(scope="module")
def shared():
    return tiny_target()


def edited(**fields):
    """Return a drafter whose config was changed after it was built."""
    drafter = tiny_drafter()
    for name, value in fields.items():
        object.__setattr__(drafter.config, name, value)
    return drafter


def knobs(**values):
    return {"drafter": lambda: with_knobs(tiny_drafter(), **values)}


def on_meta(model):
    return model.to("meta")


def encoder_decoder():
    sizes = {"encoder_layers": 1, "decoder_layers": 4, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return AutoModelForSeq2SeqLM.from_config(BartConfig(vocab_size=24, d_model=32, **sizes))


def bert_decoder():
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "is_decoder": True}
    return BertLMHeadModel(BertConfig(vocab_size=24, hidden_size=32, **sizes))


def config_object(**fields):
    return {"generation_config": GenerationConfig(max_new_tokens=8, **fields)}


def filled_cache(target, batch: int = 1, length: int = 4):
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(prompt(length, batch=batch), past_key_values=cache)
    return cache


# What is refused: how the target and the drafter are made, settings of the call, and words of the message.
REFUSED = {
    "budget of none": (knobs(tree_budget=0), "`tree_budget` must be .* 0"),
    "negative budget": (knobs(tree_budget=-4), "`tree_budget` must be .* -4"),
    "budget as text": (knobs(tree_budget="64"), "`tree_budget` must be .* '64'"),
    "budget as float": (knobs(tree_budget=16.0), "`tree_budget` must be .* 16.0"),
    "budget of None": (knobs(tree_budget=None), "`tree_budget` must be .* None"),
    "candidates as truth": (knobs(num_candidates=True), "`num_candidates` must be .* True"),
    "negative branching": (knobs(branching=-3), "`branching` must be .* -3"),
    "infinite temperature": (knobs(draft_temperature=float("inf")), "`draft_temperature` must be .* inf"),
    "negative temperature": (knobs(draft_temperature=-1.0), "`draft_temperature` must be .* -1.0"),
    "no temperature": (knobs(draft_temperature=None), "`draft_temperature` must be .* None"),
    "misspelt knob": (knobs(treebudget=8), "Unknown drafting knob `treebudget`"),
    "drafter of a wider target": (
        {"drafter": lambda: tiny_drafter(hidden_size=64)},
        "`hidden_size` is 64, the target's is 32",
    ),
    "drafter of another tokenizer": (
        {"drafter": lambda: tiny_drafter(vocab_size=30)},
        "`vocab_size` is 30, the target's is 24",
    ),
    "drafter of a deeper target": (
        {"drafter": lambda: tiny_drafter(num_target_layers=9, target_layer_ids=[1, 8])},
        "layer 8 .* has 4 layers",
    ),
    "drafter of a target of other depth": (
        {"drafter": lambda: tiny_drafter(num_target_layers=6)},
        "target of 6 layers .* has 4",
    ),
    "mask token beyond the vocabulary": ({"drafter": lambda: edited(mask_token_id=24)}, "`mask_token_id` .* 24"),
    "negative mask token": ({"drafter": lambda: edited(mask_token_id=-1)}, "`mask_token_id` .* -1"),
    "block of one": ({"drafter": lambda: edited(block_size=1)}, "`block_size` .* got 1"),
    "negative layer": ({"drafter": lambda: edited(target_layer_ids=[-1, 2])}, r"`target_layer_ids` .* \[-1, 2\]"),
    "no layers": ({"drafter": lambda: edited(target_layer_ids=[])}, "`target_layer_ids`"),
    "more layers than it was built for": (
        {"drafter": lambda: edited(target_layer_ids=[0, 1, 2])},
        "3 target layers .*`target_layer_ids`.* built for 2",
    ),
    "windows without a size": (
        {"drafter": lambda: edited(layer_types=["sliding_attention"] * 2)},
        "`sliding_window` must be set",
    ),
    "drafter without weights": ({"drafter": lambda: on_meta(tiny_drafter())}, "drafter .*meta"),
    "target without weights": ({"target": lambda: on_meta(tiny_target())}, "target .*meta"),
    "encoder-decoder target": ({"target": encoder_decoder}, "encoder-decoder"),
    "target of another build": (
        {"target": bert_decoder},
        "BertLMHeadModel does not keep its decoder layers in `layers` or `h`",
    ),
    "beams": ({"num_beams": 3}, "`num_beams=1`"),
    "beams in a config object": (config_object(num_beams=2), "`num_beams=1`"),
    "sequences in a config object": (config_object(num_return_sequences=2, do_sample=True), "num_return_sequences"),
    "no cache in a config object": (config_object(use_cache=False), "use_cache=True"),
    "another tokenizer": ({"assistant_tokenizer": object(), "tokenizer": object()}, "`assistant_tokenizer`"),
    "synced devices": ({"synced_gpus": True}, "synced_gpus"),
    "early exit": ({"assistant_early_exit": 2}, "`assistant_early_exit`"),
    "static cache object": (
        {"cache": lambda target: StaticCache(config=target.config, max_cache_len=40)},
        "StaticLayer",
    ),
    "cache longer than the prompt": (
        {"cache": lambda target: filled_cache(target, length=12)},
        "holds 12 columns and the prompt has 7",
    ),
    "cache of the whole prompt": (
        {"cache": lambda target: filled_cache(target, length=7)},
        "holds 7 columns and the prompt has 7",
    ),
    "ids of three dimensions": ({"input_ids": prompt()[None]}, r"`input_ids` .* \(1, 1, 7\)"),
    "empty prompt": ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "prompt is empty"),
    "mask too short": ({"attention_mask": torch.tensor([[0, 1, 1]])}, "`attention_mask` has 3 columns.* 7"),
    "mask too long": ({"attention_mask": torch.tensor([[0] + [1] * 9])}, "`attention_mask` has 10 columns.* 7"),
    "knob as an argument": ({"tree_budget": 8}, "tree_budget"),
    "unknown argument": ({"max_new_token": 8}, "max_new_token"),
}


@pytest.mark.parametrize(("case", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_runs(shared, case, message):
    case = dict(case)
    target = case.pop("target")() if "target" in case else shared
    drafter = case.pop("drafter", tiny_drafter)()
    if "cache" in case:
        case["past_key_values"] = case.pop("cache")(target)
    weights = {key: value.clone() for key, value in target.state_dict().items()}
    refuse(target, drafter, message, **case)
    assert not any(module._forward_hooks for module in target.modules())
    for key, value in target.state_dict().items():
        assert value.device == weights[key].device and (value.is_meta or torch.equal(value, weights[key]))


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
    "budget beyond everything": {"drafter": lambda: with_knobs(tiny_drafter(), tree_budget=5000)},
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


def test_a_drafter_does_not_generate_by_itself():
    with pytest.raises((AttributeError, TypeError), match="generate"):
        tiny_drafter().generate(prompt())


@pytest.mark.parametrize("wrong", ["path/to/drafter", TreeFlashDraftModel, object()], ids=["name", "class", "object"])
def test_what_is_no_model_is_refused_as_by_transformers(shared, wrong):
    with pytest.raises((AttributeError, TypeError, ValueError)):
        shared.generate(prompt(), assistant_model=wrong, max_new_tokens=4)


def test_the_table_is_long_enough():
    assert len(REFUSED) + len(AS_PLAIN) >= 40
