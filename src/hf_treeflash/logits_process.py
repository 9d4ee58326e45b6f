"""The call's logits processors along the paths of a tree."""

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Their result depends on the scores alone, so any number of nodes can go through one call.
PREFIX_INDEPENDENT = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class TreeLogitsProcessor(LogitsProcessor):
    """Applies a call's processors to tree nodes, each with its own prefix, as plain `generate` would on that prefix.

    Args:
        processors ([`LogitsProcessorList`]):
            The processors of the call, in order.
        batch (`int`, *optional*, defaults to 1):
            Rows of the call: some processors tell rows apart by their index.
    """

    def __init__(self, processors: LogitsProcessorList, batch: int = 1):
        self.processors = processors
        self.batch = batch
        # Exact types: a subclass may look at the prefix.
        self.prefix_independent = all(type(processor) in PREFIX_INDEPENDENT for processor in processors)

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        """Process one node per row of the call; shapes as for any [`LogitsProcessor`].

        Args:
            input_ids (`torch.LongTensor` of shape `(rows, length)`, *optional*):
                The prefix of each node; may be left out where no processor looks at it.
            scores (`torch.FloatTensor` of shape `(rows, vocab)`):
                The target's logits at each node.
        """
        return self.processors(input_ids, scores)

    def node(self, row: int, prefix: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Process one node of one row.

        Args:
            row (`int`):
                Index of the row in the call.
            prefix (`torch.LongTensor` of shape `(1, length)`):
                The row's tokens up to the node, the node included.
            logits (`torch.FloatTensor` of shape `(1, vocab)`, float32):
                The target's logits at the node.

        Returns:
            `torch.FloatTensor` of shape `(1, vocab)`.
        """
        if self.batch == 1 or self.prefix_independent:
            return self(prefix, logits)
        # Rows grow at their own pace, so they cannot share a call; the row keeps its index among copies of itself.
        return self(prefix.expand(self.batch, -1), logits.expand(self.batch, -1))[row : row + 1]

    def whole_tree(self, logits: torch.Tensor) -> torch.Tensor:
        """Process all nodes in one call, which prefix-independent processors allow.

        Args:
            logits (`torch.Tensor` of shape `(batch, nodes, vocab)`):
                The target's logits.
        """
        if not self.processors:
            return logits
        return self(None, logits.flatten(0, 1).float()).view(logits.shape)


__all__ = ["TreeLogitsProcessor"]
