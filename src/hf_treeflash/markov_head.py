"""Heads that add products of token codes to a slot's own logits: DSpark's Markov head and DFlash-2's selector."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .ar_head import Score, Slots, by_slot
from .configuration_treeflash import TreeFlashConfig
from .knobs import DraftingKnobs
from .transitions import top_log_probs


class MarkovHead(nn.Module):
    """DSpark's head: a slot's logits plus the products of the previous token's code with every token's own vector.

    With `z` the slot's normed state and `c` the previous token's vector, the code is `c`, or
    `sigmoid(gate [z; c]) * c` where `head_gated` says so. Methods are those of [`ARHead`].

    Args:
        config ([`TreeFlashConfig`]):
            With `head_rank`, the width of the vectors.

    Source: the published DSpark checkpoints.
    """

    reads_marginals = True

    def __init__(self, config: TreeFlashConfig):
        super().__init__()
        vocab, rank = config.vocab_size or 0, config.head_rank
        self.previous = nn.Embedding(vocab, rank)
        self.following = nn.Embedding(config.draft_vocab_size or vocab, rank)
        setattr(self.following, "_zero_init", True)  # see `ARHead`
        self.gate = nn.Linear(config.hidden_size + rank, rank) if config.head_gated else None

    def embedding(self, embed: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what embeds previous tokens: the head's own vectors, `(..., head_rank)`."""
        return lambda token_ids: self.previous(token_ids.to(self.previous.weight.device))

    def code(self, vectors: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Return the codes of rows.

        Args:
            vectors (`torch.Tensor` of shape `(batch, rows, head_rank)`):
                Of the previous tokens.
            normed (`torch.Tensor` of shape `(batch, rows, hidden_size)`):
                Normed states of the rows' slots.
        """
        if self.gate is None:
            return vectors
        return vectors * self.gate(torch.cat([normed, vectors], dim=-1)).sigmoid()

    def states(self, norm: nn.Module, hidden, normed, previous_embeds, slots=None) -> torch.Tensor:
        """Return what `logits` reads: normed states and codes, `(batch, rows, hidden_size + head_rank)`."""
        own = by_slot(normed, slots)
        return torch.cat([own, self.code(previous_embeds, own)], dim=-1)

    def logits(self, states: torch.Tensor, lm_head: Callable, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits of rows, given an output layer, and which tokens it scores if not all."""
        normed, code = self._split(states)
        weight = self.following.weight
        return lm_head(normed) + F.linear(code, weight if token_ids is None else weight[token_ids])

    def scorer(
        self, slots: Slots, norm: nn.Module, lm_head: Callable, knobs: DraftingKnobs
    ) -> tuple[tuple[torch.Tensor, ...], Score]:
        """Return the slots' tensors that rows are scored with, and what scores them."""
        base, home = slots.marginals.float(), slots.marginals.device

        def score(normed, base, vectors, rows):
            code = self.code(vectors, by_slot(normed, rows))
            products = F.linear(code, self.following.weight)  # (batch, rows, columns)
            columns, log_probs = top_log_probs(products, knobs.branching, knobs.draft_temperature, base, rows)
            return columns.to(home), log_probs.to(home)

        return (slots.normed, base.to(slots.normed.device)), score

    def _split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rank = self.previous.embedding_dim
        normed, code = states.split([states.shape[-1] - rank, rank], dim=-1)
        return normed, code.to(self.following.weight.dtype)


class SelectorHead(MarkovHead):
    """DFlash-2's selector: the same over a slot's likeliest tokens alone, with codes `c * project(z)`.

    Args:
        config ([`TreeFlashConfig`]):
            With `head_rank`, and `selector_top_k` tokens of each slot.

    Source: the published DFlash-2 checkpoints.
    """

    def __init__(self, config: TreeFlashConfig):
        super().__init__(config)
        self.project = nn.Linear(config.hidden_size, config.head_rank, bias=False)
        self.top_k = config.selector_top_k

    def code(self, vectors: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Return the codes of rows; arguments as in [`MarkovHead`]."""
        return vectors * self.project(normed)

    def logits(self, states: torch.Tensor, lm_head: Callable, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits of rows, given an output layer over all tokens.

        The tokens that are considered share the probability that they had together; the others keep theirs. So what is
        learnt is what is drafted by: how the former compare.
        """
        normed, code = self._split(states)
        base = lm_head(normed)
        before, chosen = base.topk(min(self.top_k, base.shape[-1]), dim=-1)  # (..., top_k)
        after = before + (self.following(chosen) @ code[..., None])[..., 0]
        after = after + before.logsumexp(-1, keepdim=True) - after.logsumexp(-1, keepdim=True)
        return base.scatter(-1, chosen, after.to(base.dtype))

    def scorer(
        self, slots: Slots, norm: nn.Module, lm_head: Callable, knobs: DraftingKnobs
    ) -> tuple[tuple[torch.Tensor, ...], Score]:
        """Return the slots' tensors that rows are scored with, and what scores them."""
        marginals, home, own = slots.marginals, slots.marginals.device, slots.normed.device
        candidates, _ = top_log_probs(marginals, self.top_k, knobs.draft_temperature)  # (batch, depth, top_k)
        base = marginals.gather(-1, candidates).float()

        def score(normed, base, candidates, vectors, rows):
            code, own = self.code(vectors, by_slot(normed, rows)), by_slot(candidates, rows)  # (batch, rows, ...)
            products = (self.following(own) @ code[..., None])[..., 0]  # (batch, rows, top_k)
            places, log_probs = top_log_probs(products, knobs.branching, knobs.draft_temperature, base, rows)
            return own.gather(-1, places).to(home), log_probs.to(home)

        return (slots.normed, base.to(own), candidates.to(own)), score


__all__ = ["MarkovHead", "SelectorHead"]
