"""Reads a drafter's checkpoint in any published layout, and checks config and tensors before a weight is loaded."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_treeflash import TreeFlashConfig
from .knobs import KNOB_DEFAULTS, DraftingKnobs
from .layouts import PASSED_OVER, Layout, read_layout

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
FLOATS = {"F64", "F32", "F16", "BF16"}
# What tensors that we do not expect are, by a part of their name.
FOREIGN_TENSORS = {
    "attention_sink": "attention sinks",
    "sinks": "attention sinks",
    "d2t": "a reduced vocabulary, which the config does not name",
    "joint_proj": "a DSpark head with a state",
    "markov": "a DSpark Markov head, which the config does not name",
    "prefix_gru": "a Domino head",
    "embed_proj": "a Domino head",
    "_conv.": "DFlash-2's convolutions, which the config does not name",
    "selector": "DFlash-2's selector, which the config does not name",
    "mask_hidden": "P-EAGLE's mask state",
    "qkv_proj": "fused projections (Laguna)",
    "g_proj": "gated attention (Laguna)",
    "aux_hidden_norm": "a norm per target layer (Laguna)",
    "feedforward_layernorm": "Gemma's norms around the feed-forward layer",
    "scale": "quantised weights",
    "packed": "quantised weights",
    "qweight": "quantised weights",
    "ar_approximation": "a TreeFlash head, which the config does not name",
    "ar_head": "a head, which the config does not name",
}


class StoredTensor(NamedTuple):
    """The header of one tensor of a file."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str


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
    name = adapted_drafter(name, hub)
    source = f"{name}/config.json"
    path = cached_file(name, "config.json", **hub)
    if path is None:
        raise OSError(f"There is no config.json in {name}.")
    stored = read_json(path)
    config = kwargs.pop("config", None)
    ours = isinstance(config, TreeFlashConfig) or getattr(config, "model_type", None) == "treeflash"
    given = {} if ours else {key: kwargs.pop(key) for key in list(kwargs) if key in TreeFlashConfig.__annotations__}
    layout = read_layout(stored, source, given)
    if not ours:
        config = make_config({**layout.values, **given}, source)
    if kwargs.get("state_dict") is None:
        tensors = list(stored_tensors(weight_files(name, kwargs.get("variant"), hub)))
        check_tensors(model_class, config, layout, tensors, fresh_head=ours or "ar_head" in given)
        check_extra_files(name, layout, hub)
    kwargs |= {"config": config, "use_safetensors": True}
    if layout.names:
        kwargs["key_mapping"] = layout.names
    return kwargs, stored_knobs(name, stored, hub)


