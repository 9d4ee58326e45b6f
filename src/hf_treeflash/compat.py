"""What the supported releases of transformers call by different names."""

import inspect

from transformers import GenerationMixin

_PREPARES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# The keys and values of a text, in a model's inputs and outputs and among the inputs `generate` carries along.
CACHE = "cache" if "cache" in _PREPARES else "past_key_values"

__all__ = ["CACHE"]
