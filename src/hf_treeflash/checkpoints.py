"""Reads every published drafter layout into ours: config, tensor names, and a check of both before loading."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_treeflash import TreeFlashConfig
from .knobs import KNOB_DEFAULTS

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Tensors an official TreeFlash file names differently; DFlash files need none of it.
OFFICIAL_NAMES = {
    r"^model\.": "",
    r"^ar_approximation\.ug\.": "ar_head.up_gate_proj.",
    r"^ar_approximation\.d\.": "ar_head.down_proj.",
    r"^ar_approximation\.norm\.": "ar_head.norm.",
}
NATIVE_NAMES = {r"^encoder\.fc\.": "fc.", r"^encoder\.output_norm_enc\.": "hidden_norm."}
# What a speculators file may carry of its verifier; a drafter borrows these from the target instead.
VERIFIER_TENSORS = ("embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "verifier_lm_head.weight")


def resolve_checkpoint(model_class, name: str | os.PathLike, kwargs: dict) -> tuple[dict, GenerationConfig]:
    """Work out how to load a drafter before any weight is read.

    Args:
        model_class (`type`):
            The drafter class, built once on the meta device to know the expected tensors.
        name (`str` or `os.PathLike`):
            Folder or Hub repository; a PEFT adapter's is followed to the drafter it adapts.
        kwargs (`dict`):
            Arguments of `from_pretrained`.

    Returns:
        `tuple[dict, GenerationConfig]`: The arguments to load with (config and tensor names filled in), and the
        drafting knobs stored with the checkpoint.

    Raises:
        ValueError: If the config is of no known layout or incomplete, or a tensor is missing, unexpected or of
            another shape; the message names file, key, expected and found.
        OSError: If there is no config or no safetensors file.
    """
    kwargs = dict(kwargs)
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    name = _adapted_drafter(name, hub)
    stored, _ = PreTrainedConfig.get_config_dict(name, **hub)
    if not stored:
        raise OSError(f"There is no config.json in {name}.")
    values, names = read_config(stored, source=f"{name}/config.json")
    config = kwargs.pop("config", None)
    if not isinstance(config, TreeFlashConfig) and getattr(config, "model_type", None) != "treeflash":
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in TreeFlashConfig.__dataclass_fields__}
        # `dtype` is a field of every config, but here it says how to load, which is for `from_pretrained` to decide.
        kwargs.update({key: overrides.pop(key) for key in ("dtype",) if key in overrides})
        config = TreeFlashConfig(**{**values, **overrides})
    if kwargs.get("state_dict") is None:
        _check_tensors(model_class, config, names, _weight_files(name, kwargs.get("variant"), hub))
    kwargs |= {"config": config, "use_safetensors": True}
    if names:
        kwargs["key_mapping"] = names
    return kwargs, _stored_knobs(name, stored, hub)


def read_config(stored: dict[str, Any], source: str = "config.json") -> tuple[dict[str, Any], dict[str, str]]:
    """Translate a stored config of any layout.

    Args:
        stored (`dict[str, Any]`):
            The parsed `config.json`.
        source (`str`, *optional*):
            How errors name it.

    Returns:
        `tuple[dict, dict]`: Arguments of [`TreeFlashConfig`], and regular expressions that rename its tensors.
    """
    if stored.get("model_type") == "treeflash":
        return {key: value for key, value in stored.items() if key != "model_type"}, {}
    if "speculators_config" in stored or "speculators_model_type" in stored:
        return _read_speculators(stored, source), {}
    if "dflash_config" in stored or "treeflash_config" in stored:
        return _read_dflash(stored, source), OFFICIAL_NAMES
    if "target_layer_ids" in stored:
        return _backbone(stored) | _block(stored, stored, source), NATIVE_NAMES
    raise ValueError(
        f"{source} is of no known drafter layout: expected model_type 'treeflash', a `dflash_config`, a "
        f"`treeflash_config`, a `speculators_config` or top-level `target_layer_ids`, "
        f"found model_type {stored.get('model_type')!r} with none of these."
    )


def _read_dflash(stored: dict, source: str) -> dict:
    treeflash = stored.get("treeflash_config") or {}
    head = treeflash.get("ar_approximation", stored.get("ar_approximation"))
    if head not in (None, "swiglu"):
        raise ValueError(f"{source}: unknown head `ar_approximation`: expected 'swiglu' or null, found {head!r}.")
    return _backbone(stored) | _block(stored.get("dflash_config") or {}, stored, source) | {"ar_head": head}


def _read_speculators(stored: dict, source: str) -> dict:
    layer = stored.get("transformer_layer_config")
    if not layer or stored.get("aux_hidden_state_layer_ids") is None:
        raise ValueError(
            f"{source}: a speculators DFlash config needs `transformer_layer_config` and `aux_hidden_state_layer_ids`."
        )
    draft_vocab = stored.get("draft_vocab_size") or layer["vocab_size"]
    if draft_vocab != layer["vocab_size"]:
        raise ValueError(
            f"{source}: `draft_vocab_size` must equal the target's vocabulary, expected {layer['vocab_size']}, "
            f"found {draft_vocab}: reduced draft vocabularies have an output layer of their own."
        )
    # Speculators number the states from the embedding on, so layer l is entry l + 1.
    taps = [index - 1 for index in stored["aux_hidden_state_layer_ids"]]
    return _backbone(layer) | _block(stored, stored | {"target_layer_ids": taps}, source)


def _backbone(stored: dict) -> dict:
    """Keep what shapes the layers; transformers turns old rope fields into `rope_parameters` itself."""
    fields = set(TreeFlashConfig.__annotations__) | {"rope_theta", "rope_scaling", "dtype"}
    values = {key: stored[key] for key in fields if stored.get(key) is not None}
    values.pop("tie_word_embeddings", None)
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    return values


def _block(nested: dict, stored: dict, source: str) -> dict:
    """Read the block's fields, each either nested or at the top level."""
    block = {key: nested.get(key, stored.get(key)) for key in ("block_size", "mask_token_id", "target_layer_ids")}
    if block["mask_token_id"] is None:
        raise ValueError(
            f"{source}: `mask_token_id` is missing: expected a token id at the top level or in `dflash_config`, "
            f"found none. Add the id the drafter was trained with."
        )
    if block["target_layer_ids"] is None and stored.get("num_target_layers") is None:
        raise ValueError(
            f"{source}: expected `target_layer_ids`, or `num_target_layers` to derive them from, found neither."
        )
    return {key: value for key, value in block.items() if value is not None}


