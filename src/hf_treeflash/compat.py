"""What depends on the installation: names that releases of transformers disagree on, and our own kernels."""

import importlib
import inspect
from typing import Any

import torch
from transformers import GenerationMixin

_PREPARES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# The keys and values of a text, in a model's inputs and outputs and among the inputs `generate` carries along.
CACHE = "cache" if "cache" in _PREPARES else "past_key_values"

kernels: Any = None
try:  # code loaded from a repository, without this package, does without its kernels
    kernels = importlib.import_module("hf_treeflash.kernels")
except ImportError:
    pass


def on_cpu(device: torch.device) -> bool:
    """Whether work on a device is done by the host itself, which others only launch it on."""
    return device.type == "cpu"


__all__ = ["CACHE", "kernels", "on_cpu"]
