"""No step of plain decoding is skipped, and nothing is asked that plain decoding does not ask."""

import random

import pytest
import torch
from transformers import GenerationConfig

from hf_treeflash.effects import changes_nothing
from tests.helpers.batches import padded
from tests.helpers.tiny import VOCAB, prompt, tiny_drafter, tiny_target, with_knobs

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def drafter(**knobs):
    return with_knobs(tiny_drafter(), **{"tree_budget": 16, "num_candidates": VOCAB, "branching": VOCAB, **knobs})


def twins(dtype: torch.dtype, gap: float):
    """Return a target whose tokens come in pairs, the second by a hair likelier than the first."""
    target = tiny_target().to(dtype)
    weight = target.get_output_embeddings().weight.data
    weight[1::2] = weight[::2]
    target.get_output_embeddings().bias = torch.nn.Parameter(torch.tensor([0.0, gap], dtype=dtype).repeat(VOCAB // 2))
    return target


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"min_p": 1e-9}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_doubles_are_compared_in_single_precision(batch, settings):
    target = twins(torch.float64, 1e-13)
    plain = target.generate(**padded(batch), **GREEDY)
    assert (plain[:, -12:] % 2 == 0).all()  # in double precision the odd tokens are likelier
    tree = target.generate(**padded(batch), assistant_model=drafter().double(), **GREEDY, **settings)
    assert torch.equal(plain, tree)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ties_of_half_precision_fall_as_in_plain_decoding(dtype):
    target = twins(dtype, 0.0)
    new = target.generate(prompt(), assistant_model=drafter().to(dtype), **GREEDY)[:, -12:]
    assert (new % 2 == 0).all()


class Trie:
    """A set of sentences as users keep it: it counts what it is asked, and raises where no sentence goes on."""

    def __init__(self, raises: bool = True):
        self.asked: list[tuple[int, list[int]]] = []
        self.raises = raises

    def __call__(self, row, ids):
        self.asked.append((row, ids.tolist()))
        if 1 in ids.tolist() and self.raises:
            raise KeyError("nothing follows the end")
        return [1 if len(ids) % 9 == 0 else 4 + len(self.asked) % 7, 5]


def counting():
    """Return a function that follows how often it was called, and what it was asked."""
    asked: list = []

    def allowed(row, ids):
        asked.append((row, ids.tolist()))
        return [4 + len(asked) % 11, 5 + len(asked) % 3]

    return allowed, asked


def counter():
    calls = 0

    def allowed(row, ids):
        nonlocal calls
        calls += 1
        return [4 + calls % 11, 5 + calls % 3]

    return allowed


def shuffling(row, ids):
    return [4 + random.randrange(8), 5]


def yielding():
    tokens = iter(range(4, 24))
    return lambda row, ids: [next(tokens), 5]


@pytest.mark.parametrize("make", [counter, lambda: shuffling, yielding, lambda: counting()[0], Trie], ids=range(5))
def test_a_function_that_remembers_is_asked_as_plain_decoding_asks(target, make):
    texts = []
    for assistant in ({}, {"assistant_model": drafter()}):
        random.seed(2)
        settings = {**GREEDY, "eos_token_id": 1, "pad_token_id": 2} if make is Trie else GREEDY
        texts.append(target.generate(prompt(), prefix_allowed_tokens_fn=make(), **settings, **assistant))
    assert torch.equal(*texts)


def test_the_questions_are_plain_decodings(target):
    questions = []
    for assistant in ({}, {"assistant_model": drafter()}):
        allowed, asked = counting()
        target.generate(prompt(), prefix_allowed_tokens_fn=allowed, **GREEDY, **assistant)
        questions.append(asked)
    assert questions[0] == questions[1] and len(questions[0]) == 12


ALLOWED = {7: [8, 9, 1], 8: [9, 10, 1], 9: [7, 10, 1], 10: [7, 8, 9]}  # nothing may follow the end of the text, 1


def by_table(row, ids):
    last = int(ids[-1])
    return ALLOWED[last] if len(ids) > 7 else [7, 8, 9]


@pytest.mark.parametrize(("batch", "eos"), [(1, 1), (1, None), (3, None)])
def test_a_function_that_raises_behind_the_end_does_no_harm(target, batch, eos):
    """Asked ahead of time, as it only reads: neither behind the end nor behind the limit, and never to its harm."""
    assert changes_nothing(by_table)
    table = by_table if eos else lambda row, ids: [token for token in by_table(row, ids) if token > 1]
    settings = {**GREEDY, "max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 2}
    inputs = {"input_ids": prompt(7, batch=batch)}
    plain = target.generate(**inputs, prefix_allowed_tokens_fn=table, **settings)
    for bias in (0, 2):
        plain = target.generate(
            **inputs, prefix_allowed_tokens_fn=table, **settings, sequence_bias={(1,): -5.0 + bias}
        )
        tree = target.generate(
            **inputs,
            prefix_allowed_tokens_fn=table,
            assistant_model=drafter(),
            **settings,
            sequence_bias={(1,): -5.0 + bias},
        )
        assert torch.equal(plain, tree)


def test_nothing_is_asked_behind_the_limit(target):
    def allowed(row, ids):
        return {length: [5, 6, 7] for length in range(7, 19)}[len(ids)]

    assert changes_nothing(allowed)
    plain = target.generate(prompt(7), prefix_allowed_tokens_fn=allowed, **GREEDY)
    tree = target.generate(prompt(7), prefix_allowed_tokens_fn=allowed, assistant_model=drafter(), **GREEDY)
    assert torch.equal(plain, tree)


def reads():
    table, words = {1: [2, 3]}, [4, 5]

    def helper(token):
        return [other for other in words if other != token]

    def nested(row, ids):
        return helper(int(ids[-1])) + table.get(ids.tolist()[0], words)

    return [
        lambda row, ids: [4, 5],
        lambda row, ids: [4 + len(ids) % 5, 5, 9],
        lambda row, ids: table.get(int(ids[-1]), words),
        lambda row, ids: sorted(set(words) - {int(token) for token in ids}),
        nested,
    ]


def changes():
    words, count = [4, 5], 0

    class Holder:
        value = 1

        def method(self, row, ids):
            return [4]

    holder = Holder()

    def assigns(row, ids):
        holder.value = 2
        return [4]

    def counts(row, ids):
        nonlocal count
        count += 1
        return [4]

    def through_another(row, ids):
        return counts(row, ids)

    def into_a_list(row, ids):
        words[0] = 3
        return words

    def inside(row, ids):
        return [word for word in words if counts(row, ids)]

    def prints(row, ids):
        print(row)
        return [4]

    def imports(row, ids):
        import time

        return [4 + int(time.time()) % 2]

    return [
        assigns,
        counts,
        through_another,
        into_a_list,
        inside,
        prints,
        imports,
        lambda row, ids: words.pop(),
        lambda row, ids: words.append(1) or words,
        lambda row, ids: [holder.value],
        shuffling,
        yielding(),
        holder.method,
        Trie(),
        len,
        None,
    ]


@pytest.mark.parametrize("index", range(len(reads())))
def test_functions_that_only_read_are_known(index):
    assert changes_nothing(reads()[index])


@pytest.mark.parametrize("index", range(len(changes())))
def test_functions_that_may_change_something_are_known(index):
    assert not changes_nothing(changes()[index])


def trees_of(target, assistant, **settings) -> list[int]:
    """Return the sizes of the passes after the prompt."""
    sizes: list[int] = []
    handle = target.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        target.generate(prompt(), assistant_model=assistant, **settings)
    finally:
        handle.remove()
    return sizes[1:]


def test_knobs_of_a_call_hold_for_that_call_alone(target):
    assistant = drafter(tree_budget=16)
    trees_of(target, assistant, **GREEDY)  # looks at the target for the first time
    config = GenerationConfig(tree_budget=5, max_new_tokens=12, do_sample=False)
    assert set(trees_of(target, assistant, generation_config=config)) == {5}
    assert set(trees_of(target, assistant, **GREEDY)) == {16}
    assert assistant.generation_config.tree_budget == 16


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_candidates": 1, "branching": 1},
        {"draft_temperature": 2.0},
        {"draft_window": 4},
        {"draft_lm_head": "float8"},
        {"tree_budget": "auto"},
    ],
    ids=str,
)
def test_every_knob_is_heard_in_a_call(target, knobs, monkeypatch):
    from hf_treeflash import candidate_generator

    heard = []
    read = candidate_generator.DraftingKnobs.read
    monkeypatch.setattr(
        candidate_generator.DraftingKnobs, "read", lambda *args: heard.append(read(*args)) or heard[-1]
    )
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = target.generate(prompt(), generation_config=GenerationConfig(**settings))
    config = GenerationConfig(**settings, **knobs)
    assert torch.equal(plain, target.generate(prompt(), assistant_model=drafter(), generation_config=config))
    last = heard[-1]._asdict()
    assert last["is_auto"] if knobs == {"tree_budget": "auto"} else last.items() >= knobs.items()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tree_budget": 1}, "`tree_budget` must be an integer from 2 to 4096"),
        ({"draft_temperature": 0.0}, "`draft_temperature` must be"),
        ({"tree_budgets": 8}, "Unknown drafting knob `tree_budgets` in the call's"),
        ({"draft_temprature": 2.0}, "Unknown drafting knob `draft_temprature` in the call's"),
    ],
    ids=str,
)
def test_impossible_knobs_of_a_call_are_named(target, knobs, message):
    config = GenerationConfig(max_new_tokens=4, **knobs)
    with pytest.raises(ValueError, match=message):
        target.generate(prompt(), assistant_model=drafter(), generation_config=config)


def test_what_others_read_in_a_call_is_left_alone(target):
    config = GenerationConfig(max_new_tokens=4, do_sample=False, my_own_setting=3, reward_scale=0.5)
    target.generate(prompt(), assistant_model=drafter(), generation_config=config)
