"""The target's choice at every node of a tree at once: argmax, or what the noise of its token draws."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor


def noise_of(buffer: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the noise of some draws.

    Args:
        buffer (`torch.FloatTensor` of shape `(batch, capacity, vocab)`):
            As [`Noise`] keeps it.
        tokens (`torch.LongTensor` of shape `(batch, draws)`):
            Which of its row's tokens each draws, counted from the call's first one.

    Returns:
        `torch.FloatTensor` of shape `(batch, draws, vocab)`.
    """
    places = tokens % buffer.shape[1]
    return buffer.gather(1, places[..., None].expand(-1, -1, buffer.shape[2]))


class Suppressed(LogitsProcessor):
    """Suppresses tokens by a mask made once: looking up many tokens makes the host wait, which nothing recorded can.

    Args:
        processor ([`SuppressTokensLogitsProcessor`]):
            What it stands for.
    """

    def __init__(self, processor: SuppressTokensLogitsProcessor):
        self.processor = processor
        self.mask: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        """Process scores of shape `(rows, vocab)`."""
        if self.mask is None:
            self.mask = self.processor(input_ids, torch.zeros_like(scores[:1])) < 0
        return scores.masked_fill(self.mask, float("-inf"))


def without_waits(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return processors that do the same without making the host wait for the device after their first call."""
    suppressing = SuppressTokensLogitsProcessor
    return LogitsProcessorList(Suppressed(one) if type(one) is suppressing else one for one in processors)


def choose(
    logits: torch.Tensor, processors: LogitsProcessorList, buffer: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor:
    """Choose the token after every node.

    Nodes of one depth share the noise of the token they stand for: the walk meets one of them, so each emitted token
    is an independent draw of the target's distribution.

    Args:
        logits (`torch.Tensor` of shape `(batch, nodes, vocab)`):
            The target's logits.
        processors ([`LogitsProcessorList`]):
            The call's, all independent of the prefix.
        buffer (`torch.FloatTensor` of shape `(batch, capacity, vocab)`, *optional*):
            Noise for sampling; None takes the argmax.
        tokens (`torch.LongTensor` of shape `(batch, nodes)`):
            Which token of its row would follow each node, counted from the call's first one.

    Returns:
        `torch.LongTensor` of shape `(batch, nodes)`.
    """
    if processors:
        scores = processors(None, logits.flatten(0, 1).float()).view(logits.shape)  # (batch, nodes, vocab)
    else:  # plain decoding compares in single precision
        scores = logits.float() if logits.dtype == torch.float64 else logits
    if buffer is None:
        return scores.argmax(dim=-1)
    return (scores.float().softmax(dim=-1) / noise_of(buffer, tokens)).argmax(dim=-1)


__all__ = ["choose", "noise_of", "without_waits"]
