"""Targets with recurrent layers, which need the whole package: only attention works from a repository's files."""

import importlib
from types import ModuleType

from .states import STATEFUL


def recurrent_layers(config) -> ModuleType | None:
    """Return how recurrent layers run over trees; None for a model without any.

    Args:
        config ([`PreTrainedConfig`]):
            Of the model's text decoder.

    Raises:
        ValueError: If only the files of a repository are at hand.
    """
    if not STATEFUL.intersection(getattr(config, "layer_types", None) or ()):
        return None
    try:
        return importlib.import_module("hf_treeflash.recurrent")
    except ImportError as error:
        raise ValueError("Drafting for a target with recurrent layers needs the hf_treeflash package.") from error


__all__ = ["recurrent_layers"]
