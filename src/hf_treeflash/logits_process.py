"""The call's logits processors along the paths of a tree."""

import sys

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
        self.by_row = [[for_row(processor, row) for processor in processors] for row in range(batch)]

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
        for processor in self.by_row[row]:
            logits = processor(prefix, logits)
        return logits

    def whole_tree(self, logits: torch.Tensor) -> torch.Tensor:
        """Process all nodes in one call, in plain decoding's precision; prefix-independent processors allow it.

        Args:
            logits (`torch.Tensor` of shape `(batch, nodes, vocab)`):
                The target's logits.
        """
        if not self.processors:  # half precision holds no two numbers that are one in single precision
            return logits.float() if logits.dtype == torch.float64 else logits
        return self(None, logits.flatten(0, 1).float()).view(logits.shape)


def for_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """Return a processor as one row of a batch has it: rows that grow at their own pace cannot share a call."""
    if type(processor) is PrefixConstrainedLogitsProcessor:
        # It is told the prompt, of which there may be several sequences.
        allowed, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(prompt, ids), num_beams=1)
    return processor


def can_fork(processor: LogitsProcessor) -> bool:
    """Whether a processor with a state can be asked about a text ahead of time.

    It rules tokens out, advances by the last token at every call, and either has a method `fork(row)` that returns a
    processor for that row alone, going on from the present state, or is xgrammar's, for which we do the same.
    """
    # Looked up among what is loaded: it need not be installed. Its early versions cannot fork.
    grammar = type(processor).__module__ == "xgrammar.contrib.hf"
    return hasattr(processor, "fork") or (grammar and hasattr(sys.modules["xgrammar"].GrammarMatcher, "fork"))


def fork(processor, row: int = 0) -> LogitsProcessor:
    """Return a processor for one row that goes on from the present state, and leaves the original where it is.

    Args:
        processor ([`LogitsProcessor`]):
            One that [`can_fork`].
        row (`int`, *optional*, defaults to 0):
            Index of the row among those the processor sees.
    """
    if hasattr(processor, "fork"):
        return processor.fork(row)
    grammars = processor.compiled_grammars
    twin = type(processor)(grammars[row if len(grammars) > 1 else 0])
    if processor.matchers:
        twin.batch_size, twin.prefilled = 1, processor.prefilled
        twin.matchers = [processor.matchers[row].fork()]
        # A matcher that has ended fills no mask: the last one goes on to hold.
        twin.token_bitmask = processor.token_bitmask[row : row + 1].clone()
    return twin


__all__ = ["MASKING", "TreeLogitsProcessor", "can_fork", "fork"]
