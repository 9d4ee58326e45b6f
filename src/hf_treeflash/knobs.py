"""How a drafter drafts: the names, defaults and limits of the settings on `drafter.generation_config`."""

from difflib import get_close_matches
from typing import Any, NamedTuple

from transformers import GenerationConfig

AUTO_SIZES = (8, 16, 32, 64)  # nodes per tree that an automatic budget chooses from
# The least and the most of each number, both of the range.
INTEGERS = {
    "tree_budget": (2, 4096),
    "num_candidates": (1, 1024),
    "branching": (1, 1024),
    "draft_window": (1, 2**31),
}
TEMPERATURES = (1e-3, 1e3)


class DraftingKnobs(NamedTuple):
    """The drafting settings of a call.

    Attributes:
        tree_budget (`int`, defaults to 64):
            Nodes per verify pass, root included, from 2 to 4096; `"auto"` in a generation config, which is read as
            the largest size.
        num_candidates (`int`, defaults to 16):
            Previous tokens considered per slot, at most 1024.
        branching (`int`, defaults to 16):
            Next tokens considered per previous token, at most 1024.
        draft_temperature (`float`, defaults to 0.7):
            What the draft's logits are divided by, with the noise of the call's draws added where it samples; from
            0.001 to 1000. The further off the drafter's logits are, the higher.
        draft_window (`int`, *optional*):
            Committed tokens the drafter looks back on; None: all.
        draft_lm_head (`str`, *optional*):
            `"float8"`: draft with an eight-bit copy of the target's output layer.
        is_auto (`bool`):
            Whether the budget is chosen from round to round; no setting of its own.
    """

    tree_budget: int = 64
    num_candidates: int = 16
    branching: int = 16
    draft_temperature: float = 0.7
    draft_window: int | None = None
    draft_lm_head: str | None = None
    is_auto: bool = False

    @classmethod
    def read(cls, generation_config: GenerationConfig, of_call: GenerationConfig | None = None) -> "DraftingKnobs":
        """Read the knobs, refusing impossible values and misspelt names.

        Args:
            generation_config ([`GenerationConfig`]):
                The drafter's; defaults stand in for knobs it does not have.
            of_call ([`GenerationConfig`], *optional*):
                The call's, whose knobs go before the drafter's.

        Raises:
            ValueError: Naming the knob.
        """
        known = set(vars(GenerationConfig())) | set(KNOB_DEFAULTS)
        # What is None says nothing: earlier versions may have stored it.
        own = [name for name, value in vars(generation_config).items() if value is not None]
        unknown = [name for name in own if name not in known and not name.startswith("_")]
        given = {} if of_call is None else vars(of_call)
        # A call's config may hold what others read; what looks like a knob is meant as one.
        unknown += [name for name in given if name not in known and get_close_matches(name, KNOB_DEFAULTS, cutoff=0.8)]
        if unknown:
            whose = "call's" if unknown[0] in given else "drafter's"
            raise ValueError(
                f"Unknown drafting knob `{unknown[0]}` in the {whose} generation_config; "
                f"the knobs are {', '.join(KNOB_DEFAULTS)}."
            )
        values = {name: getattr(generation_config, name, default) for name, default in KNOB_DEFAULTS.items()}
        values |= {name: given[name] for name in KNOB_DEFAULTS if name in given}
        is_auto = values["tree_budget"] == "auto"
        values["tree_budget"] = max(AUTO_SIZES) if is_auto else values["tree_budget"]
        _check(values)
        return cls(**values, is_auto=is_auto)


DEFAULT_KNOBS = DraftingKnobs()
# By name, what a new drafter's generation config starts with.
KNOB_DEFAULTS: dict[str, Any] = {name: value for name, value in DEFAULT_KNOBS._asdict().items() if name != "is_auto"}


def _check(values: dict[str, Any]) -> None:
    for name, (least, most) in INTEGERS.items():
        value = values[name]
        if value is None and KNOB_DEFAULTS[name] is None:
            continue
        if type(value) is not int or not least <= value <= most:
            auto = ", or 'auto'" if name == "tree_budget" else ""
            raise ValueError(f"`{name}` must be an integer from {least} to {most}{auto}, got {value!r}.")
    temperature, (coldest, hottest) = values["draft_temperature"], TEMPERATURES
    if type(temperature) not in (int, float) or not coldest <= temperature <= hottest:
        raise ValueError(f"`draft_temperature` must be a number from {coldest} to {hottest}, got {temperature!r}.")
    if values["draft_lm_head"] not in (None, "float8"):
        raise ValueError(f"`draft_lm_head` must be 'float8' or None, got {values['draft_lm_head']!r}.")


__all__ = ["AUTO_SIZES", "DEFAULT_KNOBS", "KNOB_DEFAULTS", "DraftingKnobs"]
