"""Chunked attention: a node sees nothing beyond its own chunk; queries that scale with the column."""

import pytest
import torch

from tests.families.models import FAMILIES
from tests.families.passes import leaves, prefilled, step_logits, tree_logits, tree_of
from tests.helpers.quoting import knows, quoting_drafter
from tests.recurrent.trees import shaped_tree

(LLAMA4,) = (family for family in FAMILIES if family.name == "Llama 4")
GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}


@pytest.mark.parametrize("length", range(10, 18))
def test_node_logits_are_those_of_the_path_alone_wherever_the_chunks_end(length):
    """Two left-padded rows, whose chunks of 8 end at different nodes; trees reach over up to two borders."""
    target, generator = LLAMA4.build(), torch.Generator().manual_seed(length)
    inputs = {key: value[:, :length] for key, value in LLAMA4.inputs(2, seed=3).items()}
    mask = inputs["attention_mask"]
    cache, positions = prefilled(target, inputs)
    for shape, nodes in (("chain", 16), ("random", 24)):
        parents = torch.stack([shaped_tree(shape, nodes, generator) for _ in range(2)])
        tree = tree_of(parents, torch.tensor([5, 6]), generator)
        logits, _ = tree_logits(target, cache, mask, positions, tree)
        for row in range(2):
            for path in leaves(parents[row])[:3]:
                steps = step_logits(target, cache, mask, positions, tree, row, path)
                torch.testing.assert_close(logits[row, path], steps, atol=1e-3, rtol=0)


def test_chunks_are_not_windows():
    """The control: with a window that slides in place of the chunks the nodes are far off."""
    target, generator = LLAMA4.build(), torch.Generator().manual_seed(0)
    inputs = LLAMA4.inputs(seed=3)
    cache, positions = prefilled(target, inputs)
    tree = tree_of(torch.arange(-1, 15)[None], torch.tensor([5]), generator)
    steps = step_logits(target, cache, inputs["attention_mask"], positions, tree, 0, list(range(16)))

    class Slides(int):
        def __new__(cls, size):
            return int(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_treeflash.attention.Chunk", Slides)
        logits, _ = tree_logits(target, cache, inputs["attention_mask"], positions, tree)
    assert (logits[0] - steps).abs().max() > 1


@pytest.mark.parametrize("seed", range(4))
def test_trees_are_cut_where_the_scale_changes(seed):
    """Layers without positions scale queries by the column in steps; here at every fourth one."""
    target = LLAMA4.build(attn_temperature_tuning=True, floor_scale=4, attn_scale=2.0)
    drafter, inputs = quoting_drafter(), LLAMA4.inputs(seed=seed)
    plain = target.generate(**inputs, **GREEDY)
    knows(drafter, plain, inputs["attention_mask"])
    output = target.generate(**inputs, **GREEDY, assistant_model=drafter, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain)
    assert output.block_efficiency > 1.3, "cut, but trees"


def test_batches_are_refused_under_temperature_tuning():
    target = LLAMA4.build(attn_temperature_tuning=True)
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM.*`attn_temperature_tuning`.*one prompt at a time"):
        target.generate(**LLAMA4.inputs(2), **GREEDY, assistant_model=quoting_drafter())
