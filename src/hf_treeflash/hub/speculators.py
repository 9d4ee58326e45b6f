"""Export a drafter's backbone in the form that vLLM's speculators read."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..configuration_treeflash import TreeFlashConfig
from ..draft_vocabulary import kept_rows, kept_tokens
from ..layouts import read_layout
from .card import render_speculators_card
from .export import merged
from .folder import CARD, write_export


def export_speculators(
    drafter,
    folder: str | os.PathLike,
    target_id: str,
    target_architecture: str | None = None,
    lm_head: nn.Linear | None = None,
) -> list[str]:
    """Write a drafter's backbone in the DFlash form of vLLM's speculators, for serving as a chain.

    The AR head is dropped: no serving engine knows it. Embeddings and output layer stay the target's.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            The drafter.
        folder (`str` or `os.PathLike`):
            Where to write: a new folder, an empty one, or that of an earlier export, which is replaced.
        target_id (`str`):
            Hub id of the target ("verifier" there).
        target_architecture (`str`, *optional*):
            Class name of the target, such as `"Qwen3ForCausalLM"`.
        lm_head (`nn.Linear`, *optional*):
            The target's output layer, whose rows a draft vocabulary is exported with (and `d2t` and `t2d`). Without
            it, and without an output layer of the drafter's own, the export drafts all tokens.

    Returns:
        `list[str]`: The files of the folder, relative to it.

    Raises:
        ValueError: As [`export_drafter`] does, or if that form cannot say how the drafter is to be run.
    """
    drafter = merged(drafter)
    config = copy.deepcopy(drafter.config)
    state = drafter.state_dict()
    if config.draft_vocab_size is not None:
        _convert_vocabulary(config, state, lm_head)
    tensors = {key: value.contiguous() for key, value in state.items() if not key.startswith("ar_head.")}
    stored = _speculators_config(config, drafter.dtype, target_id, target_architecture)
    _check_reads_back(config, stored)

    def write(place: Path) -> None:
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        text = render_speculators_card(config, name=Path(folder).resolve().name, target_id=target_id)
        (place / CARD).write_text(text, encoding="utf-8")

    return write_export(folder, write)


def _convert_vocabulary(config, state: dict[str, torch.Tensor], lm_head: nn.Linear | None) -> None:
    """Bring a draft vocabulary into that form, which wants an output layer of its own for it; without rows drop it."""
    d2t, rows = state.pop("d2t"), state.pop("draft_lm_head.weight", None)
    if rows is None and lm_head is not None:
        rows = kept_rows(lm_head, d2t).weight.to(d2t.device, state["fc.weight"].dtype)
    config.tie_draft_head = False
    if rows is None:
        config.draft_vocab_size = None
        return
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[kept_tokens(d2t)] = True
    state |= {"d2t": d2t, "t2d": t2d, "lm_head.weight": rows}


def _speculators_config(config, dtype, target_id: str, target_architecture: str | None) -> dict[str, Any]:
    layer_fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "rope_parameters",
        "attention_bias",
        "attention_dropout",
        "sliding_window",
        "layer_types",
    )
    proposal = {"proposal_type": "greedy", "speculative_tokens": config.num_drafted}
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": target_id,
                "architectures": [target_architecture] if target_architecture else [],
            },
        },
        "transformer_layer_config": {
            "model_type": "qwen3",
            **{name: getattr(config, name) for name in layer_fields},
            "rope_theta": config.rope_parameters.get("rope_theta"),
            "use_sliding_window": "sliding_attention" in config.layer_types,
        },
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        # States are numbered from the embedding on: layer l is entry l + 1.
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.target_layer_ids],
        "sample_from_anchor": config.first_slot == 0,
        "sliding_window_non_causal": config.causal_layers == "none",
        "dtype": str(dtype).removeprefix("torch."),
    }


def _check_reads_back(config, stored: dict[str, Any]) -> None:
    """Refuse what would be run in another way by whoever reads the stored form."""
    read = TreeFlashConfig(**read_layout(stored).values)
    aside = {"ar_head", "num_target_layers", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    aside |= {"head_rank", "head_gated", "selector_top_k"}  # of the head that was dropped
    if "sliding_attention" not in config.layer_types:
        aside.add("window_rule")
    for name in sorted(set(TreeFlashConfig.__annotations__) - aside):
        if getattr(read, name) != getattr(config, name):
            raise ValueError(
                f"The form of vLLM's speculators cannot say how this drafter is run: its `{name}` is "
                f"{getattr(config, name)!r}, there it would be {getattr(read, name)!r}."
            )


__all__ = ["export_speculators"]
