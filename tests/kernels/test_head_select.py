"""K2: selection with exact tie order, and log-probabilities."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_treeflash.kernels import head_select, head_select_reference
from hf_treeflash.kernels.head_select import head_select_op


def make_logits(kind: str, dtype: torch.dtype, vocab: int) -> torch.Tensor:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    if kind == "ties":
        logits = logits.round()
        logits[0] = 0.0
        logits[1, ::2], logits[1, 1::2] = 0.0, -0.0
    elif kind == "masked":
        logits[0, 3:] = float("-inf")
        logits[1] = float("-inf")
        logits[2, 5] = float("nan")
        logits[3, : vocab // 2] = float("-inf")
    return logits.to(dtype)


def brute_force(logits: torch.Tensor, k: int) -> list[list[int]]:
    rows = logits.float().nan_to_num(nan=float("-inf"), neginf=float("-inf")).tolist()
    return [sorted(range(len(row)), key=lambda token: (-row[token], token))[:k] for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "ties", "masked"])
@pytest.mark.parametrize(("vocab", "k"), [(9000, 16), (4096, 5), (130, 16), (40, 40), (1, 1)])
def test_kernel_equals_oracle(triton_kernels, device, kind, dtype, vocab, k):
    logits = make_logits(kind, dtype, max(vocab, 6))[:, :vocab].to(device)
    token_ids, log_probs = head_select(logits, k, 0.7)
    expected_ids, expected_log_probs = head_select_reference(logits, k, 0.7)
    assert torch.equal(token_ids, expected_ids)
    assert token_ids.dtype == torch.int64 and log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected_log_probs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["random", "ties", "masked"])
def test_oracle_orders_by_value_then_token(kind):
    logits = make_logits(kind, torch.bfloat16, 300)
    token_ids, log_probs = head_select_reference(logits, 16, 1.0)
    assert token_ids.tolist() == brute_force(logits, 16)
    clean = logits.float().nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    expected = clean.log_softmax(-1).gather(1, token_ids).nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


def test_log_probs_are_never_positive(triton_kernels, device):
    logits = torch.zeros(3, 200, device=device)
    logits[:, 7] = torch.tensor([50.0, 17.3, 200.0], device=device)
    for function in (head_select, head_select_reference):
        assert (function(logits, 2, 1.0)[1] <= 0).all()


def test_strided_rows_and_leading_dimensions(triton_kernels, device):
    logits = make_logits("random", torch.bfloat16, 700).to(device)[:, 50:650].unflatten(0, (2, 2))
    token_ids, log_probs = head_select(logits, 3, 1.0)
    expected_ids, expected_log_probs = head_select_reference(logits, 3, 1.0)
    assert token_ids.shape == (2, 2, 3)
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "ties", "masked"])
@pytest.mark.parametrize(("vocab", "k"), [(9000, 16), (130, 16), (40, 40)])
@pytest.mark.parametrize("by_slot", [True, False])
def test_noise_is_added_by_slot(triton_kernels, device, kind, dtype, vocab, k, by_slot):
    """Rows of one slot share its noise, texts of a batch do not; infinite logits stay out whatever is added."""
    logits = make_logits(kind, dtype, max(vocab, 6))[:, :vocab].expand(3, -1, -1).contiguous().to(device)
    generator = torch.Generator().manual_seed(1)
    slots = torch.tensor([4, 0, 4, 2], device=device) if by_slot else None
    noise = -torch.rand(3, 5 if by_slot else 4, vocab, generator=generator).log().to(device)
    token_ids, log_probs = head_select(logits, k, 0.7, noise, slots)
    expected_ids, expected_log_probs = head_select_reference(logits, k, 0.7, noise, slots)
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(log_probs, expected_log_probs, atol=2e-5, rtol=1e-5)
    for text in range(3):
        for row in range(4):
            slot = row if slots is None else int(slots[row])
            alone = head_select_reference(logits[text, row].float() + noise[text, slot], k, 0.7)
            assert torch.equal(token_ids[text, row], alone[0])
    assert not torch.equal(token_ids[0], token_ids[1])


def test_noise_that_does_not_fit_is_refused():
    logits = torch.zeros(2, 3, 10)
    slots = torch.tensor([0, 0, 1])
    for noise in (torch.zeros(2, 2, 9), torch.zeros(1, 2, 10), torch.zeros(2, 2, 10).half()):
        with pytest.raises(ValueError, match="noise must be fp32 of shape"):
            head_select(logits, 4, 1.0, noise, slots)
    with pytest.raises(ValueError, match="noise must be fp32 of shape"):
        head_select(logits, 4, 1.0, torch.zeros(2, 2, 10))


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (11, 1.0), (4, 0.0), (4, float("inf"))])
def test_impossible_arguments_raise(k, temperature):
    with pytest.raises(ValueError):
        head_select(torch.zeros(2, 10), k, temperature)


def test_without_the_kernel_nothing_is_sorted_whole():
    """A stand-in for a device on which triton does not run."""
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Calls():
        head_select(torch.randn(3, 5000), 16, 1.0)
    assert "topk" in called and "sort" not in called


def test_compiles_into_one_graph():
    logits = torch.randn(3, 50)
    compiled = torch.compile(lambda logits: head_select_op(logits, 4, 0.7), backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(logits), head_select_reference(logits, 4, 0.7), strict=True):
        assert torch.equal(actual, expected)
    arguments = logits[None], 4, 0.7, torch.rand(1, 2, 50), torch.tensor([0, 1, 1])
    compiled = torch.compile(head_select_op, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*arguments), head_select_reference(*arguments), strict=True):
        assert torch.equal(actual, expected)
