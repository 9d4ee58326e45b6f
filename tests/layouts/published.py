"""Synthetic checkpoints in every published layout: right names, shapes and fields, random weights."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.helpers.tiny import VOCAB

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 48, 4, 2, 8, 2
TAPS, BLOCK, MASK = [0, 2], 5, 3
FULL, SLIDING = "full_attention", "sliding_attention"
KEPT = [0, 1, 2, 4, 5, 6, 8, 9, 11, 12, 15, 16, 19, 20, 21, 23]  # tokens of the reduced vocabularies
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Published:
    """One layout as somebody published it.

    Attributes:
        name (`str`): The row of the table, and what is particular.
        config (`dict`): Its `config.json`.
        tensors (`dict[str, torch.Tensor]`): Its tensors.
        refusal (`str`, *optional*): What the error says, as a regular expression; None if it is read.
        target (`str`): Family of the tiny target.
        files (`tuple[str, ...]`): Other files of the repository.
    """

    name: str
    config: dict
    tensors: dict[str, torch.Tensor]
    refusal: str | None = None
    target: str = "qwen3"
    files: tuple[str, ...] = field(default=())

    def changed(self, **fields: Any) -> "Published":
        """Return a copy with other fields; None takes one away, `a__b` is field b of dictionary a."""
        config = copy.deepcopy(self.config)
        for name, value in fields.items():
            *outer, last = name.split("__")
            place = config
            for key in outer:
                place = place.setdefault(key, {})
            if value is None:
                place.pop(last, None)
            else:
                place[last] = value
        return Published(self.name, config, self.tensors, self.refusal, self.target, self.files)


def qwen3(**extra) -> dict:
    """Return the fields that every drafter with Qwen3's layers shares."""
    return {
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.57.3",
        "use_cache": True,
        **extra,
    }


def backbone(seed: int = 1, layers: int = LAYERS, taps: int = len(TAPS), bias: bool = False) -> dict:
    """Return the tensors that every DFlash drafter has."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    def weight_of_norm(size: int) -> torch.Tensor:
        return 1 + random(size)

    tensors = {"fc.weight": random(HIDDEN, taps * HIDDEN)}
    for layer in range(layers):
        name = f"layers.{layer}"
        for part, rows, columns in (
            ("q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("o_proj", HIDDEN, HEADS * HEAD_DIM),
        ):
            tensors[f"{name}.self_attn.{part}.weight"] = random(rows, columns)
            if bias:
                tensors[f"{name}.self_attn.{part}.bias"] = random(rows)
        for part, rows, columns in (
            ("gate_proj", INTERMEDIATE, HIDDEN),
            ("up_proj", INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            tensors[f"{name}.mlp.{part}.weight"] = random(rows, columns)
        for part, size in (
            ("self_attn.q_norm", HEAD_DIM),
            ("self_attn.k_norm", HEAD_DIM),
            ("input_layernorm", HIDDEN),
            ("post_attention_layernorm", HIDDEN),
        ):
            tensors[f"{name}.{part}.weight"] = weight_of_norm(size)
    return tensors | {"hidden_norm.weight": weight_of_norm(HIDDEN), "norm.weight": weight_of_norm(HIDDEN)}


def extra(seed: int = 7, **shapes: tuple[int, ...]) -> dict:
    """Return more random tensors; `__` in a name is a dot."""
    generator = torch.Generator().manual_seed(seed)
    return {name.replace("__", "."): torch.randn(*s, generator=generator) * 0.2 for name, s in shapes.items()}


def carried() -> dict:
    """Return a target's tensors as drafters carry them; their numbers must never matter."""
    return {"embed_tokens.weight": torch.zeros(VOCAB, HIDDEN), "lm_head.weight": torch.zeros(VOCAB, HIDDEN)}


def dflash(nested: dict | None = None, **fields) -> dict:
    """Return a config as z-lab publishes it."""
    own = {"mask_token_id": MASK, "target_layer_ids": TAPS, **(nested or {})}
    standard = {
        "layer_types": [FULL] * LAYERS,
        "num_target_layers": 4,
        "block_size": BLOCK,
        "max_window_layers": LAYERS,
    }
    standard |= {
        "use_sliding_window": False,
        "sliding_window": None,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    }
    return {**qwen3(architectures=["DFlashDraftModel"]), **standard, "dflash_config": own, **fields}


