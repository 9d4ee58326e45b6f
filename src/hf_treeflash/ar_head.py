"""The head that conditions a slot on the token before it."""

import torch
from torch import nn
from torch.nn import functional as F

from .backbone import RMSNorm
from .configuration_treeflash import TreeFlashConfig


class ARHead(nn.Module):
    """SwiGLU correction of a slot's state for the token before it (arXiv 2606.03819, AR approximation)."""

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
        states (`torch.Tensor` of shape `(batch, slots, size)`):
            Of the slots.
        slots (`torch.LongTensor` of shape `(rows,)`, *optional*):
            The slot of each row; by default row `i` belongs to slot `i`.
    """
    return states if slots is None else states.index_select(1, slots)


__all__ = ["ARHead", "by_slot"]
