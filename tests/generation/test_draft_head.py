"""Drafting with an eight-bit output layer: products are what its formula says, and the text is plain decoding's."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_treeflash.float8 import Float8Rows, float8_copy, to_float8
from tests.helpers.misuse import refuse
from tests.helpers.tiny import VOCAB, prompt, tiny_drafter, tiny_target, with_knobs

EIGHT_BITS = {"tree_budget": 16, "draft_lm_head": "float8"}


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
def test_greedy_equals_plain_generate(targets, kind, batch, head):
    target, drafter = targets[kind], with_knobs(tiny_drafter(head), **EIGHT_BITS)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    for seed in (0, 1):
        ids = prompt(6, batch=batch, seed=seed)
        output = target.generate(ids, assistant_model=drafter, return_dict_in_generate=True, **settings)
        assert torch.equal(output.sequences, target.generate(ids, **settings))
        assert output.block_efficiency > 1.05  # a draft of nonsense would keep the text too


@pytest.mark.parametrize("kind", ["plain", "biased"])
def test_same_seed_same_text_as_plain_sampling(targets, kind):
    target, drafter = targets[kind], with_knobs(tiny_drafter(), **EIGHT_BITS)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 25}
    for seed in range(4):
        ids = prompt(6, seed=seed)
        torch.manual_seed(seed)
        plain = target.generate(ids, **settings)
        torch.manual_seed(seed)
        assert torch.equal(plain, target.generate(ids, assistant_model=drafter, **settings))


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
        ({"draft_vocab": 64}, "Unknown drafting knob `draft_vocab`"),
    ],
    ids=str,
)
def test_impossible_knobs_are_named(targets, knobs, message):
    refuse(targets["plain"], with_knobs(tiny_drafter(), **knobs), message)


@pytest.mark.parametrize("kind", ["own", "integer", "offloaded"])
def test_output_layers_without_plain_rows_are_refused(kind):
    target = tiny_target()
    if kind == "own":
        target.lm_head.__class__ = OwnLinear
    elif kind == "integer":
        weight = target.lm_head.weight.to(torch.int8)
        target.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    else:
        target.lm_head.to("meta")
    found = {"own": "OwnLinear", "integer": "int8", "offloaded": "offloaded"}[kind]
    refuse(target, with_knobs(tiny_drafter(), **EIGHT_BITS), f"`draft_lm_head` .*{found}")
