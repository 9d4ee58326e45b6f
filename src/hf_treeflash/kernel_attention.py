"""Passes through the tree attention kernel: which models take it, and what such a pass is told."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .attention import attention_windows, chosen_attention, replaced_attention
from .cache import PrefixCache
from .compat import kernels


def fits_kernel(model, shapes: list[tuple[int, int, int]], like: torch.Tensor) -> bool:
    """Return whether the kernel can run in a model's layers.

    Args:
        model ([`PreTrainedModel`]):
            The target or the drafter.
        shapes (`list[tuple[int, int, int]]`):
            For each layer its key/value heads and the sizes of a key and of a value.
        like (`torch.Tensor`):
            A tensor on their device.
    """
    supported = model._supports_attention_backend and not model.training
    if kernels is None or not supported:
        return False
    return all(key == value and kernels.is_tileable(key) for _, key, value in shapes) and kernels.use_triton(like)


@contextmanager
def kernel_attention(config) -> Iterator[None]:
    """Let a model run with the kernel as its attention, and restore its own."""
    # Not of the package itself, so that code loaded from a repository does without.
    interface = importlib.import_module("hf_treeflash.kernels.attention_interface")
    with replaced_attention(config, interface.register_tree_attention()):
        yield


class PrefixAttention:
    """Tells whether the passes of a model over a growing cache run through the kernel, and with which arguments.

    They do where every layer sees all of the text and nothing but its columns: no windows, no soft-caps, no attention
    of the user's choice that gives weights.

    Args:
        model ([`PreTrainedModel`]):
            The target or the drafter.
        shapes (`list[tuple[int, int, int]]`, *optional*):
            See [`fits_kernel`]; those of the cache by default, once it has been written to.

    Attributes:
        runs (`bool`, *optional*):
            Whether the kernel fits; None until the first pass shows the cache.
    """

    def __init__(self, model, shapes: list[tuple[int, int, int]] | None = None):
        self.model, self.shapes = model, shapes
        self.config = model.config.get_text_config(decoder=True)
        self.runs: bool | None = None
        self._arrivals: torch.Tensor | None = None

    def arguments(self, prefix: PrefixCache, before: int, words: torch.Tensor) -> dict | None:
        """Return the keyword arguments of a pass that take the place of masks; None if it needs masks.

        Args:
            prefix ([`PrefixCache`]):
                The cache before the pass.
            before (`int`):
                Columns that stand before the nodes when they are attended to.
            words (`torch.LongTensor` of shape `(batch, nodes, words)`):
                Which nodes a node sees.
        """
        if self.runs is None:
            self.runs = self._fits(prefix, words)
        starts = prefix.starts(len(words), words.device) if self.runs else None
        if starts is None:
            return None
        if self._arrivals is None:
            self._arrivals = kernels.new_arrivals(words.device)
        return {
            "attention_mask": words[:, None],
            "tree_prefix": torch.full((len(words),), before, device=words.device),
            "tree_start": starts,
            "tree_arrivals": self._arrivals,
        }

    def _fits(self, prefix: PrefixCache, like: torch.Tensor) -> bool:
        shapes = prefix.shapes() if self.shapes is None else self.shapes
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if shapes is None or any(attention_windows(self.config).values()) or not kinds <= {"full_attention"}:
            return False
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        return not capped and chosen_attention(self.config) != "eager" and fits_kernel(self.model, shapes, like)


__all__ = ["PrefixAttention", "fits_kernel", "kernel_attention"]
