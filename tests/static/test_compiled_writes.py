"""Compiled rounds write into the caches where they lie: a copy of one would cost more than the round."""

import math
import re
import shutil

import pytest
import torch
from torch._inductor.fx_passes import reinplace
from torch._inductor.utils import run_and_get_code

from hf_treeflash.kernels import pack_ancestor_words
from hf_treeflash.kernels.attention_interface import tree_attention_op
from hf_treeflash.static.cache import RowLayer

BATCH, HEADS, CAPACITY, DIM, COLUMNS = 2, 2, 320, 16, 5


def cache_size_buffers(code: list[str]) -> int:
    """Count the buffers of the size of a cache that generated code allocates."""
    shapes = re.findall(r"empty_strided_\w+\(\(([\d, ]+)\)", "\n".join(code))
    return sum(math.prod(map(int, shape.split(", "))) >= BATCH * HEADS * CAPACITY * DIM for shape in shapes)


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_no_copy_of_a_cache(monkeypatch, by_kernel):
    # From torch 2.13 on inductor sees through a view of its input; users have earlier ones.
    monkeypatch.setattr(reinplace, "_is_layout_preserving_view_copy_back", lambda *args: False, raising=False)
    layer = RowLayer(*torch.zeros(2, BATCH, HEADS, CAPACITY, DIM).unbind())
    states = torch.randn(2, BATCH, HEADS, COLUMNS, DIM)
    layer.slots = torch.tensor([[3, 4, 9, 5, 300], [0, 1, 2, 7, 6]])
    words = pack_ancestor_words(torch.ones(BATCH, COLUMNS, COLUMNS, dtype=torch.bool))
    prefix, start = torch.tensor([5, 0]), torch.zeros(BATCH, dtype=torch.long)

    def attend(states: torch.Tensor) -> torch.Tensor:
        keys, values = layer.update(*states.unbind())
        if by_kernel:
            return tree_attention_op(states[0], keys, values, words, prefix, start, 0.25)
        return (states[0] @ keys.mT).softmax(-1) @ values

    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # a cached graph shows no code
        output, code = run_and_get_code(torch.compile(attend, fullgraph=True), states)
    assert cache_size_buffers(code) == 0
    for row in range(BATCH):
        assert torch.equal(layer.keys[row, :, layer.slots[row]], states[0, row])
    torch.testing.assert_close(output, attend(states))
