"""The fields of a stored config: where each layout keeps them, what they may hold, and which must be neutral.

Tensors that fit say nothing of how a file is to be run. So each field that changes the forward is either read by
`layouts.py`, or stands below with the values at which it changes nothing; whatever no one has judged is named.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Dictionaries inside a config that hold fields of their own.
NESTED = ("dflash_config", "treeflash_config", "transformer_layer_config")


class Neutral(NamedTuple):
    """A field that is refused unless it changes nothing.

    Attributes:
        values (`tuple`):
            Where it changes nothing, None and absence aside; a string names the field it must equal.
        meaning (`str`):
            What it asks for otherwise.
    """

    values: tuple
    meaning: str


REFUSED_UNLESS_NEUTRAL = {
    "attention_sink_bias": Neutral((False,), "attention sinks"),
    "attention_sinks": Neutral((False,), "attention sinks"),
    "attention_value_scale": Neutral((1,), "scaled attention values"),
    "attention_multiplier": Neutral((), "an attention scale of its own"),
    "attention_mode": Neutral(("mha", "gqa"), "another kind of attention"),
    "attn_logit_softcapping": Neutral((), "soft-capped attention scores"),
    "attention_chunk_size": Neutral((), "chunked attention"),
    "query_pre_attn_scalar": Neutral(("head_dim",), "an attention scale of its own"),
    "v_head_dim": Neutral(("head_dim",), "values of another width than keys"),
    "target_hidden_size": Neutral(("hidden_size",), "a drafter of another width than its target"),
    "use_qk_norm": Neutral((True,), "attention without norms of queries and keys"),
    "qk_norm": Neutral((True,), "attention without norms of queries and keys"),
    "mlp_bias": Neutral((False,), "biases in the feed-forward layers"),
    "residual_multiplier": Neutral((1,), "scaled residuals"),
    "no_rope_layers": Neutral(([],), "layers without rotary embedding"),
    "rope_local_base_freq": Neutral((), "a second rotary base outside `rope_parameters`"),
    "swa_rope_parameters": Neutral((), "a second rotary embedding outside `rope_parameters`"),
    "quantization_config": Neutral(({},), "quantised weights, which must be dequantised before they are loaded"),
    "compression_config": Neutral(({},), "compressed weights, which must be dequantised before they are loaded"),
}
# What can change no logit: bookkeeping, the training that made the file, and how it is to be served.
NOT_OF_THE_FORWARD = {
    *vars(PreTrainedConfig()),
    *PreTrainedConfig().to_dict(),
    *("_name_or_path", "transformers_version", "torch_dtype", "torchscript", "use_cache", "tie_word_embeddings"),
    *("auto_map", "custom_pipelines", "pretraining_tp", "use_bfloat16", "_attn_implementation"),
    *("speculators_config", "speculators_version", "has_embed_tokens", "candidate_tokens", "num_speculative_tokens"),
    *("num_anchors", "max_anchors", "loss_decay_gamma", "embed_requires_grad", "base_model", "verifier"),
    *NESTED,
}


class StoredFields:
    """The fields of one config, each looked up wherever its layout may keep it.

    Args:
        stored (`dict[str, Any]`):
            The parsed `config.json`.
        source (`str`):
            How errors name the file.
        given (`dict[str, Any]`, *optional*):
            Fields that the caller gave; they go before those of the file.

    Attributes:
        description (`str`):
            What the file is, as soon as that is known.
        judged (`set[str]`):
            Names of the fields that were looked up.
    """

    def __init__(self, stored: dict[str, Any], source: str, given: dict[str, Any] | None = None):
        self.source, self.given, self.description = source, given or {}, ""
        self.places = {"": stored}
        for name in NESTED:
            if stored.get(name) is not None:
                self.places[f"{name}."] = self._checked(name, stored[name], dict)
        self.judged: set[str] = set()

    def read(self, *names: str, of: Any = None) -> Any:
        """Return a field's value, None where it is absent or null.

        Args:
            names (`str`):
                Its names; where several places or names hold a value, they must agree.
            of (`type`, *optional*):
                `int`, `float`, `bool`, `str`, `dict`, `list[int]` or `list[str]`.

        Raises:
            ValueError: If it is of another type, or two places disagree.
        """
        self.judged.update(names)
        for name in names:
            if name in self.given:
                return self.given[name]
        found = {where: self._checked(where, value, of) for where, value in self.holding(*names)}
        places = list(found)
        for other in places[1:]:
            if found[other] != found[places[0]]:
                self.refuse(
                    f"`{places[0]}` and `{other}` disagree: expected the same value, found {found[places[0]]!r} and "
                    f"{found[other]!r}."
                )
        return found[places[0]] if places else None

    def required(self, *names: str, of: Any = None) -> Any:
        """Return a field's value; it must have one."""
        value = self.read(*names, of=of)
        if value is None:
            self.refuse(
                f"`{names[0]}` is missing: expected a value, found none. Where you know it, give it: "
                f"`from_pretrained(..., {names[0]}=...)`."
            )
        return value

    def holding(self, *names: str) -> Iterator[tuple[str, Any]]:
        """Yield where the file holds a value for a field, and the value."""
        for prefix, place in self.places.items():
            for name in names:
                if place.get(name) is not None:
                    yield f"{prefix}{name}", place[name]

    def refuse(self, reason: str, trait: str = "") -> NoReturn:
        """Raise an error that names the file, what it is, and what is wrong."""
        what = f"this is {self.description}{trait}: " if self.description else ""
        raise ValueError(f"{self.source}: {what}{reason}")

    def check_neutral(self, values: dict[str, Any]) -> None:
        """Refuse every field that asks for a forward we do not run.

        Args:
            values (`dict[str, Any]`):
                What was read of the file, for fields that must equal another.
        """
        for name, (neutral, meaning) in REFUSED_UNLESS_NEUTRAL.items():
            self.judged.add(name)
            accepted = [values.get(one, one) if isinstance(one, str) else one for one in neutral]
            for where, value in self.holding(name):
                if value not in accepted:
                    expected = " or ".join(repr(one) for one in [*accepted, None])
                    self.refuse(
                        f"`{where}`: expected {expected}, found {value!r}.",
                        f" with {meaning}, which hf_treeflash does not run",
                    )

    def name_unjudged(self) -> None:
        """Warn of fields that neither `layouts.py` nor this file knows; they are left aside."""
        unjudged = [
            f"{prefix}{name}"
            for prefix, place in self.places.items()
            for name, value in place.items()
            if value is not None and name not in self.judged and name not in NOT_OF_THE_FORWARD
        ]
        if unjudged:
            logger.warning(
                f"{self.source}: hf_treeflash does not know {', '.join(f'`{name}`' for name in unjudged)} and leaves "
                "it aside. The text stays right; if it changes how the drafter is run, fewer tokens are accepted."
            )

    def _checked(self, where: str, value: Any, of: Any) -> Any:
        expected = {
            int: "an integer",
            float: "a number",
            bool: "true or false",
            str: "a string",
            dict: "a dictionary",
            list[int]: "a list of integers",
            list[str]: "a list of strings",
        }
        if of is not None and not is_a(value, of):
            self.refuse(f"`{where}`: expected {expected[of]}, found {value!r}.")
        return value


def is_a(value: Any, kind: Any) -> bool:
    """Return whether a JSON value is of a kind; true and false are no numbers."""
    if kind in (list[int], list[str]):
        (entry,) = kind.__args__
        return isinstance(value, list) and all(type(one) is entry for one in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


__all__ = ["StoredFields"]
