"""Hybrid targets as users load them: quantised, adapted, in half precision, and read by drafters at any layer."""

import copy

import pytest
import torch
from transformers.utils import logging

from hf_treeflash.compat import CACHE
from tests.families.hybrids import HYBRIDS
from tests.families.passes import leaves, prefilled, step_logits, tree_logits, tree_of
from tests.families.test_support_matrix import Int8Linear
from tests.helpers.quoting import knows, quoting_drafter
from tests.helpers.tiny import tiny_drafter
from tests.recurrent.trees import shaped_tree

BY_NAME = {family.name: family for family in HYBRIDS}
KINDS = ["Qwen3.5", "Kimi-Linear", "Bamba", "Jamba", "LFM2"]
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}


def check_text(target, inputs: dict, drafter=None, **settings):
    """Compare a greedy text; return the drafted call's output."""
    plain = target.generate(**inputs, **GREEDY)
    drafter = drafter or quoting_drafter()
    knows(drafter, plain, inputs["attention_mask"])
    settings = {**GREEDY, "return_dict_in_generate": True, **settings}
    output = target.generate(**inputs, assistant_model=drafter, **settings)
    assert torch.equal(output.sequences, plain)
    assert output.block_efficiency > 2
    return output


@pytest.mark.parametrize("name", KINDS)
def test_weight_only_int8_layers(name):
    target = BY_NAME[name].build()
    for module in list(target.modules()):
        for child_name, child in list(module.named_children()):
            # Jamba multiplies by this weight itself unless its config says that it is quantised.
            if type(child) is torch.nn.Linear and child_name not in ("dt_proj", "router"):
                setattr(module, child_name, Int8Linear(child))
    check_text(target, BY_NAME[name].inputs(2))


@pytest.mark.parametrize("name", ["Qwen3.5", "Bamba", "LFM2"])
def test_adapted_projections(name):
    peft = pytest.importorskip("peft")
    target = BY_NAME[name].build()
    names = {"Qwen3.5": ["in_proj_qkv", "out_proj", "q_proj"], "Bamba": ["in_proj", "q_proj"], "LFM2": ["in_proj"]}
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=names[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, target)
    check_text(target, BY_NAME[name].inputs(2))


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_as_far_from_full_as_plain_steps_are(name):
    """Texts may differ at near-ties in bf16, as between any two batch sizes; the logits are equally good."""
    family, generator = BY_NAME[name], torch.Generator().manual_seed(0)
    full = family.build()
    half = copy.deepcopy(full).bfloat16()
    inputs = family.inputs(2)
    mask = inputs["attention_mask"]
    parents = torch.stack([shaped_tree("random", 20, generator) for _ in range(2)])
    tree = tree_of(parents, torch.tensor([5, 6]), generator)
    cache, positions = prefilled(full, inputs)
    half_cache, _ = prefilled(half, inputs)
    nodes, _ = tree_logits(half, half_cache, mask, positions, tree)
    ours, plain = [], []
    for row in range(2):
        for path in leaves(parents[row])[:3]:
            exact = step_logits(full, cache, mask, positions, tree, row, path)
            steps = step_logits(half, half_cache, mask, positions, tree, row, path)
            ours.append((nodes[row, path].float() - exact).square().mean())
            plain.append((steps.float() - exact).square().mean())
    assert torch.stack(ours).mean() < 2 * torch.stack(plain).mean()


@pytest.mark.parametrize("family", [family for family in HYBRIDS if family.exists], ids=lambda family: family.name)
def test_drafters_read_any_layer(family):
    """All four, the last one included, are the states that `output_hidden_states` gives."""
    target, inputs = family.build(), family.inputs()
    drafter, seen = tiny_drafter(num_target_layers=None, target_layer_ids=[0, 1, 2, 3]), []
    draft = type(drafter).draft

    def spy(anchor_ids, context, *args, **kwargs):
        seen.append(context)
        return draft(drafter, anchor_ids, context, *args, **kwargs)

    drafter.draft = spy
    output = target.generate(**inputs, assistant_model=drafter, **GREEDY)
    assert torch.equal(output, target.generate(**inputs, **GREEDY))
    with torch.no_grad():
        states = target(**inputs, output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(seen[0], torch.cat(states, dim=-1), atol=1e-4, rtol=1e-4)


def test_static_caches_go_to_the_dynamic_path(monkeypatch):
    told = []
    monkeypatch.setattr(logging.get_logger("hf_treeflash.static.decoding"), "warning_once", told.append)
    check_text(BY_NAME["Qwen3.5"].build(), BY_NAME["Qwen3.5"].inputs(), cache_implementation="static")
    assert "does not cover recurrent layers" in told[0]


def test_recorded_states_and_attentions_are_shaped_as_plain():
    target, inputs = BY_NAME["Qwen3.5"].build(), BY_NAME["Qwen3.5"].inputs(2)
    asked = {"output_hidden_states": True, "output_attentions": True, "output_logits": True}
    target.set_attn_implementation("eager")
    output = check_text(target, inputs, **asked)
    plain = target.generate(**inputs, **GREEDY, **asked, return_dict_in_generate=True)
    for name in ("hidden_states", "attentions"):
        for mine, theirs in zip(output[name], plain[name], strict=True):
            for own, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-3)
    assert output[CACHE].get_seq_length() == plain[CACHE].get_seq_length()


def test_automatic_budgets_and_quotes():
    target, inputs = BY_NAME["Falcon-H1"].build(), BY_NAME["Falcon-H1"].inputs(2)
    plain = target.generate(**inputs, **GREEDY)
    drafter = quoting_drafter(tree_budget="auto")
    knows(drafter, plain, inputs["attention_mask"])
    assert torch.equal(target.generate(**inputs, **GREEDY, assistant_model=drafter), plain)
    quotes = {"prompt_lookup_num_tokens": 4, "assistant_model": quoting_drafter()}
    assert torch.equal(target.generate(**inputs, **GREEDY, **quotes), plain)
