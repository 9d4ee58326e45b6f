"""Lengths at which a target may change how it computes: no pass may stand on both sides of one."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import GenerationMixin

NAMES_A_LENGTH = re.compile(r"max_position|max_seq|seq(uence)?_len|n_positions|n_ctx|context_length")
ENDLESS = 1 << 62


@dataclass(frozen=True)
class Lengths:
    """What a target's config says of lengths; a text of `n` tokens stands behind the length `n`.

    Attributes:
        named (`tuple[int, ...]`):
            Every length the config names, in order. What a target does behind one is not known from what it does
            before.
        switches (`tuple[int, ...]`):
            Those of them at which a model of transformers is known to change: its rotary embedding takes other
            frequencies for a whole pass, or it reads the text anew.
        one_by_one (`int`):
            From here on the frequencies follow the longest position of each pass, so that only passes over one token
            are plain decoding's.
        period (`int`, *optional*):
            The scale of the target's queries changes with the column, at every multiple of this.
    """

    named: tuple[int, ...] = ()
    switches: tuple[int, ...] = ()
    one_by_one: int = ENDLESS
    period: int | None = None

    @classmethod
    def of(cls, target) -> "Lengths":
        """Read the config of a target's text decoder."""
        values = target.config.get_text_config(decoder=True).to_dict()
        named = sorted({length for length in _named(values) if length > 1})
        original, longest = (values.get(f"{name}max_position_embeddings") for name in ("original_", ""))
        switches, one_by_one = set(), ENDLESS
        for rope in _ropes(values.get("rope_parameters") or {}):
            kind = rope.get("rope_type") or ""
            if kind == "longrope":
                switches.add(rope.get("original_max_position_embeddings") or original or longest)
            elif "dynamic" in kind:
                switches.add(longest)
                one_by_one = longest
        prepare = type(target).prepare_inputs_for_generation
        if original and prepare is not GenerationMixin.prepare_inputs_for_generation:
            switches.add(original)  # Phi-3 and its kin read the text anew there
        tuned = values.get("attn_temperature_tuning") and values.get("floor_scale")
        return cls(tuple(named), tuple(sorted(switches)), one_by_one, int(tuned) if tuned else None)

    def nodes(self, *roots: int) -> int:
        """Return how many nodes a pass may have.

        Args:
            roots (`int`):
                Where its root stands: its column, its position, or where else it may be counted from.
        """
        room = ENDLESS
        for root in roots:
            if root >= self.one_by_one:
                return 1
            room = min([room, *(length - root for length in self.named if length > root)])
            if self.period is not None:
                room = min(room, self.period - 1 - root % self.period or self.period)
        return room

    def switch_between(self, first: int, last: int) -> int | None:
        """Return a switch that some passes with roots from `first` to `last` stand before and some behind."""
        return next((length for length in self.switches if first < length <= last), None)


def _named(values: dict) -> Iterator[int]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _named(value)
        elif NAMES_A_LENGTH.search(str(key)) and isinstance(value, int | float) and not isinstance(value, bool):
            yield int(value)


def _ropes(parameters: dict) -> list[dict]:
    """Return the settings of a rotary embedding, one by one where kinds of layers have their own."""
    own = [value for value in parameters.values() if isinstance(value, dict)]
    return own or [parameters]


__all__ = ["ENDLESS", "Lengths"]
