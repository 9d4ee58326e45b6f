"""What depends on the installation: names that releases of transformers disagree on, and our own kernels."""

import importlib
import inspect
from types import ModuleType
from typing import Any

from transformers import GenerationMixin

_PREPARES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# The keys and values of a text, in a model's inputs and outputs and among the inputs `generate` carries along.
CACHE = "cache" if "cache" in _PREPARES else "past_key_values"

kernels: Any = None
try:  # code loaded from a repository, without this package, does without its kernels
    kernels = importlib.import_module("hf_treeflash.kernels")
except ImportError:
    pass


def recurrent_layers(config) -> ModuleType | None:
    """Return how recurrent layers run over trees; None for a model without any.

    Args:
        config ([`PreTrainedConfig`]):
            Of the model's text decoder.

    Raises:
        ValueError: If only the files of a repository are at hand.
    """
    if not {"linear_attention", "conv", "hybrid"}.intersection(getattr(config, "layer_types", None) or ()):
        return None
    try:
        return importlib.import_module("hf_treeflash.recurrent")
    except ImportError as error:
        raise ValueError("Drafting for a target with recurrent layers needs the hf_treeflash package.") from error


__all__ = ["CACHE", "kernels", "recurrent_layers"]
