"""Train and serve agree, and no block sees what decoding does not know yet."""

import pytest
import torch

from hf_treeflash.training import AnchorCollator
from hf_treeflash.training.blocks import make_blocks, output_layer_of

from .conftest import make_drafter, make_samples

WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
OPTIONS = {
    "plain": {},
    "windowed": WINDOWED,
    "causal": {"causal_layers": "all"},
    "strict, sliding layers causal": {**WINDOWED, "window_rule": "strict", "causal_layers": "sliding"},
    "window of the context": {**WINDOWED, "window_rule": "context"},
    "window from the anchor": {**WINDOWED, "sliding_window": 3, "window_rule": "anchor", "causal_layers": "sliding"},
    "shifted": {"first_slot": 0},
    "shifted, rope of neighbours": {"first_slot": 0, "rope_interleaved": True, "causal_layers": "all"},
    "markov": {"ar_head": "markov", "head_rank": 6},
    "markov, gated, shifted": {"ar_head": "markov", "head_rank": 6, "head_gated": True, "first_slot": 0},
    "selector, convolutions": {"ar_head": "selector", "head_rank": 6, "selector_top_k": 64, "conv_kernel_size": 3},
    "scaled": {"input_embedding_scale": 0.5, "output_multiplier": 0.3, "final_logit_softcapping": 2.0},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def collate(samples, num_anchors=64):
    return AnchorCollator(pad_token_id=0, num_anchors=num_anchors)(samples)


@every_option
@torch.no_grad()
def test_no_block_sees_its_anchors_state_or_what_follows(target, options):
    drafter = make_drafter(trained=True, **options)
    batch = collate(make_samples(2))
    blocks, size = make_blocks(drafter, target, batch, with_head=True), drafter.config.block_size
    before = drafter(**blocks.inputs)
    for block in range(batch["anchors"].shape[1]):
        if not batch["anchor_mask"][0, block]:
            continue
        inputs, own = dict(blocks.inputs), slice(block * size, (block + 1) * size)
        context, noise = inputs["context_hidden_states"].clone(), torch.randn_like(inputs["noise_embeds"])
        context[0, batch["anchors"][0, block] :] += 10.0
        noise[:, own] = inputs["noise_embeds"][:, own]
        after = drafter(**inputs | {"context_hidden_states": context, "noise_embeds": noise})
        for name in ("last_hidden_state", "corrected_hidden_state"):
            torch.testing.assert_close(after[name][0, own], before[name][0, own])
        # The state just before the anchor is seen.
        context[0, batch["anchors"][0, block] - 1] += 10.0
        moved = drafter(**inputs | {"context_hidden_states": context, "noise_embeds": noise})
        assert not torch.allclose(moved.last_hidden_state[0, own], before.last_hidden_state[0, own])


@pytest.mark.parametrize("first_slot", [1, 0])
def test_depth_d_is_scored_on_token_anchor_plus_d(target, first_slot):
    drafter = make_drafter(first_slot=first_slot)
    samples = make_samples(2, length=12) + make_samples(1, length=9)
    batch = collate(samples)
    blocks = make_blocks(drafter, target, batch, with_head=True)
    expected = [
        (sample["input_ids"][anchor + slot], slot)
        for sample, anchors, mask in zip(samples, batch["anchors"].tolist(), batch["anchor_mask"], strict=True)
        for anchor in torch.tensor(anchors)[mask].tolist()
        for slot in range(1, 5 - first_slot)
        if anchor + slot < len(sample["input_ids"])
    ]
    assert list(zip(blocks.labels.tolist(), blocks.depths.tolist(), strict=True)) == expected
    # The teacher's choice is the target's own distribution of the label.
    with torch.no_grad():
        logits = target(batch["input_ids"]).logits
        teacher = target.lm_head(blocks.teacher_states)
    place = blocks.supervised.nonzero()
    positions = batch["anchors"][place[:, 0], place[:, 1]] + place[:, 2]
    torch.testing.assert_close(teacher, logits[place[:, 0], positions])


@every_option
@torch.no_grad()
def test_training_and_generation_draft_the_same(target, options, monkeypatch):
    """Every round of a real `generate` call, against one training pass over the text it wrote."""
    drafter = make_drafter(trained=True, **options)
    knobs = drafter.generation_config
    knobs.tree_budget, knobs.num_candidates, knobs.branching, knobs.draft_temperature = 6, 64, 64, 1.0
    rounds = []

    def record(*args, **kwargs):
        rounds.append(type(drafter).draft(drafter, *args, **kwargs | {"on_demand": None}))
        return rounds[-1]

    monkeypatch.setattr(drafter, "draft", record)
    prompt = torch.tensor([make_samples(1)[0]["input_ids"][:6]])
    output = target.generate(
        prompt, assistant_model=drafter, max_new_tokens=14, do_sample=False, return_dict_in_generate=True
    )
    ids, lengths = output.sequences[0], output.acceptance_lengths[0]
    anchors = torch.tensor([6, *lengths[:-1]]).cumsum(0)
    batch = {
        "input_ids": ids[None],
        "document_ids": torch.zeros_like(ids)[None],
        "loss_mask": torch.ones_like(ids)[None].bool(),
        "anchors": anchors[None],
        "anchor_mask": torch.ones_like(anchors)[None].bool(),
    }
    blocks = make_blocks(drafter, target, batch, with_head=True)
    corrected = drafter(**blocks.inputs).corrected_hidden_state.view(len(anchors), 4, -1)
    corrected = corrected[:, drafter.config.first_slot :]
    log_probs = drafter.ar_head.logits(corrected, output_layer_of(target, drafter)).log_softmax(-1)
    assert len(rounds) == len(anchors) > 2
    for number, (anchor, served) in enumerate(zip(anchors.tolist(), rounds, strict=True)):
        row = 0
        for slot in range(1, min(drafter.config.num_drafted + 1, len(ids) - anchor)):
            tokens = served.token_ids[0, slot - 1, row]
            own = served.log_probs[0, slot - 1, row]
            torch.testing.assert_close(own, log_probs[number, slot - 1, tokens], atol=3e-5, rtol=1e-5)
            row = int(served.next_row[0, slot - 1, row][tokens == ids[anchor + slot]])
