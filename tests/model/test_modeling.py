"""The drafter: configuration, the native DFlash contract, transitions, the head."""

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from hf_treeflash import TreeFlashConfig
from hf_treeflash.compat import CACHE
from hf_treeflash.knobs import DraftingKnobs
from hf_treeflash.tree import build_tree
from tests.helpers.drafting import drafting_inputs
from tests.helpers.tiny import VOCAB, prompt, tiny_drafter, tiny_target


def test_config_round_trips_and_checks_itself(tmp_path):
    config = tiny_drafter().config
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    with pytest.raises(ValueError, match="block_size"):
        TreeFlashConfig(block_size=1)
    with pytest.raises(ValueError, match="mask_token_id"):
        TreeFlashConfig(vocab_size=10, mask_token_id=10)
    with pytest.raises(ValueError, match="target_layer_ids"):
        TreeFlashConfig(num_target_layers=4, target_layer_ids=[4])
    with pytest.raises(ValueError, match="ar_head"):
        TreeFlashConfig(ar_head="linear")
    with pytest.raises(ValueError, match="sliding_window"):
        TreeFlashConfig(num_hidden_layers=1, layer_types=["sliding_attention"])
    with pytest.raises(ValueError, match="layer_types"):
        TreeFlashConfig(num_hidden_layers=2, layer_types=["full_attention"])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("taps", [[0], [0, 1, 2, 3]])
def test_any_number_of_layers_and_taps(layers, taps):
    drafter = tiny_drafter(num_hidden_layers=layers, target_layer_ids=taps)
    context = torch.randn(1, 5, 32 * len(taps))
    output = drafter(noise_embeds=torch.randn(1, 8, 32), context_hidden_states=context)
    assert output.last_hidden_state.shape == (1, 8, 32)


def test_rope_scaling_is_transformers_own():
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    drafter = tiny_drafter(rope_parameters=scaled)
    plain = tiny_drafter(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    torch.testing.assert_close(drafter.rotary_emb.inv_freq, plain.rotary_emb.inv_freq / 4)


def test_context_in_parts_equals_context_at_once():
    drafter, target = tiny_drafter(), tiny_target()
    anchors, context, embed, lm_head = drafting_inputs(drafter, target)
    once = drafter.draft(anchors, context, embed, lm_head)
    cache = DynamicCache(config=drafter.config)
    drafter.draft(anchors, context[:, :4], embed, lm_head, cache=cache)
    cache.crop(-8)
    parts = drafter.draft(anchors, context[:, 4:], embed, lm_head, cache=cache)
    assert torch.equal(once.token_ids, parts.token_ids)
    torch.testing.assert_close(once.log_probs, parts.log_probs, atol=1e-5, rtol=1e-5)


def test_forward_takes_the_cache_by_both_of_transformers_names():
    drafter = tiny_drafter()
    noise, context = torch.randn(1, 8, 32), torch.randn(1, 5, 64)
    caches = {name: DynamicCache(config=drafter.config) for name in ("cache", "past_key_values")}
    outputs = [drafter(noise, context, **{name: cache}) for name, cache in caches.items()]
    assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)
    for output, cache in zip(outputs, caches.values(), strict=True):
        assert output[CACHE] is cache and cache.get_seq_length() == 13


def draw_noise_of(batch: int = 1, seed: int = 3):
    """Return Gumbel noise for the seven slots of [`tiny_drafter`]'s block."""
    uniform = torch.rand(batch, 7, VOCAB, generator=torch.Generator().manual_seed(seed))
    return -(-uniform.log()).log()


@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "with noise"])
def test_transitions_follow_the_paper_row_by_row(noisy):
    """Every row against the formulas of stage 1 and 2, written out one token at a time."""
    drafter, target = tiny_drafter(), tiny_target()
    anchors, context, embed, lm_head = drafting_inputs(drafter, target)
    m, k, temperature = 5, 4, 0.7
    draw_noise = draw_noise_of() if noisy else None
    added = draw_noise[0] if noisy else torch.zeros(7, VOCAB)
    knobs = DraftingKnobs(num_candidates=m, branching=k, draft_temperature=temperature)
    got = drafter.draft(anchors, context, embed, lm_head, knobs=knobs, draw_noise=draw_noise)
    noise = embed(torch.tensor([[4, *[3] * 7]]))
    hidden = drafter.backbone(noise, context, None, None, None)[0]
    head, norm = drafter.ar_head, drafter.norm
    shortlist = (lm_head(norm(hidden)) + torch.nn.functional.pad(added, (0, 0, 1, 0))).topk(m).indices
    for depth in range(7):
        h = hidden[depth + 1]
        for row, previous in enumerate([4] if depth == 0 else shortlist[depth].tolist()):
            joined = torch.cat([head.norm(embed(torch.tensor(previous))), norm(h)])
            u, g = head.up_gate_proj(joined).chunk(2)
            corrected = h + head.down_proj(torch.nn.functional.silu(g) * u)
            wanted = torch.log_softmax((lm_head(norm(corrected)) + added[depth]) / temperature, dim=-1).topk(k)
            assert got.token_ids[0, depth, row].tolist() == wanted.indices.tolist()
            torch.testing.assert_close(got.log_probs[0, depth, row], wanted.values, atol=1e-5, rtol=1e-5)
            following = shortlist[depth + 1].tolist() if depth < 6 else []
            links = [following.index(t) if t in following else -1 for t in wanted.indices.tolist()]
            assert got.next_row[0, depth, row].tolist() == links


