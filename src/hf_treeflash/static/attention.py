"""What the target's verify pass is told about who sees what, for the attention it runs with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..attention import (
    additive_mask,
    attention_windows,
    masked_attention,
    replaced_attention,
    seen_by_block,
)
from ..kernels import Tree, dense_tree_mask
from ..kernels._launch import use_triton


class TreeAttention:
    """Chooses between the tree attention kernel and additive masks for a target's own attention.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        starts (`torch.LongTensor` of shape `(batch,)`):
            First slot of each row that holds a token; read anew in every pass.
    """

    def __init__(self, target, starts: torch.Tensor):
        self.target, self.starts = target, starts
        self.config = target.config.get_text_config(decoder=True)
        supported = getattr(target, "_supports_attention_backend", False) and not target.training
        self.by_kernel = bool(supported) and use_triton(starts)

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
            words = tree.ancestor_words[:, None]
            return {"attention_mask": words, "tree_prefix": lengths, "tree_start": self.starts}
        masks = {
            kind: additive_mask(
                dense_tree_mask(tree.ancestor_words, lengths, self.starts, span, window), self.target.dtype
            )
            for kind, window in attention_windows(self.config).items()
        }
        return {"attention_mask": masks[None] if None in masks else masks}

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Let the target run with an attention that takes these arguments, and restore its own."""
        if not self.by_kernel:
            with masked_attention(self.target):
                yield
            return
        from ..kernels.attention_interface import register_tree_attention

        with replaced_attention(self.config, register_tree_attention()):
            yield


def block_masks(config, starts, lengths, span: int, dtype: torch.dtype) -> dict[str | None, torch.Tensor]:
    """Return the drafter's masks: each slot of a block sees the context and the block, within windows.

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
        kind: additive_mask(seen_by_block(present, queries, slots, window), dtype)
        for kind, window in attention_windows(config).items()
    }


__all__ = ["TreeAttention", "block_masks"]