def _adapted_drafter(name: str | os.PathLike, hub: dict) -> str:
    """Return the drafter an adapter folder adapts, or the name itself."""
    path = _find(name, "adapter_config.json", hub)
    if path is None or _find(name, "config.json", hub) is not None:
        return os.fspath(name)
    with open(path, encoding="utf-8") as file:
        return json.load(file)["base_model_name_or_path"]


def _find(name: str | os.PathLike, filename: str, hub: dict) -> str | None:
    return cached_file(
        os.fspath(name),
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )


def _weight_files(name: str, variant: str | None, hub: dict) -> list[str]:
    def with_variant(filename: str) -> str:
        stem, _, suffix = filename.partition(".")
        return f"{stem}.{variant}.{suffix}" if variant else filename

    single = _find(name, with_variant(SAFE_WEIGHTS_NAME), hub)
    if single is not None:
        return [single]
    index = _find(name, with_variant(SAFE_WEIGHTS_INDEX_NAME), hub)
    if index is not None:
        return get_checkpoint_shard_files(name, index, **hub)[0]
    raise OSError(
        f"{name} has no {with_variant(SAFE_WEIGHTS_NAME)}. Drafters are read from safetensors only; convert a pickle "
        "checkpoint with `safetensors.torch.save_file` first."
    )


def _check_tensors(model_class, config: TreeFlashConfig, names: dict[str, str], files: list[str]) -> None:
    """Compare the file's tensors with the model's; only a whole head may be missing (it starts at zero)."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in model_class(config).state_dict().items()}
    found = {}
    for path, key, shape in _tensor_shapes(files):
        renamed = key
        for pattern, replacement in names.items():
            renamed = re.sub(pattern, replacement, renamed)
        if renamed in VERIFIER_TENSORS:
            continue
        if renamed not in expected:
            hint = " The config names no head." if renamed.startswith("ar_head.") else ""
            raise ValueError(f"{path}: unexpected tensor {key!r} of shape {shape}.{hint}")
        if shape != expected[renamed]:
            raise ValueError(
                f"{path}: tensor {key!r} has the wrong shape: expected {expected[renamed]}, found {shape}."
            )
        found[renamed] = shape
    missing = sorted(set(expected) - set(found))
    fresh_head = [key for key in expected if key.startswith("ar_head.")]
    if missing and missing != sorted(fresh_head):
        raise ValueError(
            f"{', '.join(files)}: tensor {missing[0]!r} is missing: expected shape {expected[missing[0]]}, found none"
            + (f" ({len(missing)} tensors are missing)." if len(missing) > 1 else ".")
        )


def _tensor_shapes(files: list[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():
                yield path, key, tuple(tensors.get_slice(key).get_shape())


def _stored_knobs(name: str, stored: dict, hub: dict) -> GenerationConfig:
    if _find(name, "generation_config.json", hub) is not None:
        knobs = GenerationConfig.from_pretrained(name, **hub)
    else:
        knobs = GenerationConfig()
    defaults = dict(KNOB_DEFAULTS)
    budget = (stored.get("treeflash_config") or {}).get("candidate_tokens", stored.get("candidate_tokens"))
    if budget is not None:
        defaults["tree_budget"] = budget
    for knob, value in defaults.items():
        if not hasattr(knobs, knob):
            setattr(knobs, knob, value)
    return knobs


__all__ = ["read_config", "resolve_checkpoint"]
