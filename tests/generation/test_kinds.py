"""Further members of each kind of fault that users met: what is seen is plain `generate`'s, or the call is refused."""

import copy
import functools
import threading
from collections import UserList

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
)

from hf_treeflash.compat import CACHE
from tests.families.checks import assert_same_cache
from tests.helpers.batches import padded
from tests.helpers.pair_on_disk import letter_tokenizer
from tests.helpers.quoting import knows, quoting_drafter
from tests.helpers.tiny import VOCAB, prompt, tiny_drafter, tiny_target, with_knobs

GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": 7, "pad_token_id": 2}


def drafter(**knobs):
    return with_knobs(tiny_drafter(), **{"tree_budget": 16, **knobs})


def both(target, make=dict, inputs=None, **settings) -> list:
    """Return the texts of the two ways, with new objects of the caller's for each."""
    settings = {**GREEDY, **(padded(3) if inputs is None else inputs), **settings}
    return [target.generate(**settings, **make(), **way) for way in ({}, {"assistant_model": drafter()})]


# 1. The batch is one thing to its caller


class CountedEos(EosTokenCriteria):
    """A stock criterion with a state of its own."""

    calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return super().__call__(input_ids, scores, **kwargs) | (self.calls > 9)


class Cooling(TemperatureLogitsWarper):
    """A stock processor that changes with each call."""

    def __call__(self, input_ids, scores):
        self.temperature *= 0.9
        return super().__call__(input_ids, scores) + (input_ids[:, -1:] == input_ids[:, -1:].T).sum(1, keepdim=True)


def methods():
    class Session:
        def __init__(self):
            self.texts = []

        def watch(self, input_ids, scores, **kwargs):
            self.texts.append(input_ids.clone())
            return len(self.texts) >= 7

    return {"stopping_criteria": StoppingCriteriaList([Session().watch])}


def partial_criterion():
    seen: list = []

    def stop(seen, input_ids, scores, **kwargs):
        seen.append(input_ids.shape)
        return torch.full((len(input_ids),), len(seen) > 5)

    return {"stopping_criteria": [functools.partial(stop, seen)]}


CALLERS = {
    "a subclass of a stock criterion": lambda: {"stopping_criteria": StoppingCriteriaList([CountedEos(5)])},
    "a subclass of a stock processor": lambda: {"logits_processor": LogitsProcessorList([Cooling(1.0)])},
    "a bound method": methods,
    "a partial function": partial_criterion,
    "a closure among processors": lambda: {"logits_processor": LogitsProcessorList([lambda ids, s: s - s.mean(0)])},
}


@pytest.mark.parametrize("case", CALLERS)
def test_what_callers_bring_to_a_batch(case):
    plain, tree = both(tiny_target(), CALLERS[case])
    assert torch.equal(plain, tree)


class Steered(nn.Module):
    """A target whose forward takes what belongs to rows in other forms than a tensor of rows."""

    @staticmethod
    def of(target):
        class Kind(type(target)):
            def forward(self, input_ids=None, position_ids=None, steering=None, **kwargs):
                outputs = super().forward(input_ids, position_ids=position_ids, **kwargs)
                if steering is not None:
                    bias = steering(len(outputs.logits))
                    outputs.logits = outputs.logits + bias[:, None]
                return outputs

        target.__class__ = Kind
        return target


BIAS = 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))


class InDict(dict):
    def __call__(self, rows):
        return self["bias"]


class InList(UserList):
    def __call__(self, rows):
        return torch.stack([*self])


class Behind:
    def __init__(self, bias):
        self.bias = bias

    def __call__(self, rows):
        return self.bias.mT


@pytest.mark.parametrize(
    "steering", [InDict(bias=BIAS), InList(BIAS), Behind(BIAS.mT)], ids=["dict", "list", "object"]
)
def test_inputs_of_rows_in_any_form(steering):
    target = Steered.of(tiny_target())
    plain, tree = both(target, steering=steering)
    assert torch.equal(plain, tree)


def test_a_streamer_of_single_texts_refuses_a_batch_as_in_plain_decoding():
    tokenizer = letter_tokenizer()
    for way in ({}, {"assistant_model": drafter()}):
        with pytest.raises(ValueError, match="only supports batch size 1"):
            tiny_target().generate(**padded(3), **GREEDY, streamer=TextStreamer(tokenizer), **way)


# 2. The target's pass over several nodes is not its step-by-step pass


