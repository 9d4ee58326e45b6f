"""Rounds of the dynamic loop, every kernel of theirs run."""

import pytest
import torch

from tests.generation.launches import as_on_cuda
from tests.helpers.batches import padded
from tests.helpers.tiny import tiny_target
from tests.static.calls import drafter_of, plainly


@pytest.mark.parametrize("batch", [1, 2])
def test_texts_are_plain_decodings(batch, triton_kernels, device, monkeypatch):
    target, drafter = tiny_target(head_dim=16).to(device), drafter_of(head_dim=16).to(device)
    inputs = {name: tensor.to(device) for name, tensor in padded(batch).items()}
    plain = plainly(target, inputs, max_new_tokens=7)
    as_on_cuda(monkeypatch)
    settings = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": None}
    assert torch.equal(target.generate(**inputs, assistant_model=drafter, **settings), plain)
