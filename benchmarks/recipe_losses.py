"""The recipes that `recipes.py` compares: how each feeds its head, and what each slot weighs."""

import argparse
from collections.abc import Callable

import torch
from side_by_side import FrozenPass, frozen_pass
from torch import nn
from torch.nn import functional as F

from hf_treeflash.ar_head import ARHead
from hf_treeflash.draft_vocabulary import kept_tokens
from hf_treeflash.training.blocks import embedding_of, output_layer_of
from hf_treeflash.training.loss_vocabulary import LossVocabulary, StepVocabulary
from hf_treeflash.training.losses import RowScores, score_rows, slot_weights, weighted_mean

RECIPES = ("paper", "own drafts", "reach by slot", "reach by block", "second order")
OWN = "the drafter's own"
CHUNK_ROWS = 256


class SecondOrderHead(ARHead):
    """The default head with the token before the previous one, through a factor of low rank.

    Args:
        config ([`TreeFlashConfig`]):
            Of the drafter.
        rank (`int`):
            Of the factor.
    """

    def __init__(self, config, rank: int):
        super().__init__(config)
        self.older = nn.Linear(config.hidden_size, rank, bias=False)
        self.mix = nn.Linear(rank, 2 * config.intermediate_size, bias=False)
        setattr(self.mix, "_zero_init", True)  # as in `ARHead`

    def _up_gate(self, previous, states, slots):
        newer, older = previous.chunk(2, dim=-1)
        return super()._up_gate(newer, states, slots) + self.mix(self.older(older))

    def forward(self, previous_embeds, normed_states, slots=None):
        """Return the term to add; `previous_embeds` holds the previous tokens' embeddings, then the older ones'."""
        newer, older = previous_embeds.chunk(2, dim=-1)
        # At the first slot the older one is zero: the draft is not told what stands before its anchor.
        both = torch.cat([self.norm(newer), self.norm(older)], dim=-1)
        up, gate = self._up_gate(both, normed_states, slots).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

    def steps_of(self, norm: nn.Module) -> Callable:
        """Return how a draft along paths steps; the state is the older token's embedding."""

        def steps_of(hidden, normed, marginals, embed, lm_head):
            def step(older, token, text, depth):
                newer = embed(torch.tensor([[token]], device=hidden.device))
                own = hidden[text, depth][None, None], normed[text, depth][None, None]
                return newer, lm_head(self.states(norm, *own, torch.cat([newer, older], dim=-1)))[0, 0]

            return step, torch.zeros_like(hidden[:1, :1]), True

        return steps_of


