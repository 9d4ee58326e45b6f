"""Where trees are exact: how many nodes a pass may have for its logits to be those of plain decoding.

Nearly every target's pass over a tree gives what its passes over one token at a time give. Where it does not, nothing
in the config need say so, and the text would silently differ. So the first time a target is used it is looked at,
three passes in all, before a token is emitted; and once more behind a length at which it may change. That makes six
passes at most: where more lengths are named, texts behind them are decoded token by token.
"""

import torch
from transformers.utils import logging

from .compat import CACHE
from .lengths import Lengths
from .probe import Probe
from .round_state import RoundState
from .sequences import Sequences
from .verify import Verifier

logger = logging.get_logger(__name__)


class Exactness:
    """Says before each pass how many nodes it may have for its logits to be those of plain decoding.

    Args:
        verifier ([`Verifier`]):
            Runs the target over trees.
        model_kwargs (`dict`):
            What `generate` prepared for the prompts.
        forward_kwargs (`dict`):
            What each verify pass is given.
    """

    def __init__(self, verifier: Verifier, model_kwargs: dict, forward_kwargs: dict):
        self.probe = Probe(verifier, model_kwargs, forward_kwargs)
        self.target, self.lengths = verifier.target, Lengths.of(verifier.target)
        # What transformers' own do behind the lengths that they name is known.
        self.foreign = not type(verifier.target).__module__.startswith("transformers.")
        self.watched = self.lengths.named if self.foreign else self.lengths.switches
        self.before = [(layer, dict(vars(layer))) for layer in model_kwargs[CACHE].layers]
        self.faults: dict[int, str | None] = {}  # by how many of the watched lengths a root stands behind

    def start(self, state: RoundState, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Look at the target once the prompts are read.

        Args:
            state ([`RoundState`]):
                Of the prompts.
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Their tokens.
            logits (`torch.Tensor` of shape `(batch, vocab)`):
                The target's at their ends.

        Raises:
            ValueError: If passes over trees give other logits than plain decoding; the cache is left as it was given.
        """
        before, self.before = self.before, []  # of a cache as it was given, which is not to be held for longer
        self.tokens = logits.topk(3, dim=-1).indices.to(input_ids.device)  # (batch, 3), likely ones
        columns, positions = input_ids.shape[1], (state.positions + 1).flatten().tolist()
        # Where a root stands, counted from its column among the ids.
        self.offsets = {0, state.prefix.length - columns, *(position - columns for position in positions)}
        if self.target.training or self._room([columns]) < 3 or self._is_border(state, columns):
            return
        behind = self._behind([columns])
        fault = self.probe(state.prefix, state.positions + 1, input_ids, self.tokens, 1, behind).fault
        if fault is not None and behind == 0:
            for layer, fields in before:
                vars(layer).update(fields)
            raise ValueError(
                f"{type(self.target).__name__} cannot be verified over trees: {fault}. Its text beside a drafter "
                "would not be plain decoding's. Leave `assistant_model` out; `hf_treeflash.check(target, drafter)` "
                "prints what is known of the pair."
            )
        self._note(behind, fault)

    def room(self, state: RoundState, sequences: Sequences) -> int:
        """Return how many nodes the next pass may have."""
        columns = [sequences.lengths[row] - 1 for row in state.rows]
        room = self._room(columns)
        if room == 1 or self.target.training:
            return room
        behind = self._behind(columns)
        if behind not in self.faults:
            if len(sequences.lengths) > 1:  # rows that stand apart take no step of plain decoding's together
                self._note(behind, "this was not looked at in a batch" if self.foreign else None)
            elif room < 3:
                return 1
            else:
                ids, new = sequences.prefix(0), sequences.lengths[0] - sequences.prompt_length
                tokens = torch.cat([state.anchor_ids[:, None], self.tokens[:, 1:]], dim=1)  # (1, 3)
                look = self.probe(state.prefix, state.positions, ids[:, :-1], tokens, new, behind)
                self._note(behind, look.fault)
        return room if self.faults[behind] is None else 1

    def is_border(self, state: RoundState, sequences: Sequences) -> bool:
        """Whether the next pass is the first behind a length, where some targets read the text anew."""
        return len(sequences.lengths) == 1 and self._is_border(state, sequences.lengths[0] - 1)

    def _is_border(self, state: RoundState, column: int) -> bool:
        return any(state.prefix.length <= length <= column for length in self.lengths.named)

    def _room(self, columns: list[int]) -> int:
        return self.lengths.nodes(*(column + offset for column in columns for offset in self.offsets))

    def _behind(self, columns: list[int]) -> int:
        return sum(length <= max(columns) + max(self.offsets) for length in self.watched)

    def _note(self, behind: int, fault: str | None) -> None:
        self.faults[behind] = fault
        if fault is not None:
            logger.warning_once(
                f"From here on {type(self.target).__name__} is decoded token by token, as it computes otherwise in "
                f"texts of this length: {fault}."
            )


__all__ = ["Exactness"]
