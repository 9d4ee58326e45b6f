"""No field that changes the forward is passed over: it changes what is drafted, or it is refused."""

import json

import pytest
import torch

from hf_treeflash.stored_fields import REFUSED_UNLESS_NEUTRAL
from tests.layouts.published import FULL, LLAMA3, READ, SLIDING
from tests.layouts.rounds import drafted_rounds, load, make_target

BASES = {published.name: published for published in READ}
PLAIN, WINDOWED = "DFlash", "DFlash SWA, some layers"
MARKOV, GATED, DFLASH2 = "DeepSpec DSpark", "DeepSpec DSpark, gated, with a confidence head", "DFlash-2"
MUTATIONS: list[tuple[str, dict]] = [
    (PLAIN, {"architectures": ["DFlashLagunaForCausalLM"]}),
    (PLAIN, {"vocab_size": 500}),
    (PLAIN, {"hidden_size": 16}),
    (PLAIN, {"intermediate_size": 32}),
    (PLAIN, {"num_hidden_layers": 1}),
    (PLAIN, {"num_attention_heads": 2}),
    (PLAIN, {"num_key_value_heads": 4}),
    (PLAIN, {"head_dim": 16}),
    (PLAIN, {"hidden_act": "gelu"}),
    (PLAIN, {"rms_norm_eps": 1e-2}),
    (PLAIN, {"rope_theta": 1e6}),
    (PLAIN, {"rope_scaling": LLAMA3}),
    (PLAIN, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    (PLAIN, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    (PLAIN, {"partial_rotary_factor": 0.5}),
    (PLAIN, {"is_neox_style": False}),
    (PLAIN, {"dflash_config__rope_is_neox_style": False}),
    (PLAIN, {"attention_bias": True}),
    (PLAIN, {"layer_types": [SLIDING, FULL], "sliding_window": 3}),
    (PLAIN, {"layer_types": ["chunked_attention", FULL]}),
    (PLAIN, {"layer_types": None, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    (PLAIN, {"num_target_layers": 5}),
    (PLAIN, {"block_size": 4}),
    (PLAIN, {"dflash_config__block_size": 4}),
    (PLAIN, {"dflash_config__mask_token_id": 4}),
    (PLAIN, {"dflash_config__target_layer_ids": [1, 2]}),
    (PLAIN, {"target_layer_ids": [1, 2]}),
    (PLAIN, {"eagle_aux_hidden_state_layer_ids": [1, 2]}),
    (PLAIN, {"dflash_config__sample_from_anchor": True}),
    (PLAIN, {"sample_from_anchor": True}),
    (PLAIN, {"dflash_config__shift_label": True}),
    (PLAIN, {"dflash_config__projector_type": "dspark"}),
    (PLAIN, {"dflash_config__projector_type": "domino"}),
    (PLAIN, {"dflash_config__projector_type": "something new"}),
    (PLAIN, {"is_causal": True}),
    (PLAIN, {"dflash_config__causal": True}),
    (PLAIN, {"dflash_config__causal_head": True}),
    (PLAIN, {"dflash_config__use_swa": True, "dflash_config__swa_window_size": 3}),
    (PLAIN, {"dflash_config__input_embedding_scale": 2.0}),
    (PLAIN, {"dflash_config__output_multiplier": 2.0}),
    (PLAIN, {"final_logit_softcapping": 1.0}),
    (PLAIN, {"logit_scale": 2.0}),
    (PLAIN, {"draft_vocab_size": 16}),
    (PLAIN, {"treeflash_config": {"ar_approximation": "linear"}}),
    (PLAIN, {"markov_rank": 4}),
    (PLAIN, {"selector_rank": 4, "selector_top_k": 5}),
    (PLAIN, {"conv_kernel_size": 2, "conv_group_size": 8}),
    (PLAIN, {"dflash_config__markov_rank": 4, "dflash_config__markov_head_type": "rnn"}),
    (PLAIN, {"dflash_config__conv_kernel_size": 2}),
    (PLAIN, {"dflash_config__selector_rank": 4}),
    (WINDOWED, {"sliding_window": 3}),
    (WINDOWED, {"sliding_window": None}),
    (WINDOWED, {"dflash_config__swa_window_size": 3}),
    (WINDOWED, {"use_sliding_window": False}),
    (WINDOWED, {"layer_types": [FULL, SLIDING]}),
    (WINDOWED, {"is_causal": False}),
    (WINDOWED, {"is_causal": True}),
    (WINDOWED, {"is_causal": True, "dflash_config__causal": False}),
    ("DFlash SWA, is_causal false", {"sliding_window": 4}),
    ("window by max_window_layers", {"max_window_layers": 0}),
    ("window by max_window_layers", {"use_sliding_window": False}),
    ("ModelOpt SWA", {"dflash_config__use_swa": False}),
    ("ModelOpt SWA", {"dflash_config__swa_window_size": 3}),
    ("ModelOpt SWA", {"dflash_config__causal": True}),
    ("DeepSpec DFlash", {"sample_from_anchor": False}),
    ("DeepSpec DFlash", {"markov_rank": 4, "markov_head_type": "rnn"}),
    ("DeepSpec DFlash", {"architectures": ["Gemma4DSparkModel"]}),
    (MARKOV, {"markov_rank": None}),
    (MARKOV, {"markov_rank": 0}),
    (MARKOV, {"markov_rank": 3}),
    (MARKOV, {"markov_head_type": "gated"}),
    (MARKOV, {"markov_head_type": "rnn"}),
    (MARKOV, {"sample_from_anchor": False}),
    (MARKOV, {"vocab_size": 25}),
    (MARKOV, {"draft_vocab_size": 16}),
    (MARKOV, {"dflash_config__selector_rank": 4, "dflash_config__selector_top_k": 5}),
    (MARKOV, {"dflash_config__projector_type": "domino"}),
    (MARKOV, {"output_multiplier": 0.5}),
    (GATED, {"markov_head_type": "vanilla"}),
    (GATED, {"markov_rank": 5}),
    (DFLASH2, {"dflash_config__selector_rank": None}),
    (DFLASH2, {"dflash_config__selector_rank": 5}),
    (DFLASH2, {"dflash_config__selector_top_k": 4}),
    (DFLASH2, {"dflash_config__selector_top_k": None}),
    (DFLASH2, {"dflash_config__conv_kernel_size": 3}),
    (DFLASH2, {"dflash_config__conv_kernel_size": 0}),
    (DFLASH2, {"dflash_config__conv_group_size": 16}),
    (DFLASH2, {"dflash_config__conv_group_size": None}),
    (DFLASH2, {"dflash_config__sample_from_anchor": True}),
    (DFLASH2, {"is_causal": None}),
    (DFLASH2, {"is_causal": True}),
    (DFLASH2, {"dflash_config__output_multiplier": 0.5}),
    ("convolutions of three taps, no selector", {"block_size": 4}),
    ("convolutions of three taps, no selector", {"dflash_config__conv_group_size": 8}),
    ("speculators DFlash-2", {"selector_top_k": 6}),
    ("speculators DFlash-2", {"speculators_model_type": "dspark"}),
    ("speculators DSpark", {"speculators_model_type": "dflash"}),
    ("speculators DSpark", {"markov_head_type": "gated"}),
    ("speculators DSpark, reduced vocabulary", {"draft_vocab_size": 24}),
    ("speculators", {"speculators_model_type": "dflash2", "selector_rank": 4}),
    ("speculators", {"speculators_model_type": "eagle3"}),
    ("speculators", {"speculators_model_type": "dspark"}),
    ("speculators", {"aux_hidden_state_layer_ids": [1, 2]}),
    ("speculators", {"sample_from_anchor": True}),
    ("speculators", {"draft_vocab_size": 12}),
    ("speculators SWA", {"sliding_window_non_causal": True}),
    ("speculators SWA", {"transformer_layer_config__sliding_window": 3}),
    ("speculators, reduced vocabulary", {"draft_vocab_size": 24}),
    ("transformers native", {"sliding_window": 3}),
    ("transformers native", {"layer_types": [FULL, FULL]}),
    ("transformers native", {"is_causal": True}),
    ("transformers native", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("rope by kind of layer", {"rope_parameters__sliding_attention__rope_theta": 1e5}),
    ("TreeFlash", {"treeflash_config__ar_approximation": None}),
]
PLACES = ("", "dflash_config__")
MUTATIONS += [(PLAIN, {f"{place}{name}": "another"}) for name in REFUSED_UNLESS_NEUTRAL for place in PLACES]


@pytest.fixture(scope="module")
def target():
    return make_target("qwen3")


@pytest.fixture(scope="module")
def unchanged(target, tmp_path_factory):
    """What each base drafts in its first round."""
    known: dict[str, torch.Tensor] = {}

    def drafts(name: str) -> torch.Tensor:
        if name not in known:
            known[name] = first_round(target, load(BASES[name], tmp_path_factory.mktemp("base") / "d"))
        return known[name]

    return drafts


def first_round(target, drafter) -> torch.Tensor:
    return drafted_rounds(target, drafter, max_new_tokens=4)[1][0][2]


@pytest.mark.parametrize(("base", "fields"), MUTATIONS, ids=str)
def test_every_semantic_field_matters(base, fields, target, unchanged, tmp_path):
    try:
        drafts = first_round(target, load(BASES[base].changed(**fields), tmp_path / "d"))
    except ValueError:
        return
    before = unchanged(base)
    assert drafts.shape != before.shape or float((drafts - before).abs().nan_to_num(0.0).max()) > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"num_anchors": 3, "use_cache": False, "initializer_range": 0.5, "attention_dropout": 0.1},
        {"tie_word_embeddings": False, "auto_map": {"AutoModel": "other.Model"}, "transformers_version": "5.8.1"},
        {"eos_token_id": [1, 5], "bos_token_id": 0, "pad_token_id": 2, "max_position_embeddings": 64},
    ],
    ids=str,
)
def test_what_is_not_of_the_forward_changes_nothing_and_is_not_spoken_of(fields, target, unchanged, tmp_path, caplog):
    assert torch.equal(first_round(target, load(BASES[PLAIN].changed(**fields), tmp_path / "d")), unchanged(PLAIN))
    assert "does not know" not in caplog.text


def test_fields_that_no_one_has_judged_are_named_once_and_together(target, unchanged, tmp_path, caplog):
    changed = BASES[PLAIN].changed(dflash_config__new_trick=3, another_trick=True, empty=None)
    assert torch.equal(first_round(target, load(changed, tmp_path / "d")), unchanged(PLAIN))
    said = [record.message for record in caplog.records if "does not know" in record.message]
    assert len(said) == 1 and "`another_trick`, `dflash_config.new_trick`" in said[0] and "config.json" in said[0]


def test_published_fields_are_all_judged(tmp_path, caplog):
    for number, published in enumerate(READ):
        load(published, tmp_path / str(number))
    assert "does not know" not in caplog.text


def test_arguments_of_the_call_go_before_the_file(tmp_path):
    published = BASES[PLAIN].changed(block_size=None)
    assert load(published, tmp_path / "d", block_size=6).config.block_size == 6
    assert load(BASES["DeepSpec DFlash"], tmp_path / "e", first_slot=1).config.first_slot == 1
    assert load(BASES["transformers native"], tmp_path / "f", vocab_size=24).config.vocab_size == 24


def test_what_a_file_says_of_itself_is_kept(tmp_path):
    config = load(BASES["speculators SWA"], tmp_path / "d").config
    assert (config.window_rule, config.causal_layers, config.first_slot) == ("anchor", "sliding", 1)
    config.save_pretrained(tmp_path / "e")
    assert json.loads((tmp_path / "e" / "config.json").read_text())["window_rule"] == "anchor"