class Comparison:
    """The heads beside their frozen pair.

    Args:
        target ([`PreTrainedModel`]), drafter ([`TreeFlashDraftModel`]):
            The pair.
        args (`argparse.Namespace`):
            With `rates`, `decay`, `rank` and `start`.
    """

    def __init__(self, target, drafter, args: argparse.Namespace):
        self.target, self.drafter, self.decay = target, drafter, args.decay
        size = target.config.get_text_config(decoder=True).vocab_size
        reduced = drafter.config.draft_vocab_size is not None
        self.tokens = kept_tokens(drafter.d2t) if reduced else torch.arange(size)
        self.columns = LossVocabulary(self.tokens, size, 0).places  # -1: never drafted
        vocabulary = StepVocabulary(self.tokens, torch.zeros(len(self.tokens)))
        self.lm_head = output_layer_of(target, drafter, vocabulary)
        self.teacher_head = output_layer_of(target, None, vocabulary)
        self.heads = {f"{name} @ {rate}": self._new_head(name, args) for rate in args.rates for name in RECIPES}

    def _new_head(self, name: str, args: argparse.Namespace) -> nn.Module:
        torch.manual_seed(0)  # what the heads share starts the same
        head = (
            SecondOrderHead(self.drafter.config, args.rank) if name == "second order" else ARHead(self.drafter.config)
        )
        torch.manual_seed(0)
        head.apply(self.drafter._init_weights)
        if args.start == "own":
            head.load_state_dict(self.drafter.ar_head.state_dict(), strict=False)
        return head

    def losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return every head's loss on a batch, in nats per unit of slot weight."""
        done = frozen_pass(self.drafter, self.target, batch)
        scores = self.scores(done, self.heads, feeds_drafts=True)
        return {name: self._loss(name, done, own) for name, own in scores.items()}

    def scores(
        self, done: FrozenPass, heads: dict[str, nn.Module], feeds_drafts: bool = False
    ) -> dict[str, RowScores]:
        """Score heads on the supervised slots of a pass, one beside the other."""
        states = torch.stack([self._states(name, head, done, feeds_drafts) for name, head in heads.items()])
        scores = score_rows(
            self.lm_head, states, self.columns[done.blocks.labels].clamp(min=0), done.blocks.teacher_states,
            teacher_head=self.teacher_head, num_candidates=2, chunk_rows=CHUNK_ROWS,
        )  # fmt: skip
        return {name: RowScores(*(part[i] for part in scores)) for i, name in enumerate(heads)}

    def _states(self, name: str, head: nn.Module, done: FrozenPass, feeds_drafts: bool) -> torch.Tensor:
        ids = done.ids
        if feeds_drafts and name.startswith("own drafts"):
            ids = self.with_own_drafts(head, done)
        return head.states(self.drafter.norm, done.hidden, done.normed, self._previous(head, ids))[done.rows]

    def _previous(self, head: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        embeds = embedding_of(self.target, self.drafter)(ids)
        if not isinstance(head, SecondOrderHead):
            return embeds
        return torch.cat([embeds, F.pad(embeds[:, :-1], (0, 0, 1, 0))], dim=-1)

    @torch.no_grad()
    def with_own_drafts(self, head: nn.Module, done: FrozenPass) -> torch.Tensor:
        """Return the previous tokens, in every second block those that the head drafts itself."""
        ids = done.ids.clone()
        hidden, normed = done.hidden[::2], done.normed[::2]
        states = head.states(self.drafter.norm, hidden, normed, self._previous(head, ids[::2]))
        drafted = self.tokens[self.lm_head(states[:, :-1]).argmax(dim=-1)]  # (blocks / 2, depth - 1)
        ids[::2, 1:] = drafted
        return ids

    def _loss(self, name: str, done: FrozenPass, scores: RowScores) -> torch.Tensor:
        return weighted_mean(scores.loss, self.weights(name, done, scores) * self.known(done))

    def known(self, done: FrozenPass) -> torch.Tensor:
        """Return which labels may be drafted at all."""
        return self.columns[done.blocks.labels] >= 0

    def weights(self, name: str, done: FrozenPass, scores: RowScores) -> torch.Tensor:
        """Return the weight of each supervised slot."""
        if name.startswith("reach by slot"):
            right = by_block(scores.correct & self.known(done), done.rows)
            return reached((right.sum(0) / done.rows.sum(0).clamp(min=1))[None]).expand_as(right)[done.rows]
        if name.startswith("reach by block"):
            return reached(by_block(scores.recalled & self.known(done), done.rows))[done.rows]
        return slot_weights(done.blocks.depths, self.decay)

    @torch.no_grad()
    def held_out(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        """Return of every head, with true previous tokens: the paper's loss, and tokens per pass of a chain.

        The drafter's own head is among them.
        """
        done, table = frozen_pass(self.drafter, self.target, batch), {}
        weights = slot_weights(done.blocks.depths, self.decay) * self.known(done)
        for name, scores in self.scores(done, {**self.heads, OWN: self.drafter.ar_head}).items():
            right = by_block(scores.correct & self.known(done), done.rows)
            chain = 1 + right.cumprod(dim=1).sum() / len(right)
            table[name] = {
                "loss": round(weighted_mean(scores.loss, weights).item(), 4),
                "chain": round(chain.item(), 3),
            }
        return table


def by_block(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Lay values of supervised slots out by block, `(blocks, depth)`, 0 elsewhere."""
    laid = torch.zeros(rows.shape)
    laid[rows] = values.float()
    return laid


def reached(chances: torch.Tensor) -> torch.Tensor:
    """Return the chance that a slot is reached, given that of each slot to be passed: `(..., depth)`, both."""
    return F.pad(chances, (1, 0), value=1.0)[..., :-1].cumprod(dim=-1)
