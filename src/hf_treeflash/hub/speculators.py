"""Export a drafter's backbone in the form that vLLM's speculators read."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .card import render_speculators_card
from .export import merged
from .folder import CARD, write_export


def export_speculators(
    drafter, folder: str | os.PathLike, target_id: str, target_architecture: str | None = None
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

    Returns:
        `list[str]`: The files of the folder, relative to it.

    Raises:
        ValueError: As [`export_drafter`] does.
    """
    drafter = merged(drafter)
    config = drafter.config
    state = drafter.state_dict()
    tensors = {key: value.contiguous() for key, value in state.items() if not key.startswith("ar_head.")}
    stored = _speculators_config(config, drafter.dtype, target_id, target_architecture)

    def write(place: Path) -> None:
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        text = render_speculators_card(config, name=Path(folder).resolve().name, target_id=target_id)
        (place / CARD).write_text(text, encoding="utf-8")

    return write_export(folder, write)


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
    proposal = {"proposal_type": "greedy", "speculative_tokens": config.block_size - 1}
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
            "rope_theta": config.rope_parameters["rope_theta"],
            "use_sliding_window": config.sliding_window is not None,
        },
        "draft_vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        # States are numbered from the embedding on: layer l is entry l + 1.
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.target_layer_ids],
        "sample_from_anchor": False,
        "sliding_window_non_causal": config.sliding_window is not None,
        "dtype": str(dtype).removeprefix("torch."),
    }


__all__ = ["export_speculators"]
