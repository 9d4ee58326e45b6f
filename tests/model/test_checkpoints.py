"""Every published layout is read into ours; what does not fit is refused by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_treeflash import TreeFlashDraftModel
from tests.helpers.tiny import tiny_drafter


def dflash_config(config, **extra):
    """Write our config in the vocabulary of published DFlash files."""
    return {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},  # names a file that must never be needed
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **{
            key: getattr(config, key)
            for key in (
                "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
                "head_dim max_position_embeddings rms_norm_eps layer_types num_target_layers block_size"
            ).split()
        },
        **extra,
    }


def write(folder, config, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})
    return folder


def official_names(tensors):
    names = {"ar_head.up_gate_proj": "ar_approximation.ug", "ar_head.down_proj": "ar_approximation.d"}
    names["ar_head.norm"] = "ar_approximation.norm"

    def rename(key):
        for ours, theirs in names.items():
            if key.startswith(ours):
                return key.replace(ours, theirs)
        return f"model.{key}"

    return {rename(key): value for key, value in tensors.items()}


def layouts(drafter):
    """Yield (layout, config, tensors) for every layout that can hold the drafter."""
    config, tensors = drafter.config, dict(drafter.state_dict())
    taps = {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids}
    if config.ar_head:
        head = {"treeflash_config": {"ar_approximation": "swiglu", "candidate_tokens": 24}}
        yield "official", dflash_config(config, dflash_config=taps, **head), official_names(tensors)
        return
    yield "dflash", dflash_config(config, dflash_config=taps), tensors
    nested = dflash_config(config, dflash_config={**taps, "block_size": config.block_size})
    nested.pop("block_size")
    yield "dflash, nested block size", nested, tensors
    native = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    flat = {**dflash_config(config, **taps), "model_type": "muse_glimmer_assistant"}
    yield "native", flat, {native.get(key, key): value for key, value in tensors.items()}
    speculators = {
        "speculators_model_type": "dflash",
        "speculators_config": {"algorithm": "dflash"},
        "transformer_layer_config": dflash_config(config),
        "draft_vocab_size": config.vocab_size,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "block_size": config.block_size,
    }
    carried = {"embed_tokens.weight": torch.zeros(config.vocab_size, config.hidden_size)}
    yield "speculators", speculators, {**tensors, **carried}


@pytest.mark.parametrize("head", [True, False])
def test_every_layout_gives_the_same_drafter(head, tmp_path):
    drafter = tiny_drafter(head, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    drafter.save_pretrained(tmp_path / "ours")
    folders = {"ours": tmp_path / "ours"}
    for name, config, tensors in layouts(drafter):
        folders[name] = write(tmp_path / name, config, tensors)
    for name, folder in folders.items():
        loaded = TreeFlashDraftModel.from_pretrained(folder, dtype=torch.float32)
        assert loaded.config.ar_head == drafter.config.ar_head, name
        assert loaded.config.target_layer_ids == [0, 2] and loaded.config.block_size == 8
        for key, value in drafter.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), (name, key)
        assert loaded.rotary_emb.inv_freq.equal(drafter.rotary_emb.inv_freq)
    if head:
        assert TreeFlashDraftModel.from_pretrained(folders["official"]).generation_config.tree_budget == 24


def test_saving_writes_our_layout_and_round_trips_bit_for_bit(tmp_path):
    drafter = tiny_drafter()
    _, config, tensors = next(layouts(drafter))
    loaded = TreeFlashDraftModel.from_pretrained(write(tmp_path / "official", config, tensors))
    loaded.generation_config.tree_budget = 40
    loaded.save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(again) is TreeFlashDraftModel
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(drafter.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(drafter.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert again.generation_config.tree_budget == 40
    assert again.config.to_diff_dict() == loaded.config.to_diff_dict()


def test_default_taps_follow_the_dflash_rule(tmp_path):
    drafter = tiny_drafter(False, target_layer_ids=None, num_target_layers=12, num_hidden_layers=3)
    assert drafter.config.target_layer_ids == [1, 5, 9]
    config = dflash_config(drafter.config, dflash_config={"mask_token_id": 3})
    loaded = TreeFlashDraftModel.from_pretrained(write(tmp_path / "d", config, drafter.state_dict()))
    assert loaded.config.target_layer_ids == [1, 5, 9]
    assert tiny_drafter(False, target_layer_ids=None, num_hidden_layers=1).config.target_layer_ids == [2]


def test_loading_arguments_behave_as_in_transformers(tmp_path):
    drafter = tiny_drafter()
    _, config, tensors = next(layouts(drafter))
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo" / "sub", config, tensors)
    loaded = TreeFlashDraftModel.from_pretrained(
        tmp_path / "repo", subfolder="sub", dtype=torch.bfloat16, device_map="cpu"
    )
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    loaded, info = TreeFlashDraftModel.from_pretrained(tmp_path / "repo" / "sub", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(OSError):
        TreeFlashDraftModel.from_pretrained("no-such-owner/no-such-drafter")


def test_sharded_checkpoints_are_read(tmp_path):
    drafter = tiny_drafter()
    drafter.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    loaded = TreeFlashDraftModel.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in drafter.state_dict().items())


def test_a_fresh_head_on_a_dflash_file_is_exactly_zero(tmp_path):
    _, config, tensors = next(layouts(tiny_drafter(False)))
    folder = write(tmp_path / "d", config, tensors)
    loaded = TreeFlashDraftModel.from_pretrained(folder, ar_head="swiglu")
    assert loaded.ar_head.down_proj.weight.count_nonzero() == 0
    assert loaded.ar_head.up_gate_proj.weight.count_nonzero() > 0
    fresh = tiny_drafter(head=False, ar_head="swiglu")
    assert fresh.ar_head.down_proj.weight.count_nonzero() == 0


def broken(drafter, case):
    _, config, tensors = next(layouts(drafter))
    head = config["treeflash_config"]
    key = "model.layers.1.self_attn.q_proj.weight"
    if case == "missing":
        del tensors[key]
    elif case == "unexpected":
        tensors["model.surprise"] = torch.zeros(2)
    elif case == "shape":
        tensors[key] = torch.zeros(3, 5)
    elif case == "half a head":
        del tensors["ar_approximation.d.weight"]
    elif case == "unknown head":
        head["ar_approximation"] = "linear"
    elif case == "head not in config":
        del config["treeflash_config"]
    elif case == "no mask token":
        del config["dflash_config"]["mask_token_id"]
    elif case == "no taps":
        del config["dflash_config"]["target_layer_ids"], config["num_target_layers"]
    elif case == "not a drafter":
        del config["dflash_config"], config["treeflash_config"]
    return config, tensors


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"model\.safetensors.*layers\.1\.self_attn\.q_proj\.weight.* missing: expected shape \(32, 32\)"),
        (
            "unexpected",
            r"model\.safetensors: this is an official TreeFlash .*no tensor 'model\.surprise'.*\(2,\)",
        ),
        ("shape", r"model\.safetensors: tensor .*q_proj.* has the wrong shape: expected \(32, 32\), found \(3, 5\)"),
        ("half a head", r"'ar_head\.down_proj\.weight' is missing"),
        (
            "unknown head",
            r"config\.json: this is .*`ar_approximation`: expected 'swiglu' or null, found 'linear'",
        ),
        ("head not in config", r"this is a DFlash drafter with a TreeFlash head, which the config does not name"),
        ("no mask token", r"config\.json: this is an official TreeFlash drafter: `mask_token_id` is missing"),
        ("no taps", r"config\.json: .*`target_layer_ids` is missing: expected .*, or `num_target_layers`"),
        ("not a drafter", r"config\.json: this is of no known drafter layout: .*found model_type 'qwen3'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(case, message, tmp_path):
    config, tensors = broken(tiny_drafter(), case)
    folder = write(tmp_path / "broken", config, tensors)
    with pytest.raises(ValueError, match=re.compile(message, re.S)):
        TreeFlashDraftModel.from_pretrained(folder)


def test_pickle_only_checkpoints_are_refused(tmp_path):
    drafter = tiny_drafter()
    _, config, tensors = next(layouts(drafter))
    folder = write(tmp_path / "p", config, tensors)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no model\.safetensors.*safetensors only"):
        TreeFlashDraftModel.from_pretrained(folder)