def sliding(kinds=(SLIDING, FULL), window: int = 4, **fields) -> dict:
    """Return the fields of a drafter with sliding layers."""
    return {"layer_types": list(kinds), "sliding_window": window, "use_sliding_window": True, **fields}


def deepspec(**fields) -> dict:
    """Return a config as DeepSpec publishes it."""
    own = {"target_layer_ids": TAPS, "block_size": BLOCK, "mask_token_id": MASK, "markov_rank": 0, "num_anchors": 512}
    own |= {"markov_head_type": "vanilla", "enable_confidence_head": False, "confidence_head_with_markov": False}
    return {**qwen3(architectures=["Qwen3DSparkModel"], layer_types=[FULL] * LAYERS), **own, **fields}


def speculators(layer: dict | None = None, **fields) -> dict:
    """Return a config as vLLM's speculators write it."""
    own = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.4.0",
        "speculators_config": {"algorithm": "dflash", "verifier": {"name_or_path": "a/target"}},
        "transformer_layer_config": {**qwen3(layer_types=[FULL] * LAYERS), **(layer or {})},
        "draft_vocab_size": VOCAB,
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in TAPS],
        "sliding_window_non_causal": False,
    }
    return {**own, **fields}


def native(**fields) -> dict:
    """Return a config as transformers' own drafters have it, which says nothing of the vocabulary."""
    config = {**qwen3(), "architectures": ["MuseGlimmerAssistantModel"], "model_type": "muse_glimmer_assistant"}
    config |= {"layer_types": [SLIDING] * LAYERS, "sliding_window": 4, "mask_token_id": MASK, "block_size": BLOCK}
    del config["vocab_size"], config["rope_theta"]
    return {
        **config,
        "target_layer_ids": TAPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        **fields,
    }


def native_names(tensors: dict) -> dict:
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    return {names.get(name, name): value for name, value in tensors.items()}


def swiglu() -> dict:
    return extra(
        ar_approximation__ug__weight=(2 * INTERMEDIATE, 2 * HIDDEN),
        ar_approximation__ug__bias=(2 * INTERMEDIATE,),
        ar_approximation__d__weight=(HIDDEN, INTERMEDIATE),
        ar_approximation__norm__weight=(HIDDEN,),
    )


def markov(rank: int = 4, rows: int = VOCAB, gated: bool = False, prefix: str = "") -> dict:
    """Return the tensors of DSpark's Markov head, random enough to matter."""
    tensors = extra(markov_w1__weight=(VOCAB, rank), markov_w2__weight=(rows, rank))
    tensors = {name: 3 * value for name, value in tensors.items()}
    if gated:
        tensors |= extra(gate_proj__weight=(rank, HIDDEN + rank), gate_proj__bias=(rank,))
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def confidence(name: str = "confidence_head.proj", rank: int = 4) -> dict:
    """Return a head that says how sure the other one is."""
    return {f"{name}.weight": torch.ones(1, HIDDEN + rank), f"{name}.bias": torch.ones(1)}


def selector(rank: int = 4) -> dict:
    """Return the tensors of DFlash-2's selector, random enough to matter."""
    names = {"predecessor_codebook": (VOCAB, rank), "successor_codebook": (VOCAB, rank)}
    names["hidden_projection.weight"] = (rank, HIDDEN)
    return {f"candidate_selector.{name}": 1.5 * extra(one=shape)["one"] for name, shape in names.items()}