class Capacity(nn.Module):
    """Experts with room for so many tokens of a pass: the others are left out."""

    def __init__(self, mlp, room):
        super().__init__()
        self.mlp, self.room = mlp, room

    def forward(self, hidden_states):
        output = self.mlp(hidden_states)
        kept = torch.arange(output.shape[1]) < self.room
        return output * kept[:, None]


def per_tensor_scale(module, args):
    """Activations in eight bits, with one scale for all tokens of a pass."""
    scale = args[0].abs().max() / 127
    return ((args[0] / scale).round() * scale,)


def test_experts_with_room_for_two_tokens_of_a_pass():
    target = tiny_target()
    target.model.layers[1].mlp = Capacity(target.model.layers[1].mlp, room=2)
    with pytest.raises(ValueError, match="cannot be verified over trees"):
        target.generate(prompt(2), assistant_model=drafter(), **GREEDY)


def test_a_scale_of_the_whole_pass():
    target = tiny_target()
    for layer in target.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(per_tensor_scale)
    with pytest.raises(ValueError, match="what else is in its pass"):
        target.generate(prompt(), assistant_model=drafter(), **GREEDY)


def test_batch_statistics_of_a_pass():
    target = tiny_target()
    target.model.layers[2].mlp.register_forward_hook(
        lambda module, args, output: output - output.mean(1, keepdim=True)
    )
    with pytest.raises(ValueError, match="what else is in its pass"):
        target.generate(prompt(), assistant_model=drafter(), **GREEDY)


# 3. Hooks and taps


def steering_vectors(target):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    target.model.layers[1].register_forward_hook(lambda module, args, output: output + vector)


def fewer_layers(target):
    target.model.layers = target.model.layers[:3]
    target.config.num_hidden_layers = 3
    target.config.layer_types = target.config.layer_types[:3]


def a_wrapped_layer(target):
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.layer, name)

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs)

    target.model.layers[2] = Wrapper(target.model.layers[2])


def a_norm_that_is_shared(target):
    target.model.norm = target.model.layers[0].input_layernorm


@pytest.mark.parametrize("change", [steering_vectors, fewer_layers, a_wrapped_layer, a_norm_that_is_shared])
@pytest.mark.parametrize("batch", [1, 3])
def test_targets_that_users_have_changed(change, batch):
    target = tiny_target()
    change(target)
    own = with_knobs(tiny_drafter(num_target_layers=None), tree_budget=16)
    settings = {**GREEDY, **padded(batch)}
    plain = target.generate(**settings)
    assert torch.equal(plain, target.generate(**settings, assistant_model=own))


# 4. What is kept between calls


def turned(target, cache, ids, way):
    return target.generate(ids, **{CACHE: cache}, **GREEDY, return_dict_in_generate=True, **way)


BETWEEN = {
    "a deep copy": copy.deepcopy,
    "cut back": lambda cache: cache.crop(-3) or cache,
    "a row repeated": lambda cache: cache.batch_repeat_interleave(2) or cache,
    "moved there and back": lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers] and cache,
    "weights that changed": None,
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_cache_that_a_user_has_changed_between_turns(case):
    texts, caches = [], []
    for way in ({}, {"assistant_model": drafter()}):
        target = tiny_target()
        cache = DynamicCache(config=target.config)
        first = turned(target, cache, prompt(9), way)
        ids = torch.cat([first.sequences, prompt(3, seed=8)], dim=1)
        if case == "weights that changed":
            target.lm_head.weight.data.mul_(-1)
        else:
            cache = BETWEEN[case](cache)
        if case == "a row repeated":
            ids = ids.repeat(2, 1)
        output = turned(target, cache, ids, way)
        texts.append(output.sequences)
        caches.append(output[CACHE])
    assert torch.equal(*texts)
    assert_same_cache(caches[1], caches[0], torch.ones_like(texts[0]))


def test_a_drafter_that_is_trained_between_turns():
    target, own = tiny_target(), drafter(draft_lm_head="float8")
    ids, plain = prompt(9), prompt(9)
    for _ in range(3):
        ids, plain = target.generate(ids, **GREEDY, assistant_model=own), target.generate(plain, **GREEDY)
        assert torch.equal(ids, plain)
        for weight in (*own.parameters(), target.lm_head.weight):
            weight.data.add_(0.05)


# 5. No skipped step, no extra question


