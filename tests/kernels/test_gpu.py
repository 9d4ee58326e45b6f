"""What only a GPU shows: bf16 at the shapes of Qwen3-4B and 8B, and graph replay over rounds of changing lengths."""

from __future__ import annotations

import pytest
import torch

from hf_treeflash.kernels import (
    accept,
    accept_reference,
    add_path,
    add_path_reference,
    build_tree,
    build_tree_reference,
    compact,
    compact_reference,
    gated_delta,
    gated_delta_reference,
    head_select,
    head_select_reference,
    new_arrivals,
    pointer_table,
    tree_attention,
    tree_attention_reference,
)

from .trees import ancestor_mask, make_transitions, random_parents, random_words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("nodes", [1, 64, 256])
@pytest.mark.parametrize(("context", "splits"), [(0, 1), (500, 1), (2048, 4), (8000, 8)])
def test_attention_in_bf16(nodes, context, splits):
    generator = torch.Generator().manual_seed(nodes)
    slots = context + nodes + 100
    query = torch.randn(2, nodes, 32, 128, generator=generator).transpose(1, 2).bfloat16().cuda()
    key, value = torch.randn(2, 2, 8, slots, 128, generator=generator).bfloat16().cuda()
    words = random_words(2, nodes, generator).cuda()
    prefix = torch.tensor([context, context // 2]).cuda()
    start = torch.tensor([0, context // 4]).cuda()
    case = (query, key, value, words, prefix, start, 128**-0.5, splits)
    expected, arrivals = tree_attention_reference(*case), new_arrivals(query.device)
    once = tree_attention(*case, arrivals=arrivals)
    for output in (once, tree_attention(*case)):
        torch.testing.assert_close(output, expected, atol=1e-2, rtol=2e-2)
    for _ in range(50):  # whichever program comes last
        assert torch.equal(tree_attention(*case, arrivals=arrivals), once)
    assert not arrivals.any()


def test_head_select_at_full_size():
    logits = (torch.randn(240, 151936, generator=torch.Generator().manual_seed(0)) * 4).bfloat16().cuda()
    token_ids, log_probs = head_select(logits, 16, 1.0)
    expected_ids, expected_log_probs = head_select_reference(logits, 16, 1.0)
    assert torch.equal(token_ids, expected_ids)
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("budget", [16, 64, 128, 256])
def test_build_tree_at_full_size(budget):
    for kind in ("random", "ties", "certain", "masked"):
        transitions = [part.cuda() for part in make_transitions(8, 15, 16, 16, kind, seed=budget)]
        trees = build_tree(*transitions, budget), build_tree_reference(*transitions, budget)
        for actual, expected in zip(*trees, strict=True):
            assert torch.equal(actual, expected)


def test_graph_replay_equals_the_oracles():
    """Build, attend, accept and compact in one graph; 24 rounds whose rows advance by different lengths."""
    budget, batch, slots = 64, 4, 1024
    generator = torch.Generator().manual_seed(0)
    transitions = [part.cuda() for part in make_transitions(batch, 15, 16, 16, "random", seed=0)]
    query = torch.randn(batch, 8, budget, 64, generator=generator).cuda()
    cache = [torch.randn(batch, 2, slots, 64, generator=generator).cuda() for _ in range(4)]
    expected_cache = [tensor.clone() for tensor in cache]
    prefix = torch.tensor([3, 64, 200, 131]).cuda()
    start = torch.tensor([0, 5, 0, 40]).cuda()
    targets = torch.zeros(batch, budget, dtype=torch.int64, device="cuda")
    table, arrivals = pointer_table(cache), new_arrivals(query.device)

    def round_on_device():
        tree = build_tree(*transitions, budget)
        inputs = query, cache[0], cache[1], tree.ancestor_words, prefix, start, 0.125, 4
        output = tree_attention(*inputs, arrivals=arrivals)
        path, length, token = accept(tree.token_ids, tree.parents, tree.ancestor_words, tree.num_nodes, targets)
        compact(cache, path, length, prefix, pointers=table)
        return output, path, length, token

    originals = [tensor.clone() for tensor in cache]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels outside the capture
        round_on_device()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = round_on_device()
    for tensor, original in zip(cache, originals, strict=True):
        tensor.copy_(original)

    advanced = set()
    for turn in range(24):
        fresh = make_transitions(batch, 15, 16, 16, ("random", "ties")[turn % 2], seed=turn)
        for part, new in zip(transitions, fresh, strict=True):
            part.copy_(new)
        tree = build_tree_reference(*transitions, budget)
        for row in range(batch):  # follow the path to some node, then leave the tree
            targets[row] = -1
            node = (7 * turn + 13 * row) % int(tree.num_nodes[row])
            while node > 0:
                targets[row, tree.parents[row, node]] = tree.token_ids[row, node]
                node = int(tree.parents[row, node])
        graph.replay()
        words = tree.ancestor_words
        expected = tree_attention_reference(query, *expected_cache[:2], words, prefix, start, 0.125, 4)
        walked = accept_reference(tree.token_ids, tree.parents, words, tree.num_nodes, targets)
        compact_reference(expected_cache, walked[0], walked[1], prefix)
        torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)
        for actual, wanted in zip(outputs[1:], walked, strict=True):
            assert torch.equal(actual, wanted)
        for actual, wanted in zip(cache, expected_cache, strict=True):
            assert torch.equal(actual, wanted)
        prefix += walked[1]
        advanced |= set(walked[1].tolist())
    assert len(advanced) > 2


@pytest.mark.parametrize("nodes", [1, 16, 64, 128])
def test_gated_delta_at_the_shapes_of_qwen3_5(nodes):
    """Products in three TF32 parts are as good as in fp32."""
    generator = torch.Generator().manual_seed(nodes)
    query, key = torch.randn(2, 2, nodes, 16, 128, generator=generator).bfloat16().cuda()
    value = torch.randn(2, nodes, 32, 128, generator=generator).bfloat16().cuda()
    log_decay = -torch.rand(2, nodes, 32, generator=generator).cuda()
    beta = torch.rand(2, nodes, 32, generator=generator).bfloat16().cuda()
    state = torch.randn(2, 32, 128, 128, generator=generator).cuda()
    parents = random_parents(2, nodes, generator)
    mask = ancestor_mask(parents).cuda()
    case = (query, key, value, log_decay, beta, state, mask)
    actual, expected = gated_delta(*case), gated_delta_reference(*case)
    for name, tolerance in (("keys", 1e-6), ("updates", 1e-4), ("decays", 1e-4)):
        mine, theirs = getattr(actual, name).float(), getattr(expected, name).float()
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=1e-4)
    torch.testing.assert_close(actual.output, expected.output, atol=4e-3, rtol=2e-2)
    path = torch.tensor([[0, *range(1, min(nodes, 9))], [0] + [-1] * (min(nodes, 9) - 1)]).cuda()
    moved, wanted = state.clone(), state.clone()
    add_path(moved, actual.keys, actual.updates, actual.decays, path)
    add_path_reference(wanted, actual.keys, actual.updates, actual.decays, path)
    torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=1e-4)
