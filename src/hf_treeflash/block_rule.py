"""What a slot of a drafter's block sees: one rule per kind of layer, for drafting, static rounds and training."""

from typing import NamedTuple

import torch


class BlockRule(NamedTuple):
    """How one kind of layer looks at the context and at its own block.

    Attributes:
        window (`int`, *optional*):
            Tokens of its window; None for full attention.
        window_rule (`str`):
            What the window shows, see [`TreeFlashConfig`].
        is_causal (`bool`):
            Whether a slot sees no later slot.
    """

    window: int | None = None
    window_rule: str = "inclusive"
    is_causal: bool = False

    @property
    def hides_nothing(self) -> bool:
        """Whether every slot sees the whole context and the whole block."""
        return self.window is None and not self.is_causal

    def sees(self, queries: torch.Tensor, keys: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Return which places of the text slots see, of the context and their own block.

        Args:
            queries, keys, anchors (`torch.LongTensor`, broadcastable to each other):
                Places of the slots, of what they look at, and of the first slots of the blocks; a key from the anchor
                on is a slot.

        Returns:
            `torch.BoolTensor`
        """
        distance = queries - keys
        seen = distance >= 0 if self.is_causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is None:
            return seen
        if self.window_rule == "anchor":
            return seen & (anchors - keys <= self.window)
        reach = self.window if self.window_rule == "inclusive" else self.window - 1
        if self.window_rule == "context":
            return seen & ((distance <= reach) | (keys >= anchors))
        return seen & (distance.abs() <= reach)


def block_rules(config) -> dict[str, BlockRule]:
    """Return the rule of each kind of layer of a drafter.

    Args:
        config ([`TreeFlashConfig`]):
            Of the drafter.
    """
    rules = {}
    for kind in dict.fromkeys(config.layer_types):
        is_sliding = kind == "sliding_attention"
        is_causal = config.causal_layers == "all" or (is_sliding and config.causal_layers == "sliding")
        rules[kind] = BlockRule(config.sliding_window if is_sliding else None, config.window_rule, is_causal)
    return rules


def seen_by_block(present: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, rule: BlockRule) -> torch.Tensor:
    """Return which columns the slots of a block see.

    Args:
        present (`torch.BoolTensor` of shape `(batch, columns)`):
            Which columns are of the context or the block.
        queries, keys (`torch.LongTensor` of shape `(batch or 1, slots)` and `(batch or 1, columns)`):
            Places of the slots and of the columns in the text.
        rule ([`BlockRule`]):
            Of the layer.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, slots, columns)`.
    """
    seen = rule.sees(queries[:, :, None], keys[:, None], queries[:, :1, None])  # (batch or 1, slots, columns)
    return (present[:, None] & seen)[:, None]  # (batch, 1, slots, columns)


__all__ = ["BlockRule", "block_rules", "seen_by_block"]