@pytest.mark.parametrize("budget", [2, 16, 64])
def test_zero_head_with_all_candidates_gives_the_marginal_trees(budget):
    target, headless = tiny_target(), tiny_drafter(head=False)
    zero = tiny_drafter()
    zero.load_state_dict(headless.state_dict(), strict=False)
    torch.nn.init.zeros_(zero.ar_head.down_proj.weight)
    inputs = drafting_inputs(zero, target, batch=2)
    knobs = {"knobs": DraftingKnobs(num_candidates=VOCAB, branching=VOCAB)}
    with_head = build_tree(zero.draft(*inputs, **knobs), inputs[0], budget)
    without = build_tree(headless.draft(*inputs, **knobs), inputs[0], budget)
    assert torch.equal(with_head.token_ids, without.token_ids) and torch.equal(with_head.parents, without.parents)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("m", "k", "budget"), [(4, 4, 16), (16, 16, 64), (1, 3, 8), (VOCAB, VOCAB, 40)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "with noise"])
def test_rows_on_demand_give_the_same_trees_from_fewer_rows(batch, m, k, budget, temperature, noisy):
    drafter, target = tiny_drafter(), tiny_target()
    inputs = drafting_inputs(drafter, target, batch=batch)
    knobs = {"knobs": DraftingKnobs(num_candidates=m, branching=k, draft_temperature=temperature)}
    knobs["draw_noise"] = draw_noise_of(batch) if noisy else None
    whole = build_tree(drafter.draft(*inputs, **knobs), inputs[0], budget)
    for likely in (budget, 2, 0):
        rows = drafter.draft(*inputs, **knobs, on_demand=likely)
        tree = build_tree(rows, inputs[0], budget)
        assert torch.equal(tree.token_ids, whole.token_ids) and torch.equal(tree.parents, whole.parents)
        torch.testing.assert_close(tree.path_log_probs, whole.path_log_probs, atol=1e-5, rtol=1e-5)
    if m >= 16:
        assert len(rows.computed) < batch * (1 + 6 * m) * 0.9


def test_a_one_slot_block_needs_no_rows_but_the_anchors():
    drafter, target = tiny_drafter(block_size=2), tiny_target()
    inputs = drafting_inputs(drafter, target)
    rows = drafter.draft(*inputs, on_demand=8)
    assert torch.equal(
        build_tree(rows, inputs[0], 8).token_ids, build_tree(drafter.draft(*inputs), inputs[0], 8).token_ids
    )
    assert list(rows.computed) == [(0, 0, 0)]


def test_forward_with_previous_tokens_is_the_corrected_state():
    drafter, target = tiny_drafter(), tiny_target()
    anchors, context, embed, lm_head = drafting_inputs(drafter, target)
    noise = embed(torch.tensor([[4, *[3] * 7]]))
    previous = torch.cat([noise[:, :1], noise[:, :7]], dim=1)
    output = drafter(noise_embeds=noise, context_hidden_states=context, previous_embeds=previous)
    first = drafter.draft(anchors, context, embed, lm_head, knobs=DraftingKnobs(branching=1)).token_ids[0, 0, 0]
    assert lm_head(output.corrected_hidden_state[0, 1]).argmax() == first
    with pytest.raises(ValueError, match="no AR head"):
        tiny_drafter(head=False)(noise_embeds=noise, context_hidden_states=context, previous_embeds=previous)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("head", [True, False])
def test_stock_transformers_runs_the_drafter_as_a_chain(implementation, sliding, head):
    target = tiny_target()
    extra = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6} if sliding else {}
    drafter = tiny_drafter(head, **extra)
    drafter.set_attn_implementation(implementation)
    ids = prompt()
    plain = target.generate(ids, max_new_tokens=40, do_sample=False)
    chain = target.generate(
        ids, assistant_model=drafter, speculation_type="dflash", max_new_tokens=40, do_sample=False
    )
    assert torch.equal(plain, chain)
