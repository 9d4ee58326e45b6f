"""The tokens that a loss is computed over: the frequent ones of the data, and at each step a few of the others."""

from typing import NamedTuple

import torch


class StepVocabulary(NamedTuple):
    """The tokens of one step.

    Attributes:
        token_ids (`torch.LongTensor` of shape `(tokens,)`):
            The frequent ones, then the drawn ones.
        log_weights (`torch.FloatTensor` of shape `(tokens,)`):
            What is added to their logits: a drawn token stands for all that were not drawn.
    """

    token_ids: torch.Tensor
    log_weights: torch.Tensor


class LossVocabulary:
    """Stands for the whole vocabulary in a loss, at a fraction of its cost.

    Targets and drafts get the same logits, so the loss compares the two distributions over frequent tokens, with an
    estimate of the mass of all others (sampled softmax, arXiv 1412.2007). Without drawn tokens nothing would keep a
    drafter from finding the others likely.

    Args:
        frequent (`torch.LongTensor` of shape `(frequent,)`):
            From [`frequent_tokens`].
        vocab_size (`int`):
            Of the target.
        drawn (`int`):
            Other tokens per step, drawn with replacement.
    """

    def __init__(self, frequent: torch.Tensor, vocab_size: int, drawn: int):
        is_frequent = torch.zeros(vocab_size, dtype=torch.bool, device=frequent.device)
        is_frequent[frequent] = True
        self.frequent, self.others = frequent, (~is_frequent).nonzero()[:, 0]
        self.drawn = drawn if len(self.others) else 0
        self.places = torch.full((vocab_size,), -1, device=frequent.device)
        self.places[frequent] = torch.arange(len(frequent), device=frequent.device)

    def draw(self) -> StepVocabulary:
        """Draw the tokens of a step, from torch's own generator."""
        # Drawn on the host, whose generator a checkpoint holds on every machine.
        places = torch.randint(max(1, len(self.others)), (self.drawn,)).to(self.others.device)
        token_ids = torch.cat([self.frequent, self.others[places]])
        log_weights = torch.zeros(len(token_ids), device=token_ids.device)
        if self.drawn:
            log_weights[len(self.frequent) :] = torch.tensor(len(self.others) / self.drawn).log()
        return StepVocabulary(token_ids, log_weights)
