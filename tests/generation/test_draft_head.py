"""Drafting with an approximate output layer: the draft is what its formula says, and the text is plain decoding's."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_treeflash.draft_head import DraftHead, narrowed, union_of_likely
from hf_treeflash.float8 import Float8Rows, float8_copy, to_float8
from hf_treeflash.knobs import DraftingKnobs
from tests.helpers.drafting import drafting_inputs
from tests.helpers.misuse import refuse
from tests.helpers.tiny import VOCAB, prompt, tiny_drafter, tiny_target, with_knobs

KNOBS = {
    "float8": {"draft_lm_head": "float8"},
    "narrow": {"draft_vocab": 2},
    "both": {"draft_lm_head": "float8", "draft_vocab": 1},
    "whole": {"draft_vocab": 512},
}


def biased_target():
    """Return a target whose output layer has a bias, as some families' have."""
    target = tiny_target("llama")
    biased = nn.Linear(32, VOCAB)
    biased.weight = target.lm_head.weight
    nn.init.normal_(biased.bias, std=0.5)
    target.lm_head = biased
    return target


@pytest.fixture(scope="module")
def targets():
    return {"plain": tiny_target(), "biased": biased_target()}


@pytest.mark.parametrize("head", [True, False], ids=["head", "marginal"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "biased"])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_greedy_equals_plain_generate(targets, kind, knobs, batch, head):
    target, drafter = targets[kind], with_knobs(tiny_drafter(head), tree_budget=16, **knobs)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    for seed in (0, 1):
        ids = prompt(6, batch=batch, seed=seed)
        output = target.generate(ids, assistant_model=drafter, return_dict_in_generate=True, **settings)
        assert torch.equal(output.sequences, target.generate(ids, **settings))
        assert output.block_efficiency > 1.05  # a draft of nonsense would keep the text too


@pytest.mark.parametrize("kind", ["plain", "biased"])
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_same_seed_same_text_as_plain_sampling(targets, kind, knobs):
    target, drafter = targets[kind], with_knobs(tiny_drafter(), tree_budget=16, **knobs)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 25}
    for seed in range(4):
        ids = prompt(6, seed=seed)
        torch.manual_seed(seed)
        plain = target.generate(ids, **settings)
        torch.manual_seed(seed)
        assert torch.equal(plain, target.generate(ids, assistant_model=drafter, **settings))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_narrow_vocabulary_is_a_softmax_over_the_union(targets, batch):
    target, drafter = targets["biased"], tiny_drafter()
    anchors, context, embed, lm_head = drafting_inputs(drafter, target, batch=batch)
    noise = embed(torch.cat([anchors[:, None], torch.full((batch, 7), 3)], dim=1))
    marginals = lm_head(drafter.norm(drafter.backbone(noise, context, None, None, None)[:, 1:]))
    union = marginals.topk(2).indices.unique()
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[union] = False
    assert 0 < len(union) < VOCAB

    def masked(states):
        logits = lm_head(states)
        return logits if logits.shape[1] == 6 else logits.masked_fill(outside, float("-inf"))

    knobs = DraftingKnobs(num_candidates=4, branching=3, draft_temperature=0.7)
    wanted = drafter.draft(anchors, context, embed, masked, knobs=knobs)
    got = drafter.draft(anchors, context, embed, DraftHead(lm_head), knobs=knobs._replace(draft_vocab=2))
    assert torch.equal(got.token_ids, wanted.token_ids) and torch.equal(got.next_row, wanted.next_row)
    torch.testing.assert_close(got.log_probs, wanted.log_probs, atol=1e-5, rtol=1e-5)


def test_the_whole_vocabulary_drafts_as_without_the_knob(targets):
    drafter = tiny_drafter()
    anchors, context, embed, lm_head = drafting_inputs(drafter, targets["plain"], batch=2)
    plain = drafter.draft(anchors, context, embed, lm_head)
    narrow = drafter.draft(anchors, context, embed, DraftHead(lm_head), knobs=DraftingKnobs(draft_vocab=VOCAB))
    assert torch.equal(plain.token_ids, narrow.token_ids) and torch.equal(plain.next_row, narrow.next_row)
    torch.testing.assert_close(plain.log_probs, narrow.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("slots", "per_slot"), [(1, 1), (5, 3), (15, 4), (15, 999)])
def test_union_is_sorted_complete_and_of_fixed_size(slots, per_slot):
    logits = torch.randn(2, slots, 100, generator=torch.Generator().manual_seed(slots))
    token_ids, used = union_of_likely(logits, per_slot)
    assert token_ids[used].tolist() == sorted(set(logits.topk(min(per_slot, 100)).indices.flatten().tolist()))
    assert len(token_ids) % 16 == 0 and len(token_ids) < min(2 * slots * min(per_slot, 100), 100) + 16
    assert not token_ids[~used].any()


def test_unused_places_of_the_union_have_no_probability(targets):
    lm_head = targets["plain"].lm_head
    states = torch.randn(1, 3, 32)
    head, token_ids = narrowed(DraftHead(lm_head), lm_head(states), 1)
    logits = head(states)
    used = logits[0, 0].isfinite()
    assert not used.all() and torch.equal(logits.isfinite(), used.expand_as(logits))
    torch.testing.assert_close(logits[..., used], lm_head(states)[..., token_ids[used]])