class Trie:
    """A constraint in an object; it counts its questions and forgets nothing."""

    def __init__(self):
        self.questions = []

    def __call__(self, row, ids):
        self.questions.append((int(row), ids.tolist()))
        return [(int(ids[-1]) + step) % VOCAB for step in (1, 3, 4, 9)]


@pytest.mark.parametrize("form", [lambda trie: trie, lambda trie: trie.__call__, lambda trie: functools.partial(trie)])
@pytest.mark.parametrize("batch", [1, 3])
def test_constraints_in_other_forms_are_asked_as_often(form, batch):
    tries = [Trie(), Trie()]
    ways = iter(tries)
    plain, tree = both(tiny_target(), lambda: {"prefix_allowed_tokens_fn": form(next(ways))}, inputs=padded(batch))
    assert torch.equal(plain, tree)
    assert tries[0].questions == tries[1].questions


@pytest.mark.parametrize("kind", [tuple, set, torch.tensor], ids=["tuple", "set", "tensor"])
def test_constraints_may_answer_in_any_form_that_plain_decoding_takes(kind):
    def allowed(row, ids):
        return kind([(int(ids[-1]) + step + row) % VOCAB for step in (1, 3, 4, 9)])

    outcomes = []
    for way in ({}, {"assistant_model": drafter()}):
        try:
            outcomes.append(tiny_target().generate(**padded(3), **GREEDY, prefix_allowed_tokens_fn=allowed, **way))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] is outcomes[1] or torch.equal(*outcomes)


def test_several_sequences_of_a_prompt_have_its_constraint():
    """A function is told the prompt, not the row: there are several rows of one prompt."""

    def allowed(prompt_index, ids):
        return [(int(ids[-1]) * 5 + 7 * prompt_index + step) % VOCAB for step in range(6)]

    texts = []
    for way in ({}, {"assistant_model": drafter()}):
        torch.manual_seed(3)
        settings = GREEDY | {"do_sample": True, "num_return_sequences": 3}
        texts.append(tiny_target().generate(**padded(2), **settings, prefix_allowed_tokens_fn=allowed, **way))
    assert torch.equal(*texts)


# 6. Doors


def test_a_text_streamed_to_another_thread():
    """As chat servers do it."""
    tokenizer, heard = letter_tokenizer(), []
    for way in ({}, {"assistant_model": drafter()}):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        settings = {**padded(1), **GREEDY, "streamer": streamer, **way}
        thread = threading.Thread(target=tiny_target().generate, kwargs=settings)
        thread.start()
        heard.append("".join(streamer))
        thread.join()
    assert heard[0] == heard[1] and heard[0]


def named_inputs(target, ids, **settings):
    return target.generate(inputs=ids, **settings)


def on_the_model(target, ids, assistant_model=None, **settings):
    target.generation_config = GenerationConfig(**settings)
    return target.generate(ids, assistant_model=assistant_model)


def bound(target, ids, assistant_model=None, **settings):
    call = functools.partial(target.generate, assistant_model=assistant_model)
    return call(ids, **settings)


@pytest.mark.parametrize("door", [named_inputs, on_the_model, bound])
def test_ways_to_call(door):
    texts = [door(tiny_target(), prompt(), **way, **GREEDY) for way in ({}, {"assistant_model": drafter()})]
    assert torch.equal(*texts)


def test_embeddings_of_another_width_than_the_states_are_refused():
    from transformers import AutoModelForCausalLM, OPTConfig

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    target = AutoModelForCausalLM.from_config(OPTConfig(**shape, word_embed_proj_dim=16, pad_token_id=2))
    with pytest.raises(ValueError, match="embeddings 16 wide and states 32 wide"):
        target.generate(prompt(), assistant_model=drafter(), **GREEDY)


def test_the_generator_goes_back_where_rows_end_together():
    """Without an end-of-text id rows are drawn ahead of where all end; the generator is left where plain leaves it."""
    target, tokenizer = tiny_target("mistral"), letter_tokenizer()
    settings = GREEDY | {"do_sample": True, "eos_token_id": None, "max_new_tokens": 40}
    settings |= {"stop_strings": ["a", "q"], "tokenizer": tokenizer}
    for seed in range(6):
        states, own = [], quoting_drafter(tree_budget=32)
        for way in ({}, {"assistant_model": own}):
            torch.manual_seed(seed)
            text = target.generate(**padded(3), **settings, **way)
            states.append((text.tolist(), torch.get_rng_state().tolist()))
            knows(own, text, padded(3)["attention_mask"])
        assert states[0] == states[1]
