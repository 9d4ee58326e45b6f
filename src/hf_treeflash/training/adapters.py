"""PEFT adapters of a drafter."""

import json
import os
from pathlib import Path

# What LoRA adapts: every projection of the drafter's layers and of the SwiGLU head; heads of token vectors are trained
# in full (`modules_to_save`). Matches whole module names.
LORA_TARGET_MODULES = r"(layers\.\d+\..*_proj|ar_head\.(up_gate_proj|down_proj))"


def check_adapters(model) -> None:
    """Refuse adapters that cannot learn on the zero output projection of an untrained head.

    Raises:
        ValueError: Naming the adapter and the reason.
    """
    down_proj = getattr(getattr(model, "ar_head", None), "down_proj", None)
    base = getattr(down_proj, "base_layer", None) if hasattr(model, "peft_config") else None
    if base is None or base.weight.any():
        return
    for name, config in model.peft_config.items():
        pissa = str(getattr(config, "init_lora_weights", "")).startswith("pissa")
        if getattr(config, "use_dora", False) or pissa:
            kind, effect = ("PiSSA", "gets zero gradients") if pissa else ("DoRA", "divides by the norm of zero rows")
            raise ValueError(
                f"Adapter {name!r} uses {kind} on an untrained AR head, whose `down_proj` is zero: there {kind} "
                f"{effect}. Train the head in full first (stage 'head'), then adapt it."
            )


def forget_base_path(adapter_folder: str | os.PathLike, base_model: str) -> None:
    """Name the base drafter of a saved adapter by its public id instead of the local folder it was loaded from.

    Args:
        adapter_folder (`str` or `os.PathLike`):
            Where PEFT saved the adapter; its config and model card are rewritten.
        base_model (`str`):
            Hub id of the drafter, or a path relative to where the adapter will be used.
    """
    config_file = Path(adapter_folder, "adapter_config.json")
    config = json.loads(config_file.read_text())
    local = config["base_model_name_or_path"]
    config["base_model_name_or_path"] = base_model
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    card = Path(adapter_folder, "README.md")
    if local and card.exists():
        card.write_text(card.read_text().replace(local, base_model))
