"""What the caller supplies to a batch sees what plain `generate` shows it: same calls, same order, same ids."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tests.helpers.batches import padded
from tests.helpers.quoting import knows, quoting_drafter
from tests.helpers.tiny import VOCAB, tiny_drafter, tiny_target, with_knobs

EOS = 7


@pytest.fixture(scope="module")
def target():
    return tiny_target().eval()


@pytest.fixture(scope="module")
def drafter():
    return with_knobs(tiny_drafter(), tree_budget=12)


class Calls(list):
    """What was asked, in order, as comparable values."""


class AllDone(StoppingCriteria):
    """As evaluation harnesses write it: a verdict per row, kept, and one answer for the whole batch."""

    def __init__(self, calls, batch, stop_id):
        self.calls, self.done, self.stop_id = calls, [False] * batch, stop_id

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(("criterion", input_ids.tolist(), input_ids.is_contiguous()))
        for row, done in enumerate(self.done):
            self.done[row] = done or int(input_ids[row, -1]) == self.stop_id
        return False not in self.done


class FromCall(StoppingCriteria):
    """True from a certain call on."""

    def __init__(self, calls, number):
        self.calls, self.left = calls, number

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(("count", input_ids.view(-1).tolist()))
        self.left -= 1
        return self.left <= 0


class PerRow(StoppingCriteria):
    """Ends each row after a number of tokens of its own."""

    def __init__(self, calls, limits):
        self.calls, self.limits = calls, torch.tensor(limits)

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(("rows", input_ids.tolist(), None if scores is None else len(scores)))
        return input_ids.shape[1] >= self.limits


class Entropies(LogitsProcessor):
    """Keeps a record, changes nothing."""

    def __init__(self, calls):
        self.calls, self.record = calls, []

    def __call__(self, input_ids, scores):
        self.calls.append(("processor", input_ids.tolist()))
        self.record.append(torch.distributions.Categorical(logits=scores).entropy())
        return scores


class OtherRows(LogitsProcessor):
    """Forbids each row the tokens that the others wrote last."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[:, -1].unique(), -30.0)


class Momentum(LogitsProcessor):
    """Mixes in its own last scores, of all rows."""

    def __init__(self, calls):
        self.last = None

    def __call__(self, input_ids, scores):
        self.last = scores if self.last is None else 0.5 * scores + 0.5 * self.last
        return self.last


class Streamer:
    def __init__(self, calls):
        self.calls = calls

    def put(self, value):
        self.calls.append(("put", tuple(value.shape), value.tolist()))

    def end(self):
        self.calls.append(("end",))


def run(target, assistant, make, batch=3, **settings):
    """Generate, with new objects of the caller's; return the output, what was called, and the objects."""
    calls = Calls()
    objects = make(calls)
    torch.manual_seed(11)
    output = target.generate(
        **padded(batch),
        **objects,
        **({} if assistant is None else {"assistant_model": assistant}),
        **({"do_sample": False, "max_new_tokens": 14, "eos_token_id": EOS, "pad_token_id": 0} | settings),
        return_dict_in_generate=True,
    )
    return output, calls, objects, torch.rand(1)


CASES = {
    "harness criterion": lambda calls: {"stopping_criteria": StoppingCriteriaList([AllDone(calls, 3, 5)])},
    "from the sixth call": lambda calls: {"stopping_criteria": StoppingCriteriaList([FromCall(calls, 6)])},
    "a limit per row": lambda calls: {"stopping_criteria": StoppingCriteriaList([PerRow(calls, [17, 20, 18])])},
    "a record": lambda calls: {"logits_processor": LogitsProcessorList([Entropies(calls)])},
    "the other rows": lambda calls: {"logits_processor": LogitsProcessorList([OtherRows(calls)])},
    "a state of all rows": lambda calls: {"logits_processor": LogitsProcessorList([Momentum(calls)])},
    "a streamer": lambda calls: {"streamer": Streamer(calls)},
    "all of them": lambda calls: {
        "logits_processor": LogitsProcessorList([Entropies(calls), Momentum(calls)]),
        "stopping_criteria": StoppingCriteriaList([AllDone(calls, 3, 5), PerRow(calls, [22, 19, 25])]),
        "streamer": Streamer(calls),
    },
    "a function with a counter": lambda calls: {"prefix_allowed_tokens_fn": counted(calls)},
}


def counted(calls):
    def allowed(row, ids):
        calls.append(("allowed", int(row), ids.tolist()))
        return [token for token in range(VOCAB) if (token + len(calls)) % 3]

    return allowed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True},
        {"eos_token_id": None},
        {"output_scores": True},
        {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_calls_ids_texts_and_random_state_are_plain_decodings(target, drafter, case, settings):
    expected, plain_calls, _, plain_next = run(target, None, CASES[case], **settings)
    output, calls, _, own_next = run(target, drafter, CASES[case], **settings)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert calls == plain_calls
    if settings.get("do_sample"):
        assert own_next == plain_next
    if settings.get("output_scores"):
        assert len(output.scores) == len(expected.scores)
        for own, plain in zip(output.scores, expected.scores, strict=True):
            torch.testing.assert_close(own, plain, atol=1e-4, rtol=1e-4)


def test_the_callers_own_objects_hold_their_state_afterwards(target, drafter):
    for assistant in (None, drafter):
        _, _, objects, _ = run(target, assistant, CASES["all of them"])
        (entropies, momentum), (harness, _) = objects["logits_processor"], objects["stopping_criteria"]
        state = torch.stack(entropies.record), momentum.last, harness.done
        if assistant is None:
            expected = state
    torch.testing.assert_close(state[:2], expected[:2], atol=1e-4, rtol=1e-4)
    assert state[2] == expected[2]


def test_the_returned_cache_is_plain_decodings(target, drafter):
    expected, *_ = run(target, None, CASES["a limit per row"])
    output, *_ = run(target, drafter, CASES["a limit per row"])
    name = "cache" if "cache" in expected else "past_key_values"
    for own, plain in zip(output[name].layers, expected[name].layers, strict=True):
        torch.testing.assert_close(own.keys, plain.keys, atol=1e-4, rtol=1e-4)


def test_drafts_are_accepted(target, drafter):
    """A batch that advances together is still drafted for; a drafter of the target's own text shows it."""
    expected, *_ = run(target, None, CASES["a record"], eos_token_id=None)
    quoting = quoting_drafter(tree_budget=8)
    knows(quoting, expected.sequences, padded(3)["attention_mask"])
    output, *_ = run(target, quoting, CASES["a record"], eos_token_id=None)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.block_efficiency > 1.5


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}])
def test_inputs_with_an_entry_per_row_keep_their_rows(drafter, sampling):
    """A subclass whose forward takes a bias for every row, as callers write them."""
    target = tiny_target().eval()

    class Biased(type(target)):
        def forward(self, input_ids=None, position_ids=None, row_bias=None, **kwargs):
            outputs = super().forward(input_ids, position_ids=position_ids, **kwargs)
            if row_bias is not None:
                outputs.logits = outputs.logits + row_bias[:, None]
            return outputs

    target.__class__ = Biased
    bias = 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    texts = [run(target, assistant, lambda calls: {"row_bias": bias}, **sampling)[0] for assistant in (None, drafter)]
    assert texts[0].sequences.tolist() == texts[1].sequences.tolist()
