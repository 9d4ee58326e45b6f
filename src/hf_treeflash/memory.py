"""What one call leaves for the next: values kept for their owners, dropped with the first owner that goes."""

import weakref
from typing import Any

import torch

# By what a value is and whose. Ids do not mislead: an entry goes before the id of an owner can be another's.
_kept: dict[tuple, tuple[Any, list[weakref.ref]]] = {}


def remember(what: str, value: Any, *owners: Any) -> None:
    """Keep a value as long as all of its owners live.

    Args:
        what (`str`):
            What the value is; an earlier one of these owners is replaced.
        value (`Any`):
            Holds none of the owners, which could never go otherwise.
        owners (`Any`):
            One or more objects, told apart by identity: models, configs, caches.
    """
    key = (what, *map(id, owners))

    def drop(_: weakref.ref, kept=_kept) -> None:  # at the interpreter's end the module may be gone
        kept.pop(key, None)

    _kept[key] = value, [weakref.ref(owner, drop) for owner in owners]


def recall(what: str, *owners: Any) -> Any:
    """Return what is kept for these owners, or None."""
    value, _ = _kept.get((what, *map(id, owners)), (None, None))
    return value


def stamp(tensor: torch.Tensor) -> tuple:
    """Return what tells a tensor from what it was before it was moved, cast or written to in place."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def take(what: str, *owners: Any) -> Any:
    """Return what is kept for these owners, or None, and keep it no longer."""
    value, _ = _kept.pop((what, *map(id, owners)), (None, None))
    return value


def forget(owner: Any, what: str | None = None) -> None:
    """Drop what calls have kept for a drafter, a target or a cache.

    That is: static caches with compiled models and CUDA graphs, copies of an output layer for drafts, what
    `tree_budget="auto"` has learnt, and what a drafter has read of a conversation. Later calls start afresh; texts are
    the same. All of it goes by itself with the model or the cache it is for.

    Args:
        owner ([`PreTrainedModel`] or [`Cache`]):
            Whose. What is kept for a part of a model goes, too.
        what (`str`, *optional*):
            Only this; everything by default.
    """
    owners = {id(owner), *map(id, getattr(owner, "modules", tuple)())}
    for key in list(_kept):
        if what in (None, key[0]) and owners.intersection(key[1:]):
            _kept.pop(key, None)


def circumstances(model: Any) -> tuple:
    """Return what a model's states depend on besides its weights and inputs: what is kept of them holds only there."""
    device = model.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return model.dtype, model.device, autocast, torch.is_inference_mode_enabled(), repr(model.config.to_dict())


__all__ = ["circumstances", "forget", "recall", "remember", "stamp", "take"]
