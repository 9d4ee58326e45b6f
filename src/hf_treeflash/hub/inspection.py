"""What a drafter is and how it is run, and whether it fits a target: from its config and tensor headers alone."""

import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, get_safetensors_metadata
from transformers import AutoConfig, AutoModelForCausalLM

from ..bench.surroundings import warnings_of
from ..checkpoints import (
    StoredTensor,
    adapted_drafter,
    check_extra_files,
    check_tensors,
    find_file,
    make_config,
    read_json,
    stored_knobs,
    stored_tensors,
    weight_files,
)
from ..configuration_treeflash import TreeFlashConfig
from ..knobs import KNOB_DEFAULTS
from ..layouts import PASSED_OVER, Layout, read_layout
from ..modeling_treeflash import TreeFlashDraftModel
from ..validation import check_family, check_pair

# Fields of a config that say how large a drafter is; the others say how it is run.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_target_layers",
)
NOT_OF_THE_FORWARD = (
    "initializer_range",
    "attention_dropout",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Shown even where they are at their defaults.
ALWAYS = ("block_size", "first_slot", "target_layer_ids", "mask_token_id", "causal_layers", "ar_head")
LICENCES = re.compile(r"(?i)(licen[cs]e|copying|notice)([.-].*)?")


def inspect_drafter(name: str, target: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Look at a drafter of any layout without loading a weight.

    Args:
        name (`str`):
            Folder or Hub repository; of the latter only small files and the headers of tensors are fetched.
        target (`str`, *optional*):
            Folder or Hub repository of a target, of which the config is read.
        revision (`str`, *optional*):
            Of the drafter.

    Returns:
        `dict`: Plain data: `source`; `layout`, what it is in words; `read`, and `refusal`, the reason where it is
        not; `warnings`; `forward`, how it is run; `sizes`; `knobs`; `about`, what its repository says; with a target
        also `fits`.

    Raises:
        OSError: If there is no config, or no safetensors file.
        ValueError: If the config is no dictionary.
    """
    hub = {} if revision is None else {"revision": revision}
    base = adapted_drafter(name, hub)
    path = find_file(base, "config.json", hub)
    if path is None:
        raise OSError(f"{base} has no config.json, or cannot be reached.")
    stored, tensors = read_json(path), headers(base, revision)
    found: dict[str, Any] = {"source": name, "layout": "unknown", "read": False, "refusal": None}
    config = layout = None
    with warnings_of("hf_treeflash.stored_fields") as warnings:
        try:
            layout = read_layout(stored, f"{base}/config.json")
            found["layout"] = layout.description
            config = make_config(layout.values, f"{base}/config.json")
            check_tensors(TreeFlashDraftModel, config, layout, tensors, fresh_head=False)
            check_extra_files(base, layout, hub)
            knobs = stored_knobs(base, stored, hub)
            found |= {"read": True, "knobs": {knob: getattr(knobs, knob) for knob in KNOB_DEFAULTS}}
        except ValueError as error:
            found["refusal"] = str(error)
            if layout is None and (what := re.search(r"this is (.+?)(?:: |\. |, whose|, which)", str(error))):
                found["layout"] = what[1]
    found |= {"warnings": warnings, "forward": forward(config), "sizes": sizes(config, layout, tensors)}
    found = {"knobs": {}, **found, "about": about(base, stored, hub)}
    if base != name:
        found["about"]["adapter of"] = base
    if target is not None:
        found["fits"] = fits(config, target)
    return found


def headers(name: str, revision: str | None) -> list[StoredTensor]:
    """Return the headers of all tensors: from files that are here, else of the repository's without its weights."""
    hub = {} if revision is None else {"revision": revision}
    if Path(name).is_dir():
        return list(stored_tensors(weight_files(name, None, {})))
    try:
        return list(stored_tensors(weight_files(name, None, {**hub, "local_files_only": True})))
    except OSError:
        stored = get_safetensors_metadata(name, revision=revision)
    return [
        StoredTensor(f"{name}/{file}", tensor, tuple(header.shape), str(header.dtype))
        for file, metadata in stored.files_metadata.items()
        for tensor, header in metadata.tensors.items()
    ]


def forward(config: TreeFlashConfig | None) -> dict[str, Any]:
    """Return how a drafter is run: each field of its config that shapes a pass, and is not at its default."""
    if config is None:
        return {}
    names = [name for name in TreeFlashConfig.__annotations__ if name not in (*SIZES, *NOT_OF_THE_FORWARD)]
    shown = [*ALWAYS, *(name for name in names if name not in ALWAYS and is_special(config, name))]
    return {"tokens drafted per pass": config.num_drafted} | {name: getattr(config, name) for name in shown}


def is_special(config: TreeFlashConfig, name: str) -> bool:
    """Whether a field of a config says more than its default does."""
    value = getattr(config, name)
    if name == "layer_types":
        return len(set(value)) > 1 or "sliding_attention" in value
    if name == "window_rule":
        return "sliding_attention" in (config.layer_types or ())
    return value is not None and value != getattr(TreeFlashConfig, name, None)


def sizes(config: TreeFlashConfig | None, layout: Layout | None, tensors: list[StoredTensor]) -> dict[str, Any]:
    """Return how large a drafter is, all of it and by part, and what its file carries beside it."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        name = tensor.name
        for pattern, replacement in (layout.names if layout else {}).items():
            name = re.sub(pattern, replacement, name)
        part = "carried, not read" if name in PASSED_OVER else name.partition(".")[0]
        counts[part] += math.prod(tensor.shape)
    carried = counts.pop("carried, not read", 0)
    found: dict[str, Any] = {"parameters": counts.total(), "by part": dict(counts.most_common())}
    if carried:
        found["carried, not read"] = carried
    found["stored as"] = sorted({tensor.dtype for tensor in tensors})
    if config is not None:
        found |= {name: value for name in SIZES if (value := getattr(config, name)) is not None}
    return found


def about(name: str, stored: dict[str, Any], hub: dict[str, Any]) -> dict[str, Any]:
    """Return what a repository says of itself: its target, its licence, the class it was made with."""
    found: dict[str, Any] = {}
    if classes := stored.get("architectures"):
        found["architectures"] = classes
    verifier = (stored.get("speculators_config") or {}).get("verifier") or {}
    if verifier.get("name_or_path"):
        found["made for"] = verifier["name_or_path"]
    if (card := find_file(name, "README.md", hub)) is not None:
        try:
            data = ModelCard.load(card).data.to_dict()
        except ValueError:  # of a head that is no YAML
            data = {}
        found |= {"made for": data["base_model"]} if data.get("base_model") else {}
        found |= {"licence by its card": data["license"]} if data.get("license") else {}
    found["licence file"] = [file for file in files_of(name, hub) if LICENCES.fullmatch(file)] or None
    return found


def files_of(name: str, hub: dict[str, Any]) -> list[str]:
    """List the files of a folder or a repository; of one that cannot be reached those that are here."""
    if Path(name).is_dir():
        return sorted(path.name for path in Path(name).iterdir())
    try:
        return sorted(HfApi().list_repo_files(name, **hub))
    except Exception:  # of the network, the Hub or its offline mode
        path = find_file(name, "config.json", hub)
        return [] if path is None else sorted(entry.name for entry in Path(path).parent.iterdir())


def fits(config: TreeFlashConfig | None, target: str) -> dict[str, Any]:
    """Say whether a drafter fits a target, whose layers are built without weights from its config."""
    found: dict[str, Any] = {"target": target, "fits": False, "reason": "the drafter is not read"}
    if config is None:
        return found
    target_config = AutoConfig.from_pretrained(target)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(target_config)
    try:
        check_family(model)
        check_pair(model, SimpleNamespace(config=config))
    except ValueError as error:
        return found | {"reason": str(error)}
    return found | {"fits": True, "reason": None}


__all__ = ["inspect_drafter"]
