"""Every published drafter layout: how to tell it, how its fields are to be run, what its tensors are called."""

from typing import Any, NamedTuple

from .configuration_treeflash import TreeFlashConfig
from .ranges import has_own_rope
from .stored_fields import StoredFields

# Tensors that published layouts call differently, by regular expression.
NAMES = {
    r"^model\.": "",
    r"^encoder\.fc\.": "fc.",
    r"^encoder\.output_norm_enc\.": "hidden_norm.",
    r"^ar_approximation\.ug\.": "ar_head.up_gate_proj.",
    r"^ar_approximation\.d\.": "ar_head.down_proj.",
    r"^ar_approximation\.norm\.": "ar_head.norm.",
    r"^logit_head\.": "",
    r"^markov_head\.": "",
    r"^markov_w1\.": "ar_head.previous.",
    r"^markov_w2\.": "ar_head.following.",
    r"^gate_proj\.": "ar_head.gate.",
    r"^candidate_selector\.predecessor_codebook$": "ar_head.previous.weight",
    r"^candidate_selector\.successor_codebook$": "ar_head.following.weight",
    r"^candidate_selector\.hidden_projection\.": "ar_head.project.",
}
# What a file may carry of its target, which a drafter borrows instead, and a head that says how sure the others are.
PASSED_OVER = (
    *("embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "verifier_lm_head.weight", "t2d"),
    *("confidence_head.proj.weight", "confidence_head.proj.bias", "confidence_proj.weight", "confidence_proj.bias"),
)

BACKBONE: dict[str, Any] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "hidden_act": str,
    "max_position_embeddings": int,
    "initializer_range": float,
    "rms_norm_eps": float,
    "attention_bias": bool,
    "attention_dropout": float,
    "num_target_layers": int,
    "bos_token_id": int,
    "eos_token_id": None,
    "pad_token_id": int,
    "dtype": str,
}
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Drafters of another kind, by a part of their class' name.
OTHER_KINDS = {
    "laguna": "a Laguna DFlash drafter, whose layers have gates and fused projections",
    "gemma4dspark": "a Gemma 4 DSpark drafter, whose layers have Gemma's norms and rotary embeddings",
    "peagle": "a P-EAGLE drafter",
    "eagle": "an EAGLE drafter",
    "medusa": "a Medusa drafter",
}


class Layout(NamedTuple):
    """What a stored config says.

    Attributes:
        description (`str`):
            What the file is, as a sentence would call it.
        values (`dict[str, Any]`):
            Arguments of [`TreeFlashConfig`].
        names (`dict[str, str]`):
            Regular expressions that rename its tensors.
    """

    description: str
    values: dict[str, Any]
    names: dict[str, str]


def read_layout(stored: dict[str, Any], source: str = "config.json", given: dict[str, Any] | None = None) -> Layout:
    """Translate a stored config of any layout.

    Args:
        stored (`dict[str, Any]`):
            The parsed `config.json`.
        source (`str`, *optional*):
            How errors name it.
        given (`dict[str, Any]`, *optional*):
            Fields of [`TreeFlashConfig`] that go before those of the file.

    Raises:
        ValueError: If it is of no known layout, incomplete, or asks for a forward that we do not run; the message
            names the file, what it is, the field, what was expected and what was found.
    """
    fields = StoredFields(stored, source, given)
    if stored.get("model_type") == "treeflash":
        return Layout("a hf_treeflash drafter", _own(fields), {})
    kind = _kind(fields)
    fields.description = _description(fields, kind)
    values = _backbone(fields) | _block(fields, kind)
    values |= _attention(fields, kind, values["num_hidden_layers"])
    values["rope_parameters"] = _rope(fields, values["layer_types"])
    values |= _output(fields, values["vocab_size"]) | _head(fields)
    fields.check_neutral(values)
    fields.name_unjudged()
    names = dict(NAMES)
    if values["draft_vocab_size"] is not None:
        names[r"^lm_head\."] = "draft_lm_head."
    # Nothing said is a default of the config, but of the vocabulary: that is the target's then.
    return Layout(fields.description, {k: v for k, v in values.items() if v is not None or k == "vocab_size"}, names)


def _own(fields: StoredFields) -> dict[str, Any]:
    stored = fields.places[""]
    fields.judged.update(TreeFlashConfig.__annotations__)
    fields.name_unjudged()
    return {name: value for name, value in stored.items() if name != "model_type"}


