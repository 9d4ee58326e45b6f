"""The TreeFlash head: it corrects a slot's state for the token before it, and asks the output layer again."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .backbone import RMSNorm
from .configuration_treeflash import TreeFlashConfig
from .knobs import DraftingKnobs
from .transitions import top_log_probs

# From the slots' own tensors, previous tokens' embeddings `(batch, rows, size)` and the slot of each row `(rows,)`:
# columns of the output layer and their log-probabilities, most likely first, both `(batch, rows, branching)`.
Score = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Slots(NamedTuple):
    """A block as heads read it: what the backbone says of each slot, whatever stands before it.

    Attributes:
        hidden, normed (`torch.Tensor` of shape `(batch, depth, hidden_size)`):
            States before and after the final norm.
        marginals (`torch.Tensor` of shape `(batch, depth, vocab)`):
            Logits with their noise; of the last slot only where the head asked for them.
        draw_noise (`torch.FloatTensor` of shape `(batch, depth, vocab)`, *optional*):
            See [`~TreeFlashDraftModel.draft`].
    """

    hidden: torch.Tensor
    normed: torch.Tensor
    marginals: torch.Tensor
    draw_noise: torch.Tensor | None = None


class ARHead(nn.Module):
    """SwiGLU correction of a slot's state for the token before it (arXiv 2606.03819, AR approximation).

    Attributes:
        reads_marginals (`bool`):
            Whether rows start from their slot's own logits, so that the last slot's are needed, too.
    """

    reads_marginals = False

    def __init__(self, config: TreeFlashConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=1e-6)
        self.up_gate_proj = nn.Linear(2 * config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        # `post_init` overwrites values set here, so the leaf carries a mark for `_init_weights` instead.
        setattr(self.down_proj, "_zero_init", True)

    def forward(
        self, previous_embeds: torch.Tensor, normed_states: torch.Tensor, slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the term to add to the un-normed states.

        Args:
            previous_embeds (`torch.Tensor` of shape `(batch, rows, hidden_size)`):
                Target embeddings of the previous tokens.
            normed_states (`torch.Tensor` of shape `(batch, slots, hidden_size)`):
                Normed backbone states of the slots.
            slots (`torch.LongTensor` of shape `(rows,)`, *optional*):
                The slot of each row; by default row `i` belongs to slot `i`.
        """
        # Both (batch, rows, intermediate_size).
        up, gate = self._up_gate(self.norm(previous_embeds), normed_states, slots).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

    def embedding(self, embed: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what embeds previous tokens: the target's embedding as it is."""
        return embed

    def states(self, norm: nn.Module, hidden, normed, previous_embeds, slots=None) -> torch.Tensor:
        """Return what `logits` reads, `(batch, rows, hidden_size)`: corrected states.

        Args:
            norm (`nn.Module`):
                The drafter's final norm.
            hidden, normed (`torch.Tensor` of shape `(batch, slots, hidden_size)`):
                States of the slots before and after it.
            previous_embeds (`torch.Tensor` of shape `(batch, rows, size)`), slots (`torch.LongTensor`, *optional*):
                See `forward`.
        """
        return norm(by_slot(hidden, slots) + self(previous_embeds, normed, slots))

    def logits(self, states: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return logits of rows, given an output layer."""
        return lm_head(states)

    def scorer(
        self, slots: Slots, norm: nn.Module, lm_head: Callable, knobs: DraftingKnobs
    ) -> tuple[tuple[torch.Tensor, ...], Score]:
        """Return the slots' tensors that rows are scored with, and what scores them.

        Args:
            slots ([`Slots`]):
                Of the block.
            norm (`nn.Module`), lm_head (`Callable`):
                The drafter's final norm, and the output layer.
            knobs ([`DraftingKnobs`]):
                `branching` and `draft_temperature`.

        Returns:
            `tuple`: Tensors `(batch, depth, ...)`, and the function that takes them.
        """
        states = [slots.hidden, slots.normed]
        if slots.draw_noise is not None:
            states.append(slots.draw_noise)

        def score(hidden, normed, *others):
            *noise, previous_embeds, rows = others
            logits = lm_head(self.states(norm, hidden, normed, previous_embeds, rows))  # (batch, rows, columns)
            own = noise[0] if noise else None
            return top_log_probs(logits, knobs.branching, knobs.draft_temperature, own, rows)

        return tuple(states), score

    def _up_gate(self, previous: torch.Tensor, states: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
        adapted = type(self.up_gate_proj) is not nn.Linear  # or quantised: only the module knows its weight
        if adapted or previous.shape[1] <= 2 * states.shape[1]:  # few rows cost less than more operations
            return self.up_gate_proj(torch.cat([previous, by_slot(states, slots)], dim=-1))
        # The state's half of the product is the same for every previous token of a slot: compute it once.
        previous_weight, state_weight = self.up_gate_proj.weight.chunk(2, dim=1)
        return F.linear(previous, previous_weight) + by_slot(
            F.linear(states, state_weight, self.up_gate_proj.bias), slots
        )


def by_slot(states: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """Repeat each slot's states for its rows.

    Args:
        states (`torch.Tensor` of shape `(batch, slots, ...)`):
            Of the slots.
        slots (`torch.LongTensor` of shape `(rows,)`, *optional*):
            The slot of each row; by default row `i` belongs to slot `i`.
    """
    return states if slots is None else states.index_select(1, slots)


__all__ = ["ARHead", "Score", "Slots", "by_slot"]
