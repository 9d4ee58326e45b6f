"""The call's logits processors along the paths of a tree."""

import copy

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
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

# Theirs depends on the row alone, not on its index or on earlier calls.
ROW_BY_ROW = (
    *PREFIX_INDEPENDENT,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    WatermarkLogitsProcessor,
)

# They rule tokens out and keep no state between calls, so a draft can be asked before it is made.
MASKING = (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
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
        self.masking = LogitsProcessorList(processor for processor in processors if type(processor) in MASKING)
        rows = range(batch) if batch > 1 else ()
        self.by_row = [[for_row(processor, row) for processor in processors] for row in rows]

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
        scores = logits
        for processor in self.by_row[row]:
            if type(processor) in (*ROW_BY_ROW, PrefixConstrainedLogitsProcessor):
                scores = processor(prefix, scores)
            else:  # the row keeps its index among copies of itself
                copies = scores.repeat(self.batch, 1)
                scores = processor(prefix.expand(self.batch, -1), copies)[row : row + 1]
        return scores

    def permitted(self, row: int, prefix: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Return which tokens the call's processors leave possible after a prefix.

        Args:
            row (`int`):
                Index of the row in the call.
            prefix (`torch.LongTensor` of shape `(1, length)`):
                The row's tokens.
            vocab_size (`int`):
                Width of the scores.

        Returns:
            `torch.BoolTensor` of shape `(vocab_size,)` on the host.
        """
        scores = torch.zeros(1, vocab_size, device=prefix.device)
        try:
            for processor in self.by_row[row] if self.by_row else self.masking:
                if type(processor) in MASKING:
                    scores = processor(prefix, scores)
        except ValueError:  # a constraint that nothing satisfies: the text may never come to this
            return torch.zeros(vocab_size, dtype=torch.bool)
        return (scores[0] > float("-inf")).cpu()

    def whole_tree(self, logits: torch.Tensor) -> torch.Tensor:
        """Process all nodes in one call, which prefix-independent processors allow.

        Args:
            logits (`torch.Tensor` of shape `(batch, nodes, vocab)`):
                The target's logits.
        """
        if not self.processors:
            return logits
        return self(None, logits.flatten(0, 1).float()).view(logits.shape)


def for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """Return a processor for one row of a batch: rows grow at their own pace, so they cannot share a call or a state.

    Raises:
        ValueError: If a processor that may keep a state cannot be copied.
    """
    if type(processor) in ROW_BY_ROW:
        return processor
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
    held = getattr(processor, "__dict__", {}).values()
    try:
        return copy.deepcopy(processor, {id(value): value for value in held if isinstance(value, torch.nn.Module)})
    except Exception as error:
        raise ValueError(
            f"{type(processor).__name__} cannot be copied ({error}), which a batch needs: each row advances at its "
            "own pace and has a copy of the processors to itself. Pass one prompt at a time."
        ) from error


__all__ = ["TreeLogitsProcessor"]
