"""Calls that must be refused before anything runs."""

import pytest
import torch
from transformers import DynamicCache

from tests.helpers.tiny import prompt


def refuse(target, drafter, message, **settings):
    """Call generate, expect the message, and check that no forward ran and no random number was drawn."""
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda *args: calls.append(1))
        for model in (target, drafter)
        for module in model.modules()
    ]
    state = torch.get_rng_state()
    settings = {"do_sample": False, "max_new_tokens": 8, **settings}
    ids = settings.pop("input_ids", prompt())
    try:
        with pytest.raises(ValueError, match=message):
            target.generate(ids, assistant_model=drafter, **settings)
    finally:
        for handle in handles:
            handle.remove()
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)


def filled_cache(target, batch: int = 1, length: int = 4):
    """Return a cache of the target that holds a prompt of this length."""
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(prompt(length, batch=batch), past_key_values=cache)
    return cache
