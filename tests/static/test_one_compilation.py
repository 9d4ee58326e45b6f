"""With the tree attention kernel one compilation and one recorded graph serve every length of a text."""

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig

from hf_treeflash import kernels
from hf_treeflash.static.sessions import round_up
from tests.helpers.tiny import prompt, tiny_target
from tests.static.calls import drafter_of, generate, plainly, the_session

LONGEST = 5000


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "masks"])
def test_texts_from_200_to_5000_tokens(monkeypatch, kernel):
    """The kernel's oracle stands in for it; masks are compiled once per span."""
    monkeypatch.setattr(kernels, "use_triton", lambda tensor: kernel)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    target = tiny_target(head_dim=16, max_position_embeddings=2 * LONGEST, num_hidden_layers=3)
    drafter = drafter_of(budget=8, head_dim=16, num_hidden_layers=1, target_layer_ids=[0])
    settings = {"compile_config": CompileConfig(backend=backend, fullgraph=True), "max_cache_len": LONGEST + 50}
    lengths = (200, 1000, 2500, LONGEST - 10) if kernel else (200, 600)
    for length in lengths:
        inputs = {"input_ids": prompt(length)}
        static = generate(target, drafter, inputs, max_new_tokens=10, **settings)
        assert torch.equal(static.sequences, plainly(target, inputs, max_new_tokens=10))
    launcher = the_session(drafter)
    assert launcher.compiled and launcher.failure is None
    assert launcher.seen == ({launcher.round.capacity} if kernel else {256, 1024})
    assert len(graphs) == 2 * len(launcher.seen) + 3  # both models; what is around them, once


def test_capacities_come_in_steps():
    assert [round_up(slots) for slots in (1, 2048, 2049, 3072, 3073, 4097, 33000)] == [
        2048, 2048, 3072, 3072, 4096, 6144, 49152
    ]  # fmt: skip
    assert [round_up(300, batch) for batch in (1, 2, 3, 8, 5000)] == [2048, 1024, 512, 384, 384]
    assert len({round_up(slots) for slots in range(200, 33000)}) == 10
