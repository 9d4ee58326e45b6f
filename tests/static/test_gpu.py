"""What only a GPU shows: the recorded round equals the launched one."""

import pytest
import torch
from transformers import CompileConfig

from tests.helpers.batches import padded
from tests.helpers.tiny import tiny_target
from tests.static.calls import drafter_of, generate, plainly, running, the_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(inputs: dict) -> dict:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.fixture(scope="module")
def target():
    return tiny_target(head_dim=16).cuda()


def test_replayed_rounds_equal_launched_rounds(target):
    """Many rounds, state after state, not only the texts."""
    drafter, inputs = drafter_of(False, 33, head_dim=16).cuda(), on_device(padded(3))
    generate(target, drafter, inputs, max_new_tokens=300)
    launcher = the_session(drafter)
    round = running(target, drafter)
    assert launcher.failure is None and set(launcher.graphs) == {round.capacity}  # one for all lengths
    # Both start from what the call left behind, with room for more.
    round.limits.fill_(10**6)
    round.active.fill_(True)
    saved = [tensor.clone() for tensor in round.state]
    caches = [
        t for c in (round.target_cache, round.drafter_cache) for layer in c.layers for t in (layer.keys, layer.values)
    ]
    before = [tensor.clone() for tensor in caches]
    results = []
    for launched in (False, True):
        for tensor, earlier in zip([*round.state, *caches], [*saved, *before], strict=True):
            tensor.copy_(earlier)
        round.lengths.fill_(100)
        emitted = []
        for _ in range(24):
            if launched:
                round.run(round.capacity)
            else:
                launcher.graphs[round.capacity].replay()
            emitted.append(round.emitted.clone())
        results.append(torch.stack(emitted))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "settings", [{}, {"compile_config": CompileConfig(mode="max-autotune")}], ids=["default", "given"]
)
def test_texts_with_graphs(target, settings):
    drafter = drafter_of(head_dim=16).cuda()
    for seed in (3, 4):  # the second prompt replays the first one's graphs
        inputs = on_device(padded(4, seed=seed))
        assert torch.equal(generate(target, drafter, inputs, **settings).sequences, plainly(target, inputs))
    launcher = the_session(drafter)
    assert launcher.graphs and launcher.failure is None
    assert launcher.round.attention.by_kernel and launcher.round.block_attention.by_kernel


def test_a_seed_gives_the_text_of_plain_sampling(target):
    drafter, settings = drafter_of(head_dim=16).cuda(), {"do_sample": True, "top_k": 5}
    for seed in range(3):
        torch.manual_seed(seed)
        plain = plainly(target, on_device({"input_ids": padded(1)["input_ids"]}), **settings)
        torch.manual_seed(seed)
        static = generate(target, drafter, on_device({"input_ids": padded(1)["input_ids"]}), **settings)
        assert torch.equal(static.sequences, plain)