def _kind(fields: StoredFields) -> str:
    """Return which layout a config is in, refusing drafters that are no block drafters of the DFlash family."""
    stored = fields.places[""]
    classes = "".join(fields.read("architectures", of=list[str]) or []).lower().replace("_", "")
    speculators = fields.read("speculators_config", of=dict) or {}
    model = fields.read("speculators_model_type", of=str) or speculators.get("algorithm")
    named = classes + str(model or "").lower().replace("_", "").replace("-", "")
    for part, what in OTHER_KINDS.items():
        if part in named:
            fields.refuse(f"this is {what}. hf_treeflash reads DFlash, DSpark and TreeFlash drafters.")
    if speculators or model:
        if model not in (None, "dflash", "dspark", "dflash2"):
            fields.refuse(
                f"this is a speculators {model!r} drafter: `speculators_model_type`: expected 'dflash', 'dspark' or "
                f"'dflash2', found {model!r}."
            )
        return "speculators"
    if "treeflash_config" in stored:
        return "official"
    if "dflash_config" in stored or "dflash2" in classes:
        return "dflash"
    if "target_layer_ids" in stored:
        return "deepspec" if "dspark" in classes or "markov_rank" in stored else "native"
    if "eagle_aux_hidden_state_layer_ids" in stored or "eagle_config" in stored:
        fields.refuse(f"this is {OTHER_KINDS['eagle']}. hf_treeflash reads DFlash, DSpark and TreeFlash drafters.")
    fields.refuse(
        "this is of no known drafter layout: expected model_type 'treeflash', a `dflash_config`, a "
        "`treeflash_config`, a `speculators_config` or top-level `target_layer_ids`, found model_type "
        f"{stored.get('model_type')!r} with none of these."
    )


def _description(fields: StoredFields, kind: str) -> str:
    """Return what a file is, from the fields that say so."""
    maker = {
        "official": "an official TreeFlash",
        "dflash": "a DFlash",
        "native": "a transformers-native DFlash",
        "deepspec": "a DeepSpec DSpark" if fields.read("markov_rank", of=int) else "a DeepSpec DFlash",
        "speculators": f"a speculators {fields.read('speculators_model_type') or 'dflash'}",
    }[kind]
    parts = []
    if fields.read("projector_type", of=str) == "domino":
        parts.append("a Domino head")
    if fields.read("markov_rank", of=int):
        parts.append(f"a {fields.read('markov_head_type', of=str) or 'vanilla'} Markov head")
    if fields.read("enable_confidence_head", of=bool):
        parts.append("a confidence head")
    if fields.read("selector_rank", of=int):
        parts.append("DFlash-2's selector")
    if fields.read("conv_kernel_size", of=int):
        parts.append("DFlash-2's convolutions")
    kept, whole = fields.read("draft_vocab_size", of=int), fields.read("vocab_size", of=int)
    if kept is not None and kept != whole:
        parts.append(f"a vocabulary of {kept} tokens")
    return f"{maker} drafter" + (f" with {' and '.join(parts)}" if parts else "")


def _backbone(fields: StoredFields) -> dict[str, Any]:
    """Return what shapes the layers."""
    values = {name: fields.read(name, of=kind) for name, kind in BACKBONE.items()}
    for name in REQUIRED:
        fields.required(name)
    values["dtype"] = fields.read("dtype", "torch_dtype", of=str)
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    values["head_dim"] = values["head_dim"] or values["hidden_size"] // max(1, heads)
    return values


def _block(fields: StoredFields, kind: str) -> dict[str, Any]:
    """Return the block: its slots, what fills them, which slot predicts first, and the target layers it reads."""
    taps = fields.read("target_layer_ids", of=list[int])
    states = fields.read("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids", of=list[int])
    if states is not None:  # these number the target's states from the embedding on, so layer l is entry l + 1
        if taps not in (None, [state - 1 for state in states]):
            fields.refuse(f"`target_layer_ids`: expected {[state - 1 for state in states]}, found {taps}.")
        taps = [state - 1 for state in states]
    if taps is None and (kind == "speculators" or fields.read("num_target_layers", of=int) is None):
        fields.refuse(
            "`target_layer_ids` is missing: expected the target's layers to read, or `num_target_layers` to derive "
            "them from, found neither."
        )
    dspark = kind == "deepspec" or "dspark" in (fields.read("speculators_model_type"), fields.read("projector_type"))
    shifted = fields.read("sample_from_anchor", "shift_label", of=bool)
    return {
        "block_size": fields.required("block_size", of=int),
        "mask_token_id": fields.required("mask_token_id", of=int),
        "first_slot": 0 if (dspark if shifted is None else shifted) else 1,
        "target_layer_ids": taps,
    }


