"""Every family of the support matrix behaves as plain `generate`, and the README says what was seen."""

import re

import pytest
import torch
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

from hf_treeflash import TreeFlashDraftModel
from tests.families.checks import check_greedy, drafter_for
from tests.families.hybrids import HYBRIDS, REFUSED
from tests.families.matrix import HEADER, check_family, readme_matrix, refusal, refused_row, supported_row
from tests.families.models import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("head", [True, False], ids=["head", "marginal"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_text_seed_and_cache_are_those_of_plain_generate(family, head):
    check_family(family, head)


@pytest.mark.parametrize(("family", "reason"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_what_is_refused_says_which_layer_and_why(family, reason):
    message = refusal(family)
    assert reason in message and re.search(r"layer \d", message.lower())


def test_the_readme_shows_this_matrix():
    table = readme_matrix()
    if table is None:
        pytest.skip("the README has no support matrix yet")
    rows = [supported_row(family) for family in [*FAMILIES, *HYBRIDS]] + [refused_row(*row) for row in REFUSED]
    assert table == "\n".join([HEADER, *rows]), "run `python -m tests.families.render`"


def muse_assistant(folder):
    """Save a drafter as transformers' own DFlash class for Muse Glimmer writes it."""
    config = MuseGlimmerAssistantConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        sliding_window=16,
        block_size=8,
        mask_token_id=3,
        target_layer_ids=[0, 2],
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(1)
    MuseGlimmerAssistantModel(config).eval().save_pretrained(folder)
    return MuseGlimmerAssistantModel.from_pretrained(folder).eval()


def test_muse_glimmer_with_transformers_own_assistant(tmp_path):
    """The same weights draft here as in transformers' chain, on the bare embedding, and the text stays plain."""
    family = BY_NAME["Muse Glimmer"]
    target, native = family.build(), muse_assistant(tmp_path)
    drafter = TreeFlashDraftModel.from_pretrained(tmp_path).eval()
    check_greedy(target, drafter, family.inputs(3), suppress_tokens=[20, 21, 22, 23])
    noise, context = torch.randn(1, 8, 32), torch.randn(1, 30, 64)
    with torch.no_grad():
        ours = drafter(noise, context).last_hidden_state
        theirs = native(noise, context, position_ids=torch.arange(38)[None]).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_drafter_sees_what_the_embedding_module_returns():
    """Gemma scales its embeddings in the module; the drafter gets them scaled, as transformers' DFlash gives them."""
    target = BY_NAME["Gemma 3"].build()
    drafter, seen = drafter_for(target), []
    draft = type(drafter).draft

    def spy(self, anchor_ids, context, embed, lm_head, **kwargs):
        seen.append((anchor_ids, embed(anchor_ids)))
        return draft(self, anchor_ids, context, embed, lm_head, **kwargs)

    drafter.draft = spy.__get__(drafter)
    check_greedy(target, drafter, BY_NAME["Gemma 3"].inputs())
    for anchor_ids, embeds in seen:
        bare = torch.nn.functional.embedding(anchor_ids, target.get_input_embeddings().weight)
        torch.testing.assert_close(embeds, bare * 32**0.5)


class Int8Linear(torch.nn.Module):
    """A weight-only int8 layer that, like those of several libraries, has no floating-point parameter at all."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.qweight * self.scale).T


def test_targets_without_a_floating_weight():
    target = BY_NAME["Llama"].build()
    for module in list(target.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, Int8Linear(child))
    for batch in (1, 3):
        check_greedy(target, drafter_for(target), BY_NAME["Llama"].inputs(batch))
