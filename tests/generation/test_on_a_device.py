"""The dynamic loop with the branches of a CUDA device: its texts, its launches, and how often the host waits."""

import pytest
import torch

from hf_treeflash.kernels import attention_interface
from tests.generation.launches import Round, as_on_cuda
from tests.helpers.batches import padded
from tests.helpers.tiny import prompt, tiny_target
from tests.static.calls import drafter_of, plainly

LAYERS_OF_A_STORAGE = 8


@pytest.fixture
def passes(monkeypatch):
    """Take the branches of CUDA; return the passes' calls of the kernel: nodes and slots of each layer's."""
    calls: list[tuple[int, int]] = []
    oracle = attention_interface.tree_attention

    def counted(query, key, *rest):
        calls.append((query.shape[2], key.shape[2]))
        return oracle(query, key, *rest)

    as_on_cuda(monkeypatch)
    monkeypatch.setattr(attention_interface, "tree_attention", counted)
    return calls


def generate(target, drafter, inputs, **settings):
    settings = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None, **settings}
    return target.generate(**inputs, assistant_model=drafter, **settings)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_texts_by_the_kernel_are_plain_decodings(family, batch, passes):
    target, drafter, inputs = tiny_target(family, head_dim=16), drafter_of(head_dim=16), padded(batch)
    assert torch.equal(generate(target, drafter, inputs), plainly(target, inputs))
    nodes = {nodes for nodes, _ in passes}
    assert nodes >= {24, drafter.config.block_size}  # both models


def test_a_batch_with_ends_of_its_own(passes):
    target, drafter, inputs = tiny_target(head_dim=16), drafter_of(head_dim=16), padded(3)
    ends = [int(token) for token in plainly(target, inputs)[:, -9].unique()]
    settings = {"eos_token_id": ends, "pad_token_id": 0}
    assert torch.equal(generate(target, drafter, inputs, **settings), plainly(target, inputs, **settings))
    assert passes


def test_a_seed_gives_the_text_of_plain_sampling(passes):
    target, drafter, inputs = tiny_target(head_dim=16), drafter_of(head_dim=16), {"input_ids": prompt()}
    for seed in range(3):
        torch.manual_seed(seed)
        plain = plainly(target, inputs, do_sample=True, top_k=5)
        torch.manual_seed(seed)
        assert torch.equal(generate(target, drafter, inputs, do_sample=True, top_k=5), plain)
    assert passes


@pytest.mark.parametrize("gap", ["right", "middle"])
def test_padding_that_is_not_on_the_left_takes_masks(gap, passes):
    target, drafter = tiny_target(head_dim=16), drafter_of(head_dim=16)
    ids = prompt(14, batch=2)
    mask = torch.ones_like(ids)
    mask[1, slice(-3, None) if gap == "right" else slice(2, 4)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(generate(target, drafter, inputs), plainly(target, inputs))
    assert not [nodes for nodes, _ in passes if nodes == 24]


@pytest.mark.parametrize("batch", [1, 3])
def test_targets_with_windows_take_masks(batch, passes):
    target, inputs = tiny_target("mistral", head_dim=16), padded(batch)
    drafter = drafter_of(head_dim=16, layer_types=["sliding_attention"] * 2, sliding_window=8)
    assert torch.equal(generate(target, drafter, inputs), plainly(target, inputs))
    assert not passes


def test_a_target_the_kernel_fails_for_takes_masks(passes, monkeypatch):
    target, drafter, inputs = tiny_target(head_dim=16), drafter_of(head_dim=16), padded(3)
    plain = plainly(target, inputs)
    working = attention_interface.tree_attention

    def broken(query, *rest):
        if query.shape[2] != drafter.config.block_size and passes:  # not in the first layer
            raise RuntimeError("no kernel image")
        return working(query, *rest)

    monkeypatch.setattr(attention_interface, "tree_attention", broken)
    assert torch.equal(generate(target, drafter, inputs), plain)
    assert 24 not in {nodes for nodes, _ in passes}
    assert target.config._attn_implementation == "sdpa"


def rounds_of(target_layers: int, drafter_layers: int) -> Round:
    target = tiny_target(head_dim=16, num_hidden_layers=target_layers)
    drafter = drafter_of(head_dim=16, num_hidden_layers=drafter_layers, block_size=16, budget=64)
    counted = Round()
    with pytest.MonkeyPatch.context() as patch:
        as_on_cuda(patch)
        counted.watch(patch)
        generate(target, drafter, {"input_ids": prompt()}, max_new_tokens=120)
    return counted


def test_launches_of_36_and_5_layers():
    few, more = rounds_of(4, 2), rounds_of(5, 3)
    *most_waits, longest = sorted(sum(waits.values()) for waits in few.waits)
    assert max(most_waits) <= 2 and longest <= 3  # once per call a round looks for padding

    def most(rounds: Round, part: str) -> int:
        return max(sum(round[part].values()) for round in rounds.parts[1:-9])

    verify = most(few, "verify") + 32 * (most(more, "verify") - most(few, "verify"))
    draft = most(few, "draft") + 3 * (most(more, "draft") - most(few, "draft"))
    moves = 2 * (-(-36 // LAYERS_OF_A_STORAGE) - 1)  # a path's columns, in each further storage
    assert verify + draft + most(few, "walk") + most(few, "commit") + moves <= 1900
