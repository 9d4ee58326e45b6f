"""Which layers targets may have; recurrent ones need the whole package, a repository's files know attention only."""

import importlib
from types import ModuleType

from torch import nn

from .protocols import Target
from .states import STATEFUL

# Experts and MLPs alone, as some hybrids have them, keep nothing of a text.
MEMORYLESS = {"moe", "mlp"}
SUPPORTED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"} | STATEFUL | MEMORYLESS
INDEXED = "attend to what a learned index chooses among all columns, where a tree's mask does not reach"
WHY_NOT = {
    "indexed_attention": INDEXED,
    "deepseek_sparse_attention": INDEXED,
    "qwen_sparse_attention": INDEXED,
    "hybrid_sliding": "keep several convolutions each, whose columns are not told apart here",
}


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


def check_layers(target: Target, config) -> None:
    """Refuse kinds of layers from which the rejected tokens of a tree cannot be taken back.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        config ([`PreTrainedConfig`]):
            Of its text decoder.

    Raises:
        ValueError: Naming the first such layer, the reason and what works.
    """
    name, kinds = type(target).__name__, list(getattr(config, "layer_types", None) or ())
    works = "Full, sliding-window and chunked attention work, and the recurrent layers that the README names."
    for place, kind in enumerate(kinds):
        if kind not in SUPPORTED_LAYERS:
            why = WHY_NOT.get(kind, "are of a kind that is not known here")
            raise ValueError(f"{name} has {kind!r} layers (the first is layer {place}), which {why}. {works}")
    if kinds and not set(kinds) - {"linear_attention", "conv"} - MEMORYLESS:
        raise ValueError(
            f"{name} has {kinds[0]!r} layers only (from layer 0 on), which do not count the tokens they have read, so "
            f"that the nodes of a tree would have no place in the text. Hybrids with attention work."
        )
    if not kinds and getattr(target, "_is_stateful", False):
        lists = [module for module in target.get_decoder().modules() if isinstance(module, nn.ModuleList)]
        layer = type(lists[0][0]).__name__ if lists else "its decoder"
        raise ValueError(
            f"Layer 0 of {name} ({layer}) keeps a state in a way that is not known here, so that the rejected tokens "
            f"of a tree could not be kept out of it. {works}"
        )
    if (recurrent := recurrent_layers(config)) is not None:
        recurrent.check_mixers(target)


__all__ = ["check_layers", "recurrent_layers"]
