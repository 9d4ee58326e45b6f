"""What may be given as `assistant_model`: a drafter, wrapped or by name; others are told which loader they need."""

import importlib
import os
from typing import Any

from torch import nn

from .memory import recall, remember

# What a checkpoint's config says of drafters that none of transformers' own classes reads.
DRAFTER_CONFIGS = ("dflash_config", "treeflash_config", "speculators_config")


def is_drafter(assistant) -> bool:
    """Whether an assistant is a drafter of ours: by its config, as its class may be loaded from a repository."""
    return getattr(getattr(assistant, "config", None), "model_type", None) == "treeflash"


def drafter_behind(assistant: Any, target) -> Any:
    """Return the drafter behind what a call was given: loaded, if it is named, and without a wrapper of training.

    Args:
        assistant (`Any`):
            A model, a folder or the name of a repository; whatever else it is comes back as it is.
        target ([`PreTrainedModel`]):
            Keeps a drafter that was loaded for it.

    Raises:
        ValueError: If it was made of a drafter's checkpoint by a class that does not read it.
        OSError: If a name leads nowhere.
    """
    if isinstance(assistant, nn.parallel.DistributedDataParallel | nn.DataParallel) and is_drafter(assistant.module):
        return assistant.module
    if isinstance(assistant, str | os.PathLike):
        return loaded(os.fspath(assistant), target)
    config = getattr(assistant, "config", None)
    if type(assistant).__module__.startswith("transformers.models.") and any(
        getattr(config, name, None) is not None for name in DRAFTER_CONFIGS
    ):
        name = getattr(config, "_name_or_path", "") or "..."
        raise ValueError(
            f"The assistant is a drafter's checkpoint in the class {type(assistant).__name__}, which reads nothing of "
            f"what makes it one. Load it with `hf_treeflash.TreeFlashDraftModel.from_pretrained({name!r})`."
        )
    return assistant


def loaded(name: str, target) -> Any:
    """Return a named drafter in a target's dtype and on its device, kept for later calls on this target."""
    what = f"drafter {name}"
    drafter = recall(what, target)
    if drafter is None:
        try:
            drafter_class = importlib.import_module("hf_treeflash.modeling_treeflash").TreeFlashDraftModel
        except ImportError as error:
            raise ValueError(f"To load the drafter {name!r} by its name takes the hf_treeflash package.") from error
        drafter = drafter_class.from_pretrained(name, dtype=target.dtype).to(target.device)
        remember(what, drafter, target)
    return drafter


def drafter_of_pipeline(assistant: Any, target) -> Any:
    """Return the drafter behind what a pipeline was given; None where it is no drafter of ours.

    A pipeline asks other assistants for a tokenizer, to compare special tokens with the target's; a drafter has none.
    """
    if assistant is None or (isinstance(assistant, str) and not names_drafter(assistant)):
        return None
    drafter = drafter_behind(assistant, target)
    return drafter if is_drafter(drafter) else None


def names_drafter(name: str) -> bool:
    """Whether a folder or repository holds a drafter in a layout that we read."""
    try:
        checkpoints = importlib.import_module("hf_treeflash.checkpoints")
        path = checkpoints.find_file(checkpoints.adapted_drafter(name, {}), "config.json", {})
        stored = {} if path is None else checkpoints.read_json(path)
    except (ImportError, OSError, ValueError):
        return False
    return stored.get("model_type") == "treeflash" or any(
        key in stored for key in (*DRAFTER_CONFIGS, "target_layer_ids")
    )


__all__ = ["drafter_behind", "drafter_of_pipeline", "is_drafter"]