def convolutions(taps: int = 2, group: int = 8) -> dict:
    """Return the tensors of DFlash-2's convolutions."""
    tensors = {}
    for seed, name in enumerate(f"layers.{i}.{part}_conv" for i in range(LAYERS) for part in ("attention", "mlp")):
        shapes = {"kernel": (2, taps, HIDDEN), "projection": (2 * taps * HIDDEN // group, HIDDEN)}
        own = extra(seed, **shapes)
        own["kernel"][:, 0] += 1
        own["projection"] *= 0.2
        tensors |= {f"{name}.base_kernel": own["kernel"], f"{name}.kernel_projection.weight": own["projection"]}
    return tensors


def reduced() -> dict:
    """Return an output layer over some tokens, and the maps between their numbers and the target's."""
    kept = torch.tensor(KEPT)
    holds = torch.zeros(VOCAB, dtype=torch.bool)
    holds[kept] = True
    return {**extra(lm_head__weight=(len(KEPT), HIDDEN)), "d2t": kept - torch.arange(len(KEPT)), "t2d": holds}


DSPARK = {"markov_rank": 4, "markov_head_type": "vanilla"}
SURE = {"enable_confidence_head": True, "confidence_head_with_markov": True}
DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 5}
TREEFLASH = {"treeflash_config": {"ar_approximation": "swiglu", "candidate_tokens": 24}}
PLAIN = backbone()

READ = [
    Published("TreeFlash", dflash(**TREEFLASH), {f"model.{k}": v for k, v in PLAIN.items()} | swiglu()),
    Published("DFlash", dflash(), PLAIN),
    Published("DFlash, llama3 rope", dflash(rope_scaling=LLAMA3), PLAIN),
    Published(
        "DFlash, yarn, biases, nested block size",
        dflash({"block_size": BLOCK}, block_size=None, attention_bias=True, rope_scaling=YARN),
        backbone(bias=True),
    ),
    Published("DFlash, taps by rule", dflash({"target_layer_ids": None}, num_target_layers=4), PLAIN),
    Published("DFlash SWA, some layers", dflash(**sliding()), PLAIN),
    Published("DFlash SWA, all layers", dflash(**sliding((SLIDING, SLIDING), 3)), PLAIN),
    Published(
        "DFlash SWA on Gemma",
        dflash({"final_logit_softcapping": 30.0, "input_embedding_scale": 5.0}, **sliding()),
        PLAIN,
        target="gemma2",
    ),
    Published("DFlash on Gemma, which says nothing", dflash(), PLAIN, target="gemma2"),
    Published("DFlash SWA, is_causal false", dflash(is_causal=False, **sliding(window=3)), PLAIN),
    Published("DFlash, dflash_config.causal", dflash({"causal": True}), PLAIN),
    Published("JetSpec", dflash({"causal_head": True}), PLAIN),
    Published("JetSpec SWA", dflash({"causal_head": True}, **sliding()), PLAIN),
    Published("ModelOpt SWA", dflash({"use_swa": True, "swa_window_size": 4, "causal": False}), PLAIN),
    Published(
        "Nemotron DFlash",
        dflash(
            {"sample_from_anchor": False},
            has_embed_tokens=True,
            eagle_aux_hidden_state_layer_ids=[tap + 1 for tap in TAPS],
            rope_scaling={**YARN, "factor": 128.0},
        ),
        PLAIN | carried(),
    ),
    Published("DeepSpec DFlash", deepspec(), PLAIN | carried()),
    Published("DeepSpec DFlash, tap of the embedding", deepspec(target_layer_ids=[-1, 1]), PLAIN | carried()),
    Published("SpecForge DFlash", dflash({"projector_type": "dflash"}), PLAIN),
    Published("SpecForge DSpark of rank 0", dflash({"projector_type": "dspark", "markov_rank": 0}), PLAIN),
    Published("ModelOpt, shifted labels", dflash({"shift_label": True}), PLAIN),
    Published("speculators", speculators(), PLAIN | carried()),
    Published("speculators SWA", speculators(sliding(window=4)), PLAIN),
    Published("speculators SWA, not causal", speculators(sliding(window=3), sliding_window_non_causal=True), PLAIN),
    Published("speculators, sample_from_anchor", speculators(sample_from_anchor=True), PLAIN),
    Published(
        "speculators DSpark of rank 0",
        speculators(
            speculators_model_type="dspark",
            markov_rank=0,
            architectures=["DSparkDraftModel"],
            sliding_window_non_causal=None,
        ),
        PLAIN,
    ),
    Published("speculators, reduced vocabulary", speculators(draft_vocab_size=len(KEPT)), PLAIN | reduced()),
    Published("DeepSpec DSpark", deepspec(**DSPARK), PLAIN | carried() | markov(prefix="markov_head.")),
    Published(
        "DeepSpec DSpark, gated, with a confidence head",
        deepspec(markov_rank=4, markov_head_type="gated", **SURE),
        PLAIN | carried() | markov(gated=True, prefix="markov_head.") | confidence(),
    ),
    Published(
        "SpecForge DSpark, old names",
        dflash({"projector_type": "dspark", **DSPARK}),
        PLAIN | markov(prefix="logit_head.markov_head."),
    ),
    Published(
        "ModelOpt DSpark",
        dflash(
            {"projector_type": "dspark", "shift_label": True, "markov_rank": 4, "markov_head_type": "gated", **SURE}
        ),
        PLAIN | markov(gated=True) | confidence("confidence_proj"),
    ),
    Published(
        "DSpark in place, causal",
        dflash({"projector_type": "dspark", "sample_from_anchor": False, "causal": True, **DSPARK}),
        PLAIN | markov(),
    ),
    Published(
        "speculators DSpark",
        speculators(speculators_model_type="dspark", **DSPARK),
        PLAIN | carried() | markov(prefix="markov_head."),
    ),
    Published(
        "speculators DSpark, reduced vocabulary",
        speculators(speculators_model_type="dspark", draft_vocab_size=len(KEPT), **DSPARK),
        PLAIN | reduced() | markov(rows=len(KEPT), prefix="markov_head."),
    ),
    Published(
        "DFlash-2",
        dflash(DFLASH2, architectures=["DFlash2DraftModel"], is_causal=False, **sliding(window=3)),
        PLAIN | selector() | convolutions(),
    ),
    Published(
        "DFlash-2, scaled and capped logits",
        dflash(
            {"output_multiplier": 0.5, "final_logit_softcapping": 2.0, **DFLASH2},
            architectures=["DFlash2DraftModel"],
            is_causal=False,
        ),
        PLAIN | selector() | convolutions(),
    ),
    Published(
        "speculators DFlash-2",
        speculators(speculators_model_type="dflash2", is_causal=False, **DFLASH2),
        PLAIN | selector() | convolutions(),
    ),
    Published(
        "convolutions of three taps, no selector",
        dflash({"conv_kernel_size": 3, "conv_group_size": 16}),
        PLAIN | convolutions(3, 16),
    ),
    Published(
        "DFlash-2, flat",
        dflash(
            DFLASH2,
            architectures=["DFlash2DraftModel"],
            dflash_config=None,
            target_layer_ids=TAPS,
            mask_token_id=MASK,
            **sliding(window=3),
            **DFLASH2,
        ),
        PLAIN | selector() | convolutions(),
    ),
    Published("selector, no convolutions", dflash({"selector_rank": 4, "selector_top_k": 5}), PLAIN | selector()),
    Published("transformers native", native(), native_names(PLAIN)),
    Published(
        "transformers native on Muse Glimmer",
        native(layer_types=[FULL, SLIDING]),
        native_names(PLAIN),
        target="muse",
    ),
    Published(
        "rope by kind of layer",
        dflash(
            **sliding(),
            rope_theta=None,
            rope_parameters={
                FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        PLAIN,
    ),
    Published("neighbours rotated", dflash(is_neox_style=False), PLAIN),
    Published("part of a head rotated", dflash(partial_rotary_factor=0.5), PLAIN),
    Published(
        "part of a head, neighbours rotated", dflash(partial_rotary_factor=0.5, rope_is_neox_style=False), PLAIN
    ),
    Published("scaled embedding", dflash({"input_embedding_scale": 0.25}), PLAIN),
    Published("scaled and capped logits", dflash({"output_multiplier": 0.2, "final_logit_softcapping": 2.0}), PLAIN),
    Published("scaled logits", dflash(logit_scale=1.5), PLAIN),
    Published(
        "window by max_window_layers",
        dflash(layer_types=None, use_sliding_window=True, max_window_layers=1, sliding_window=4),
        PLAIN,
    ),
]


def packed() -> dict:
    """Return a backbone whose projections are four-bit numbers in bytes."""
    return {
        name: torch.zeros(value.shape[0], value.shape[1] // 2, dtype=torch.uint8) if "proj" in name else value
        for name, value in PLAIN.items()
    }


MIMO = {"use_swa": True, "swa_window_size": 4, "attention_value_scale": 0.612, "block_size": 8}
DOMINO = extra(
    prefix_gru__weight_ih_l0=(3 * 16, HIDDEN),
    prefix_gru__weight_hh_l0=(3 * 16, 16),
    embed_proj__0__weight=(8, HIDDEN + 16),
    embed_proj__2__weight=(VOCAB, 8),
)
SINKS = extra(layers__0__self_attn__attention_sink_bias=(HEADS,), layers__1__self_attn__attention_sink_bias=(HEADS,))

REFUSED = [
    Published(
        "MiMo",
        dflash({**MIMO, "attention_sink_bias": True, "attention_value_scale": None}, layer_types=None, block_size=8),
        PLAIN | SINKS,
        r"config\.json: this is a DFlash drafter with attention sinks, which hf_treeflash does not run: "
        r"`dflash_config\.attention_sink_bias`: expected False or None, found True",
    ),
    Published(
        "MiMo, sinks in the tensors only",
        dflash({**MIMO, "attention_value_scale": 1.0}, layer_types=None, block_size=8),
        PLAIN | SINKS,
        r"model\.safetensors: this is a DFlash drafter with attention sinks, which hf_treeflash does not read",
    ),
    Published(
        "MiMo, sinks off",
        dflash(MIMO, layer_types=None, block_size=8),
        PLAIN,
        r"with scaled attention values, .*`dflash_config\.attention_value_scale`: expected 1 or None, found 0\.612",
    ),
    Published(
        "MiMo, mask embedding",
        dflash(),
        PLAIN,
        r"mask_embedding\.pt: this is a DFlash drafter with a mask embedding of its own",
        files=("mask_embedding.pt",),
    ),
    Published(
        "MiMo, values of another width",
        dflash(v_head_dim=16),
        PLAIN,
        r"with values of another width than keys, .*`v_head_dim`: expected 8 or None, found 16",
    ),
    Published(
        "Nemotron DFlash, no block size",
        dflash({"sample_from_anchor": False}, block_size=None),
        PLAIN,
        r"json: this is a DFlash drafter: `block_size` is missing: .*`from_pretrained\(\.{3}, block_size=\.{3}\)`",
    ),
    Published(
        "Nemotron DSpark",
        dflash({"markov_rank": 4, "sample_from_anchor": False, "causal": True, "use_swa": True, "swa_window_size": 4}),
        PLAIN | SINKS | extra(markov_w1__weight=(VOCAB, 4), markov_w2__weight=(VOCAB, 4)),
        r"this is a DFlash drafter with a vanilla Markov head with attention sinks, which hf_treeflash does not read",
    ),
    Published(
        "DSpark with a state",
        deepspec(markov_rank=4, markov_head_type="rnn"),
        PLAIN | markov(prefix="markov_head.") | extra(markov_head__joint_proj__weight=(12, HIDDEN + 8)),
        r"this is a DeepSpec DSpark drafter with a rnn Markov head: `markov_head_type`: expected 'vanilla' or "
        r"'gated', found 'rnn'",
    ),
    Published(
        "DSpark whose state is in the tensors only",
        deepspec(**DSPARK),
        PLAIN | markov(prefix="markov_head.") | extra(markov_head__joint_proj__weight=(12, HIDDEN + 8)),
        r"with a DSpark head with a state, which hf_treeflash does not read",
    ),
    Published(
        "Markov head named but missing", deepspec(**DSPARK), PLAIN, r"Markov head, but tensor 'ar_head\.\S+' is"
    ),
    Published(
        "Markov head in the tensors only",
        dflash(),
        PLAIN | markov(),
        r"with a DSpark Markov head, which the config does not name, which hf_treeflash",
    ),
    Published(
        "convolutions in the tensors only",
        dflash(),
        PLAIN | convolutions(),
        r"with DFlash-2's convolutions, which the config does not name",
    ),
    Published(
        "convolutions named but missing",
        dflash(DFLASH2),
        PLAIN | selector(),
        r"DFlash-2's convolutions, but tensor 'layers\.0\.attention_conv\.base_kernel' is missing",
    ),
    Published(
        "selector of unknown width",
        dflash({**DFLASH2, "selector_top_k": None}),
        PLAIN | selector() | convolutions(),
        r"with DFlash-2's selector and DFlash-2's convolutions: `selector_top_k` is missing",
    ),
    Published(
        "two heads",
        dflash({**DFLASH2, **DSPARK}),
        PLAIN | selector() | markov(),
        r"expected one head, found markov and",
    ),
    Published(
        "selector over a reduced vocabulary",
        speculators(speculators_model_type="dflash2", draft_vocab_size=len(KEPT), **DFLASH2),
        PLAIN | reduced() | selector() | convolutions(),
        r"`draft_vocab_size`: expected None beside a selector, found 16",
    ),
    Published(
        "NVFP4",
        dflash(),
        packed(),
        r"with quantised weights, which must be dequantised first: tensor 'layers\.0\.\S+': expected one of "
        r"BF16, F16, F32, F64, found U8",
    ),
    Published(
        "quantised by its config",
        dflash(quantization_config={"quant_method": "fp8"}),
        PLAIN,
        r"with quantised weights, .*`quantization_config`: expected \{\} or None, found \{'quant_method': 'fp8'\}",
    ),
    Published(
        "fp8 without scales",
        dflash(),
        {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in PLAIN.items()},
        r"with quantised weights, .*found F8_E4M3",
    ),
    Published(
        "Gemma 4 DSpark",
        deepspec(architectures=["Gemma4DSparkModel"]),
        PLAIN,
        r"this is a Gemma 4 DSpark drafter, whose layers have Gemma's norms",
    ),
    Published(
        "SpecForge Domino",
        dflash({"projector_type": "domino", "shift_label": True}),
        PLAIN | DOMINO,
        r"this is a DFlash drafter with a Domino head: `projector_type`: expected .*, found 'domino'",
    ),
    Published(
        "Domino in the tensors only", dflash(), PLAIN | DOMINO, r"this is a DFlash drafter with a Domino head, which"
    ),
    Published(
        "draft_vocab_size without d2t",
        dflash(draft_vocab_size=len(KEPT)),
        PLAIN,
        r"this is a DFlash drafter with a vocabulary of 16 tokens, but tensor 'd2t' is missing",
    ),
    Published(
        "Laguna",
        dflash(architectures=["DFlashLagunaForCausalLM"]),
        PLAIN,
        r"this is a Laguna DFlash drafter, whose layers have gates and fused projections",
    ),
    Published(
        "P-EAGLE",
        speculators(architectures=["PEagleDraftModel"], speculators_model_type="peagle"),
        PLAIN | extra(mask_hidden=(HIDDEN,)),
        r"this is a P-EAGLE drafter\. hf_treeflash reads DFlash",
    ),
    Published(
        "EAGLE-3",
        qwen3(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=16),
        PLAIN,
        r"this is an EAGLE drafter\. hf_treeflash reads DFlash",
    ),
    Published(
        "EAGLE-3 by its layers",
        qwen3(eagle_aux_hidden_state_layer_ids=[1, 2, 3]),
        PLAIN,
        r"this is an EAGLE drafter",
    ),
    Published(
        "another width than the target",
        dflash(target_hidden_size=64),
        PLAIN,
        r"a drafter of another width than its target, .*`target_hidden_size`: expected 32 or None, found 64",
    ),
    Published(
        "mask token by name only",
        dflash({"mask_token_id": None}, mask_token="<mask>"),
        PLAIN,
        r"`mask_token_id` is missing",
    ),
    Published(
        "latent attention",
        dflash({"attention_mode": "mla"}),
        PLAIN,
        r"with another kind of attention, .*`dflash_config\.attention_mode`: expected 'mha' or 'gqa' or None",
    ),
    Published(
        "no layout at all",
        qwen3(),
        PLAIN,
        r"config\.json: this is of no known drafter layout: .*found model_type 'qwen3' with none of these",
    ),
]
