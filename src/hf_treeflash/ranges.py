"""The range of every number and name in a drafter's config: a file outside them is no drafter, or not a sound one."""

import math
from typing import Any

from transformers.activations import ACT2FN

# Wider than any drafter, and narrow enough to fail before memory or patience does. Both ends belong to the range.
INTEGERS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "draft_vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**18),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 4096),
    "max_position_embeddings": (1, 2**31),
    "sliding_window": (1, 2**31),
    "num_target_layers": (1, 4096),
    "block_size": (2, 256),
    "mask_token_id": (0, 2**24 - 1),
    "first_slot": (0, 1),
    "head_rank": (1, 2**13),
    "selector_top_k": (1, 1024),
    "conv_kernel_size": (0, 64),
    "conv_group_size": (1, 2**16),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "initializer_range": (0.0, 10.0),
    "rms_norm_eps": (0.0, 0.1),
    "attention_dropout": (0.0, 0.99),
    "output_multiplier": (1e-6, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
    "input_embedding_scale": (1e-6, 1e6),
}
TARGET_LAYER_IDS = (-1, 4095)  # -1 is the embedding
CHOICES: dict[str, tuple[str | None, ...]] = {
    "ar_head": (None, "swiglu", "markov", "selector"),
    "causal_layers": ("none", "sliding", "all"),
    "window_rule": ("inclusive", "strict", "context", "anchor"),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYER_TYPES = ("full_attention", "sliding_attention")
# By type, the parameters it cannot do without.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
}
ROPE_NUMBERS: dict[str, tuple[float, float]] = {
    "rope_theta": (1.001, 1e15),
    "partial_rotary_factor": (1e-3, 1.0),
    "factor": (1e-3, 1e6),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e4),
    "beta_slow": (1e-3, 1e4),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "original_max_position_embeddings": (1, 2**31),
}


def check_range(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Refuse what is no number of a range, both ends included.

    Raises:
        ValueError: Naming the field, what was found and what was expected.
    """
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not math.isfinite(value) or not least <= value <= most:
        kind = "an integer" if whole else "a number"
        raise ValueError(f"`{name}`: expected {kind} from {least} to {most}, found {value!r}.")


def check_numbers(config) -> None:
    """Check every number, name and list of a [`TreeFlashConfig`], each by itself.

    Raises:
        ValueError: Naming the field, what was found and what was expected.
    """
    for ranges, whole in ((INTEGERS, True), (NUMBERS, False)):
        for name, (least, most) in ranges.items():
            if getattr(config, name) is not None:
                check_range(name, getattr(config, name), least, most, whole)
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            expected = ", ".join(map(repr, choices))
            raise ValueError(f"`{name}`: expected one of {expected}, found {getattr(config, name)!r}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act`: expected an activation of transformers, found {config.hidden_act!r}.")
    for index, layer in enumerate(config.target_layer_ids):
        check_range(f"target_layer_ids[{index}]", layer, *TARGET_LAYER_IDS, whole=True)
    check_rope(config)


def check_dtype(dtype: Any) -> None:
    """Refuse the name of a dtype that weights are not stored in.

    Raises:
        ValueError: With what was found and what was expected.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"`dtype`: expected one of {', '.join(map(repr, DTYPES))}, found {dtype!r}.")


def check_rope(config) -> None:
    """Check the numbers of the rotary embedding, or of one per kind of layer.

    Raises:
        ValueError: Naming the field, what was found and what was expected.
    """
    parameters = config.rope_parameters or {}
    own_kinds = dict.fromkeys(config.layer_types) if has_own_rope(parameters) else ()
    sets = {f"rope_parameters.{kind}": parameters.get(kind) for kind in own_kinds} or {"rope_parameters": parameters}
    for name, own in sets.items():
        if not isinstance(own, dict):
            raise ValueError(f"`{name}`: expected the parameters of a rotary embedding, found {own!r}.")
        kind = own.get("rope_type")
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise ValueError(
                f"`{name}.rope_type`: expected one of {', '.join(map(repr, ROPE_TYPES))}, found {kind!r}."
            )
        for field in ROPE_TYPES[kind]:
            if own.get(field) is None:
                raise ValueError(f"`{name}.{field}`: expected a value for rope type {kind!r}, found none.")
        for field, value in own.items():
            if field in ROPE_NUMBERS and value is not None:
                check_range(f"{name}.{field}", value, *ROPE_NUMBERS[field])
        check_frequencies(name, own, config.head_dim)


def check_frequencies(name: str, own: dict[str, Any], head_dim: int) -> None:
    """Refuse rotary parameters that do not give one frequency per pair of a head."""
    rotated = int(head_dim * (own.get("partial_rotary_factor") or 1.0))
    if rotated < 2 or rotated % 2:
        raise ValueError(f"`{name}`: expected an even number of rotated entries per head, found {rotated}.")
    for field in ("short_factor", "long_factor"):
        factors = own.get(field)
        if factors is None:
            continue
        if not isinstance(factors, list) or len(factors) != rotated // 2:
            raise ValueError(f"`{name}.{field}`: expected a list of {rotated // 2} numbers, found {factors!r}.")
        for index, factor in enumerate(factors):
            check_range(f"{name}.{field}[{index}]", factor, *ROPE_NUMBERS["factor"])
    if own["rope_type"] == "llama3" and own["low_freq_factor"] >= own["high_freq_factor"]:
        raise ValueError(
            f"`{name}.low_freq_factor`: expected less than `high_freq_factor` {own['high_freq_factor']}, found "
            f"{own['low_freq_factor']}."
        )


def has_own_rope(parameters: dict[str, Any]) -> bool:
    """Return whether rotary parameters are stored by kind of layer."""
    return any(kind in parameters for kind in LAYER_TYPES)


__all__ = ["INTEGERS", "LAYER_TYPES", "check_dtype", "check_numbers", "check_range", "has_own_rope"]
