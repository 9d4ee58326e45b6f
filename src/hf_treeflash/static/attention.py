"""What the passes of a round are told about who sees what, for the attention they run with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..attention import (
    additive_mask,
    attention_dtype,
    attention_windows,
    masked_attention,
)
from ..block_rule import block_rules, seen_by_block
from ..kernel_attention import fits_kernel, kernel_attention
from ..kernels import Tree, dense_tree_mask, new_arrivals, pack_ancestor_words


class KernelAttention:
    """Chooses between the tree attention kernel and additive masks for a model's own attention.

    Args:
        model ([`PreTrainedModel`]):
            The target or the drafter.
        starts (`torch.LongTensor` of shape `(batch,)`):
            First slot of each row that holds a token; read anew in every pass.
        shapes (`list[tuple[int, int, int]]`):
            For each layer its key/value heads and the sizes of a key and of a value.

    Attributes:
        by_kernel (`bool`):
            Whether the kernel runs.
        spanless (`bool`):
            Whether it does all the work: it reads lengths on the device, so the capacity of a cache costs nothing.
    """

    def __init__(self, model, starts: torch.Tensor, shapes: list[tuple[int, int, int]]):
        self.model, self.starts = model, starts
        self.config, self.dtype = model.config.get_text_config(decoder=True), attention_dtype(model)
        self.by_kernel = fits_kernel(model, shapes, starts)
        self.arrivals = new_arrivals(starts.device)  # recorded graphs go on using them

    @property
    def spanless(self) -> bool:
        plain = getattr(self.config, "attn_logit_softcapping", None) is None
        return self.by_kernel and plain and not any(attention_windows(self.config).values())

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Let the model run with an attention that takes these arguments, and restore its own."""
        if not self.by_kernel:
            with masked_attention(self.model):
                yield
            return
        with kernel_attention(self.config):
            yield

    def kernel_arguments(self, words: torch.Tensor | dict[str, torch.Tensor], lengths: torch.Tensor) -> dict:
        """Return the keyword arguments of a pass through the kernel, see [`tree_attention_forward`]."""
        return {
            "attention_mask": words,
            "tree_prefix": lengths,
            "tree_start": self.starts,
            "tree_arrivals": self.arrivals,
        }


class TreeAttention(KernelAttention):
    """A target's, over the nodes of trees."""

    def arguments(self, tree: Tree, lengths: torch.Tensor, span: int) -> dict:
        """Return the keyword arguments of a pass over the nodes of a tree.

        Args:
            tree ([`Tree`]):
                The nodes.
            lengths (`torch.LongTensor` of shape `(batch,)`):
                Slot of the root.
            span (`int`):
                Slots the layers hand to their attention.
        """
        if self.by_kernel:
            return self.kernel_arguments(tree.ancestor_words[:, None], lengths)
        masks = {
            kind: additive_mask(dense_tree_mask(tree.ancestor_words, lengths, self.starts, span, window), self.dtype)
            for kind, window in attention_windows(self.config).items()
        }
        return {"attention_mask": masks[None] if None in masks else masks}


class BlockAttention(KernelAttention):
    """A drafter's, over a block: to the kernel a tree whose nodes see each other, or the earlier ones of them."""

    def __init__(self, model, starts: torch.Tensor, shapes: list[tuple[int, int, int]]):
        super().__init__(model, starts, shapes)
        self.rules = block_rules(self.config)
        # Windows reach to both sides, which the kernel does not know.
        self.by_kernel = self.by_kernel and all(rule.window is None for rule in self.rules.values())
        block = self.config.block_size
        everything = torch.ones(len(starts), 1, block, block, dtype=torch.bool, device=starts.device)
        self.words = {
            kind: pack_ancestor_words(everything.tril() if rule.is_causal else everything)
            for kind, rule in self.rules.items()
        }

    def arguments(self, lengths: torch.Tensor, span: int, dtype: torch.dtype) -> dict:
        """Return the keyword arguments of a drafting pass.

        Args:
            lengths (`torch.LongTensor` of shape `(batch,)`):
                First slot of the block.
            span (`int`):
                Slots the layers hand to their attention.
            dtype (`torch.dtype`):
                Of masks.
        """
        if self.by_kernel:
            return self.kernel_arguments(self.words, lengths)
        return {"attention_mask": block_masks(self.config, self.starts, lengths, span, dtype)}


def block_masks(config, starts, lengths, span: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the drafter's masks: what each slot of a block sees of the context and the block.

    Args:
        config ([`TreeFlashConfig`]):
            Of the drafter.
        starts, lengths (`torch.LongTensor` of shape `(batch,)`):
            First slot of the context, and of the block behind it.
        span (`int`):
            Slots the layers hand to their attention.
        dtype (`torch.dtype`):
            Of the masks.
    """
    slots = torch.arange(span, device=starts.device)[None]  # (1, span)
    queries = lengths[:, None] + torch.arange(config.block_size, device=starts.device)  # (batch, block_size)
    present = (slots >= starts[:, None]) & (slots < lengths[:, None] + config.block_size)  # (batch, span)
    return {
        kind: additive_mask(seen_by_block(present, queries, slots, rule), dtype)
        for kind, rule in block_rules(config).items()
    }


__all__ = ["BlockAttention", "TreeAttention"]