def test_float8_is_as_close_as_eight_bits_allow():
    generator = torch.Generator().manual_seed(0)
    # Rows of very different size, and one without any: per-row scales must keep them all.
    weight = torch.randn(48, 64, generator=generator) * torch.logspace(-4, 4, 48)[:, None]
    weight[7] = 0
    rows, scales = to_float8(weight)
    assert rows.dtype == torch.float8_e4m3fn and rows.float().isfinite().all()
    # Three mantissa bits: half a step is 1/16 of the value, or of the smallest normal number below it.
    error = (rows.float() * scales[:, None] - weight).abs()
    assert (error <= weight.abs() / 16 + scales[:, None] * 2**-10).all()
    states = torch.randn(2, 5, 64, generator=generator)
    logits = Float8Rows(rows, scales).product(states)
    assert logits.shape == (2, 5, 48) and logits.dtype == torch.bfloat16
    size = weight.norm(dim=1).clamp(min=1e-9)
    exact = states @ weight.T / size
    assert 0.01 * exact.norm() < (logits / size - exact).norm() < 0.06 * exact.norm()
    some = torch.tensor([40, 3, 3])
    assert torch.equal(Float8Rows(rows, scales).select(some).product(states), logits[..., some])


def test_float8_copies_are_made_once_and_follow_the_weight():
    lm_head = nn.Linear(16, 20000, bias=False)  # more rows than are converted at a time
    copy = float8_copy(lm_head)
    assert float8_copy(lm_head) is copy and copy.rows.shape == lm_head.weight.shape
    torch.testing.assert_close(copy.rows.float() * copy.scales[:, None], lm_head.weight.detach(), atol=1e-6, rtol=0.07)
    with torch.no_grad():
        lm_head.weight.neg_()
    assert torch.equal(float8_copy(lm_head).rows.float(), -copy.rows.float())
    gone = weakref.ref(float8_copy(lm_head))
    del lm_head
    gc.collect()
    assert gone() is None


def test_the_call_of_the_matrix_units_is_the_same_product(monkeypatch):
    """Recent versions of torch have the call on CPUs too, which shows that scales and layouts are as it wants them."""
    generator = torch.Generator().manual_seed(0)
    copy = Float8Rows(*to_float8(torch.randn(48, 64, generator=generator)))
    states = torch.randn(2, 5, 64, generator=generator)
    plain = copy.product(states)
    monkeypatch.setattr(Float8Rows, "_on_matrix_units", lambda self: True)
    try:
        logits = copy.product(states)
    except (NotImplementedError, RuntimeError) as problem:
        pytest.skip(f"this torch has no float8 products on a CPU: {problem}")
    torch.testing.assert_close(logits, plain, atol=0.02, rtol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("tokens", "hidden", "rows"), [(151936, 2560, 225), (7680, 2560, 225), (7680, 4096, 15)])
def test_matrix_units_compute_the_same_product(tokens, hidden, rows):
    generator = torch.Generator().manual_seed(0)
    weight, states = torch.randn(tokens, hidden, generator=generator), torch.randn(rows, hidden, generator=generator)
    copy = Float8Rows(*to_float8(weight.cuda()))
    assert copy._on_matrix_units() == (torch.cuda.get_device_capability() >= (8, 9))
    wanted = Float8Rows(copy.rows.cpu(), copy.scales.cpu()).product(states)
    torch.testing.assert_close(copy.product(states.bfloat16().cuda()).cpu(), wanted, atol=2.0, rtol=0.05)


class OwnLinear(nn.Linear):
    """Not a plain linear layer: who knows what its forward does."""


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"draft_lm_head": "int4"}, "`draft_lm_head` must be 'float8' or None, got 'int4'"),
        ({"draft_lm_head": torch.float8_e4m3fn}, "`draft_lm_head` must be 'float8' or None"),
        ({"draft_vocab": 0}, "`draft_vocab` must be an integer from 1 to 16777216, got 0"),
        ({"draft_vocab": 64.0}, "`draft_vocab` must be an integer from 1 to 16777216, got 64.0"),
    ],
    ids=str,
)
def test_impossible_knobs_are_named(targets, knobs, message):
    refuse(targets["plain"], with_knobs(tiny_drafter(), **knobs), message)


@pytest.mark.parametrize("knob", [{"draft_lm_head": "float8"}, {"draft_vocab": 8}], ids=str)
@pytest.mark.parametrize("kind", ["own", "integer", "offloaded"])
def test_output_layers_without_plain_rows_are_refused(knob, kind):
    target = tiny_target()
    if kind == "own":
        target.lm_head.__class__ = OwnLinear
    elif kind == "integer":
        weight = target.lm_head.weight.to(torch.int8)
        target.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    else:
        target.lm_head.to("meta")
    found = {"own": "OwnLinear", "integer": "int8", "offloaded": "offloaded"}[kind]
    refuse(target, with_knobs(tiny_drafter(), **knob), f"`{next(iter(knob))}` .*{found}")
