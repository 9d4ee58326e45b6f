"""The target's choice at every node of a tree at once: argmax, or one draw per depth."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor


class Noise:
    """Exponential noise for the draws of the coming tokens; the token with the largest `probability / noise` is drawn.

    That is how `torch.multinomial` draws one token. Nodes of one depth share the noise of the token they stand for:
    the walk meets one of them, so each emitted token is an independent draw of the target's distribution.

    In a batch of one the noise of the tokens is drawn in their order and kept until they are emitted: the same seed
    gives the text of plain `generate`. In a batch rows advance at their own pace and every round draws anew.

    Args:
        batch (`int`), vocab_size (`int`):
            Rows, and the width of the logits.
        steps (`int`):
            Tokens that rounds under way may ask for, at most.
        device (`torch.device`):
            Where to draw.
    """

    def __init__(self, batch: int, vocab_size: int, steps: int, device: torch.device):
        self.buffer = torch.ones(batch, steps, vocab_size, device=device)
        self.drawn = 0

    def start(self) -> None:
        """Forget earlier texts; the first token, drawn from the prompt's logits, had noise of its own."""
        self.drawn = 0

    def draw(self, emitted: int) -> None:
        """Make sure of the noise for the next `steps` tokens.

        Args:
            emitted (`int`):
                Tokens that are known to be emitted in rounds, the first token excluded.
        """
        batch, steps, _ = self.buffer.shape
        if batch > 1:
            self.buffer.exponential_()
            return
        while self.drawn < emitted + steps:
            self.buffer[:, self.drawn % steps].exponential_()  # as many numbers as plain decoding draws at a time
            self.drawn += 1

    def at(self, steps: torch.Tensor) -> torch.Tensor:
        """Return the noise of some tokens, given which of a row's tokens they are; `(batch, nodes, vocab)`."""
        index = steps % self.buffer.shape[1]
        return self.buffer.gather(1, index[..., None].expand(-1, -1, self.buffer.shape[2]))


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
    logits: torch.Tensor, processors: LogitsProcessorList, noise: Noise | None, steps: torch.Tensor
) -> torch.Tensor:
    """Choose the token after every node.

    Args:
        logits (`torch.Tensor` of shape `(batch, nodes, vocab)`):
            The target's logits.
        processors ([`LogitsProcessorList`]):
            The call's, all independent of the prefix.
        noise ([`Noise`], *optional*):
            For sampling; None takes the argmax.
        steps (`torch.LongTensor` of shape `(batch, nodes)`):
            Which token of its row would follow each node, counted from the first round.

    Returns:
        `torch.LongTensor` of shape `(batch, nodes)`.
    """
    if processors:
        scores = processors(None, logits.flatten(0, 1).float()).view(logits.shape)  # (batch, nodes, vocab)
    else:  # plain decoding compares in single precision
        scores = logits.float() if logits.dtype == torch.float64 else logits
    if noise is None:
        return scores.argmax(dim=-1)
    return (scores.float().softmax(dim=-1) / noise.at(steps)).argmax(dim=-1)


__all__ = ["Noise", "choose", "without_waits"]
