"""What only a GPU shows of the dynamic caches: a commit never makes the host wait, and memory goes with its owner."""

import gc
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from hf_treeflash.cache import PrefixCache
from hf_treeflash.rows import Rows
from tests.helpers.batches import padded
from tests.helpers.tiny import tiny_target
from tests.static.calls import drafter_of, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_waiting():
    """Fail where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("paths", [[[0], [0, 2, 3], [0, 1]], [[0, 2], [0, 1], [0, 3]]], ids=["uneven", "even"])
def test_a_commit_uploads_one_index_and_waits_for_nothing(paths):
    target, inputs = tiny_target("qwen3_sliding").cuda(), padded(3)
    cache, ids = DynamicCache(config=target.config), inputs["input_ids"].cuda()
    mask = inputs["attention_mask"].cuda()
    with torch.no_grad():
        target(ids, attention_mask=mask, past_key_values=cache)
        prefix = PrefixCache(cache, mask.bool(), Rows(3))
        cache.activate_past_recording()
        for attempt in range(2):  # the first makes the allocators' blocks
            tail = torch.randint(4, 20, (3, 4), device="cuda")
            target(tail, past_key_values=cache)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, no_waiting():
                prefix.commit(paths, tail=4)
            uploads = [event.count for event in profile.key_averages() if "HtoD" in event.key]
            assert sum(uploads) <= 1, (attempt, uploads)


def test_memory_goes_with_the_target_and_with_the_drafter():
    """Caches, compiled models and graphs of two sessions, and the models themselves."""
    inputs = {name: tensor.cuda() for name, tensor in padded(2).items()}

    def left_over(goes: str) -> int:
        models = {"target": tiny_target(head_dim=16).cuda(), "drafter": drafter_of(head_dim=16).cuda()}
        for settings in ({}, {"do_sample": True}):
            generate(*models.values(), inputs, **settings)
        stays = sum(p.nbytes for name, model in models.items() if name != goes for p in model.parameters())
        del models[goes]
        gc.collect()
        return torch.cuda.memory_allocated() - stays

    left_over("target")  # the libraries' own workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    for goes in ("target", "drafter"):
        assert left_over(goes) - before < 2**18  # a session's caches alone take more than 2 MiB
        gc.collect()
