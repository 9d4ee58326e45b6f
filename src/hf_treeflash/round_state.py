"""Where a call stands between two rounds: what a round reads, and what it leaves to the next."""

from dataclasses import dataclass

import torch

from .cache import PrefixCache
from .choice import upload
from .context import Context, count_positions
from .taps import Taps
from .verify import Verdict


@dataclass
class RoundState:
    """The texts being written, as both models see them.

    Attributes:
        rows (`list[int]`):
            The call's rows that are still being written; what follows has one entry for each of them.
        anchor_ids (`torch.LongTensor` of shape `(rows,)`):
            Newest tokens, which the target has not read yet.
        positions (`torch.LongTensor` of shape `(..., rows)`):
            Their positions, with the axes of the target's position ids.
        text_positions (`torch.LongTensor` of shape `(rows,)`):
            The same counted in tokens, as the drafter takes them.
        prefix ([`PrefixCache`]):
            The target's cache of all that stands before the anchors.
        pending (`list[Context]`):
            Target states the drafter has not read yet, oldest first.
        taps ([`Taps`]):
            Where the target's passes leave the states that the drafter reads.
        prompt_columns (`int`), first_positions (`torch.LongTensor` of shape `(..., batch)`):
            Columns of the prompt, and where each row of the call went on behind it; neither changes.
    """

    rows: list[int]
    anchor_ids: torch.Tensor
    positions: torch.Tensor
    text_positions: torch.Tensor
    prefix: PrefixCache
    pending: list[Context]
    taps: Taps
    prompt_columns: int
    first_positions: torch.Tensor

    @classmethod
    def after_prompt(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        prefix: PrefixCache,
        states: torch.Tensor,
        taps: Taps,
    ) -> "RoundState":
        """Return the state once the target has read the prompts, whose last tokens are the anchors.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask (of the same shape, *optional*):
                The prompts; without tokens if they were given as embeddings.
            position_ids (`torch.LongTensor` of shape `(..., batch or 1, length)`):
                As the target takes them.
            prefix ([`PrefixCache`]):
                The target's cache, after the prompts.
            states (`torch.Tensor` of shape `(batch, length, taps * hidden_size)`):
                The target's at the tokens it read, as the drafter reads them.
            taps ([`Taps`]):
                Where they came from, and later ones will.
        """
        batch = input_ids.shape[0]
        valid = None if attention_mask is None else attention_mask.bool()
        text_ids = position_ids
        if position_ids.ndim > 2:  # models with several position axes still have the drafter count tokens
            text_ids = count_positions(attention_mask, prefix.length, position_ids)
        length = states.shape[1]
        read = text_ids[:, -length:].expand(batch, -1)  # (batch, length): earlier turns may stand before
        context = Context(states, read, [length] * batch, None if valid is None else valid[:, -length:])
        positions = position_ids[..., -1].expand(*position_ids.shape[:-2], batch)  # (..., batch)
        return cls(
            rows=list(range(batch)),
            anchor_ids=input_ids[:, -1] if input_ids.shape[1] else input_ids.new_zeros(batch),
            positions=positions,
            text_positions=read[:, -1],
            prefix=prefix,
            pending=[context],
            taps=taps,
            prompt_columns=prefix.length,
            first_positions=positions + 1,
        )

    def advance(self, verdicts: list[Verdict]) -> None:
        """Make each row's newest token its anchor.

        Args:
            verdicts (`list[Verdict]`):
                What each row accepted.
        """
        accepted = upload([len(verdict.path) for verdict in verdicts], self.positions.device)
        self.anchor_ids = upload([verdict.token_ids[-1] for verdict in verdicts], self.anchor_ids.device)
        self.positions = self.positions + accepted
        self.text_positions = self.text_positions + accepted.to(self.text_positions.device)

    def select(self, kept: list[int]) -> None:
        """Keep only some rows.

        Args:
            kept (`list[int]`):
                Their places among the present ones.
        """
        self.rows = [self.rows[index] for index in kept]
        self.anchor_ids, self.text_positions = self.anchor_ids[kept], self.text_positions[kept]
        self.positions = self.positions[..., kept]
        self.prefix.select(kept)
        self.pending = [context.select(kept) for context in self.pending]


__all__ = ["RoundState"]