def read_json(path: str) -> dict[str, Any]:
    """Return the dictionary that a JSON file holds.

    Raises:
        ValueError: If it holds something else.
        OSError: If it is no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
    except ValueError as error:
        raise OSError(f"{path} is no sound JSON file: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: expected a dictionary, found {stored!r}.")
    return stored


def make_config(values: dict[str, Any], source: str) -> TreeFlashConfig:
    """Build the config, naming the file where it refuses a value."""
    try:
        return TreeFlashConfig(**values)
    except StrictDataclassError as error:
        field = re.search(r"field '(\w+)'", str(error))
        raise ValueError(f"{source}: `{field and field[1]}`: {error.__cause__ or error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def adapted_drafter(name: str | os.PathLike, hub: dict) -> str:
    """Return the drafter an adapter folder adapts, or the name itself."""
    path = find_file(name, "adapter_config.json", hub)
    if path is None or find_file(name, "config.json", hub) is not None:
        return os.fspath(name)
    return read_json(path)["base_model_name_or_path"]


def find_file(name: str | os.PathLike, filename: str, hub: dict) -> str | None:
    return cached_file(
        os.fspath(name),
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )


def weight_files(name: str, variant: str | None, hub: dict) -> list[str]:
    def with_variant(filename: str) -> str:
        stem, _, suffix = filename.partition(".")
        return f"{stem}.{variant}.{suffix}" if variant else filename

    single = find_file(name, with_variant(SAFE_WEIGHTS_NAME), hub)
    if single is not None:
        return [single]
    index = find_file(name, with_variant(SAFE_WEIGHTS_INDEX_NAME), hub)
    if index is not None:
        return get_checkpoint_shard_files(name, index, **hub)[0]
    raise OSError(
        f"{name} has no {with_variant(SAFE_WEIGHTS_NAME)}. Drafters are read from safetensors only; convert a pickle "
        "checkpoint with `safetensors.torch.save_file` first."
    )


def check_tensors(
    model_class, config: TreeFlashConfig, layout: Layout, tensors: list[StoredTensor], fresh_head: bool
) -> None:
    """Compare the file's tensors with the model's; only a whole head that was asked for may be missing."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in model_class(config).state_dict().items()}
    found = set()
    for tensor in tensors:
        renamed = tensor.name
        for pattern, replacement in layout.names.items():
            renamed = re.sub(pattern, replacement, renamed)
        if renamed in expected:
            _check_tensor(tensor, expected[renamed], layout, counts=renamed == "d2t")
            found.add(renamed)
        elif renamed not in PASSED_OVER:
            what = next((what for part, what in FOREIGN_TENSORS.items() if part in tensor.name), None)
            raise ValueError(
                f"{tensor.file}: this is {layout.description} with {what or 'tensors of its own'}, which hf_treeflash "
                f"does not read: expected no tensor {tensor.name!r}, found one of shape {tensor.shape}."
            )
    missing = sorted(set(expected) - found)
    head = sorted(key for key in expected if key.startswith("ar_head."))
    if missing and not (fresh_head and missing == head):
        files = ", ".join(dict.fromkeys(tensor.file for tensor in tensors))
        raise ValueError(
            f"{files}: this is {layout.description}, but tensor {missing[0]!r} is missing: expected shape "
            f"{expected[missing[0]]}, found none"
            + (f" ({len(missing)} tensors are missing)." if len(missing) > 1 else ".")
        )


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...], layout: Layout, counts: bool) -> None:
    """Refuse a tensor of another shape, or whose numbers are no plain floating-point ones."""
    kinds = {"I64", "I32"} if counts else FLOATS
    if tensor.dtype not in kinds:
        raise ValueError(
            f"{tensor.file}: this is {layout.description} with quantised weights, which must be dequantised first: "
            f"tensor {tensor.name!r}: expected one of {', '.join(sorted(kinds))}, found {tensor.dtype}."
        )
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r} has the wrong shape: expected {shape}, found {tensor.shape}. This "
            f"is {layout.description}."
        )


def check_extra_files(name: str, layout: Layout, hub: dict) -> None:
    """Refuse a repository that holds part of its drafter outside its tensors."""
    if find_file(name, "mask_embedding.pt", hub) is not None:
        raise ValueError(
            f"{name}/mask_embedding.pt: this is {layout.description} with a mask embedding of its own, which "
            "hf_treeflash does not read: expected no such file."
        )


def stored_tensors(files: list[str]) -> Iterator[StoredTensor]:
    """Yield the headers of all tensors of some safetensors files."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for key in tensors.keys():
                    header = tensors.get_slice(key)
                    yield StoredTensor(path, key, tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise OSError(f"{path} is no sound safetensors file: {error}") from error


def stored_knobs(name: str, stored: dict, hub: dict) -> GenerationConfig:
    """Return the drafting knobs of a checkpoint, each within its range, and defaults for those it does not have."""
    path = find_file(name, "generation_config.json", hub)
    knobs = GenerationConfig() if path is None else GenerationConfig.from_dict(read_json(path))
    defaults = dict(KNOB_DEFAULTS)
    budget = (stored.get("treeflash_config") or {}).get("candidate_tokens", stored.get("candidate_tokens"))
    if budget is not None:
        defaults["tree_budget"] = budget
    for knob, value in defaults.items():
        if not hasattr(knobs, knob):
            setattr(knobs, knob, value)
    try:
        DraftingKnobs.read(knobs)
    except ValueError as error:
        raise ValueError(f"{path or f'{name}/config.json'}: {error}") from error
    return knobs


__all__ = ["resolve_checkpoint"]