def _attention(fields: StoredFields, kind: str, num_layers: int) -> dict[str, Any]:
    """Return which layers have a window, what it shows, and which see no later slot."""
    layer_types = fields.read("layer_types", of=list[str])
    window = fields.read("swa_window_size", "sliding_window", of=int)
    by_field, first = fields.read("use_sliding_window", of=bool), fields.read("max_window_layers", of=int)
    if layer_types is not None and "sliding_attention" in layer_types and by_field is False:
        fields.refuse(
            "`use_sliding_window` and `layer_types` disagree: expected no sliding layers or true, found "
            f"{layer_types} and false."
        )
    rule = {"native": "inclusive", "speculators": "anchor"}.get(kind, "strict")
    if layer_types is None and window is not None and (by_field or kind == "native"):
        # As Qwen3's config derives them, and as transformers' own drafters do.
        first = 0 if kind == "native" else 28 if first is None else first
        layer_types = ["full_attention" if i < first else "sliding_attention" for i in range(min(num_layers, 256))]
    sliding = "sliding_attention" in (layer_types or ())
    causal = fields.read("is_causal", "causal", "causal_head", of=bool)
    whole = fields.read("sliding_window_non_causal", of=bool) if kind == "speculators" else kind == "native"
    if causal is not None:
        causal_layers = "all" if causal else "none"
    else:
        causal_layers = "sliding" if sliding and not whole else "none"
    if fields.read("use_swa", of=bool) and not sliding:
        layer_types, rule = ["sliding_attention"] * min(num_layers, 256), "context"
    return {
        "layer_types": layer_types,
        "sliding_window": window,
        "window_rule": rule if "sliding_attention" in (layer_types or ()) else None,
        "causal_layers": causal_layers,
    }


def _rope(fields: StoredFields, layer_types: list[str] | None) -> dict[str, Any]:
    """Return the rotary parameters in the form of transformers 5, whatever form they are stored in."""
    stored = fields.read("rope_parameters", "rope_scaling", of=dict) or {}
    outer = {"rope_theta": fields.read("rope_theta", of=float)}
    outer["partial_rotary_factor"] = fields.read("partial_rotary_factor", of=float)

    def whole(own: Any) -> Any:
        if not isinstance(own, dict):
            return own
        for name, value in outer.items():
            if value is not None and own.get(name, value) != value:
                fields.refuse(f"`{name}` and `rope_parameters` disagree: found {value!r} and {own[name]!r}.")
        own = {**{name: value for name, value in outer.items() if value is not None}, **own}
        kind = own.pop("type", "default")
        return {"rope_type": kind, **own}

    if not has_own_rope(stored):
        return whole(stored)
    return {kind: whole(stored.get(kind)) for kind in dict.fromkeys(layer_types or ["full_attention"])}


def _output(fields: StoredFields, vocab_size: int | None) -> dict[str, Any]:
    """Return how embeddings come in and logits go out."""
    neox = fields.read("is_neox_style", "rope_is_neox_style", of=bool)
    kept = fields.read("draft_vocab_size", of=int)
    return {
        "input_embedding_scale": fields.read("input_embedding_scale", of=float),
        "output_multiplier": fields.read("output_multiplier", "logit_scale", of=float),
        "final_logit_softcapping": fields.read("final_logit_softcapping", of=float),
        "rope_interleaved": neox is False,
        "draft_vocab_size": None if kept == vocab_size else kept,
    }


def _head(fields: StoredFields) -> dict[str, Any]:
    """Return which head conditions a slot on the token before it, and DFlash-2's convolutions."""
    swiglu = fields.read("ar_approximation", of=str)
    if swiglu not in (None, "swiglu"):
        fields.refuse(f"`ar_approximation`: expected 'swiglu' or null, found {swiglu!r}.")
    projector = fields.read("projector_type", of=str)
    if projector not in (None, "dflash", "dspark"):
        fields.refuse(f"`projector_type`: expected 'dflash', 'dspark' or null, found {projector!r}.")
    markov, selector = fields.read("markov_rank", of=int), fields.read("selector_rank", of=int)
    kind = fields.read("markov_head_type", of=str) or "vanilla"
    if markov and kind not in ("vanilla", "gated"):
        fields.refuse(f"`markov_head_type`: expected 'vanilla' or 'gated', found {kind!r}.")
    ranks = {"swiglu": swiglu, "markov": markov, "selector": selector}
    heads = [name for name, rank in ranks.items() if rank]
    if len(heads) > 1:
        fields.refuse(f"`markov_rank` and `selector_rank`: expected one head, found {' and '.join(heads)}.")
    # How sure the head is of itself decides nothing here.
    fields.judged.update(("enable_confidence_head", "confidence_head_with_markov"))
    taps = fields.read("conv_kernel_size", of=int)
    return {
        "ar_head": heads[0] if heads else None,
        "head_rank": markov or selector or None,
        "head_gated": bool(markov) and kind == "gated",
        "selector_top_k": (fields.required if selector else fields.read)("selector_top_k", of=int),
        "conv_kernel_size": taps,
        "conv_group_size": (fields.required if taps else fields.read)("conv_group_size", of=int),
    }


__all__ = ["PASSED_OVER", "Layout", "read_layout"]
