"""Export a drafter to a folder that works without this package, with its card; push such a folder."""

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files

from . import generation, modeling_treeflash
from .card import plot_acceptance, render_card, render_speculators_card

CUSTOM_GENERATE = '''"""Tree drafting for `generate(assistant_model=drafter, custom_generate=<this repository>)`."""

from .generation import install_hook


def generate(model, **kwargs):
    """Run the model's own `generate`, in which the drafter now drafts trees."""
    install_hook()
    return model.generate(**kwargs)
'''
ABSOLUTE_PATH = re.compile(r"file://\S+|(?<![\w.:/~\-)\]}>])/(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Za-z]:\\[^\s\"']+")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
TEXT_SUFFIXES = {".json", ".md", ".py", ".txt"}


def export_drafter(
    drafter,
    folder: str | os.PathLike,
    *,
    target_id: str,
    target_revision: str | None = None,
    name: str | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    evaluation: dict[str, Any] | str | os.PathLike | None = None,
    command: str | os.PathLike | None = None,
) -> list[str]:
    """Write a drafter as a Hub repository: weights, config, knobs, the code to run it, and a card.

    The folder works where this package is not installed: `AutoModel.from_pretrained(folder, trust_remote_code=True)`,
    then `target.generate(..., assistant_model=drafter, custom_generate=folder, trust_remote_code=True)`. Absolute
    paths in the evaluation and the command are shortened to their last part.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            The drafter; the adapters of a PEFT model are merged into a copy.
        folder (`str` or `os.PathLike`):
            Where to write; created if needed.
        target_id (`str`):
            Hub id of the target it was made for.
        target_revision (`str`, *optional*):
            Commit of the target; by default the one the evaluation ran with.
        name (`str`, *optional*):
            Repository id the card shows; the folder's name by default.
        license (`str`, *optional*), datasets (`list[str]`, *optional*):
            For the card's metadata.
        evaluation (`dict` or path, *optional*):
            What an evaluation wrote (`hf-treeflash bench --json`); the card's only source of numbers.
        command (path, *optional*):
            The `command.txt` of the training.

    Returns:
        `list[str]`: The files of the folder, relative to it.

    Raises:
        ValueError: If adapters cannot be merged, or a file would carry an absolute path or an access token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drafter = merged(drafter)
    drafter.save_pretrained(folder)
    _write_code(drafter.config, folder)
    measured, plot, training = None, None, None
    if evaluation is not None:
        text = (
            json.dumps(evaluation, indent=2) if isinstance(evaluation, dict) else Path(evaluation).read_text("utf-8")
        )
        measured = json.loads(without_paths(text))
        (folder / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        target_revision = target_revision or measured["target"]["revision"]
        plot = plot_acceptance(measured["results"], folder / "acceptance.png")
    if command is not None:
        training = without_paths(Path(command).read_text("utf-8")).strip()
        (folder / "command.txt").write_text(training + "\n", encoding="utf-8")
    card = render_card(
        drafter,
        name=name or folder.resolve().name,
        target_id=target_id,
        target_revision=target_revision,
        license=license,
        datasets=datasets,
        evaluation=measured,
        command=training,
        plot=plot,
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return list_files(folder)


def export_speculators(
    drafter, folder: str | os.PathLike, target_id: str, target_architecture: str | None = None
) -> list[str]:
    """Write a drafter's backbone in the DFlash form of vLLM's speculators, for serving as a chain.

    The AR head is dropped: no serving engine knows it. Embeddings and output layer stay the target's.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            The drafter.
        folder (`str` or `os.PathLike`):
            Where to write.
        target_id (`str`):
            Hub id of the target ("verifier" there).
        target_architecture (`str`, *optional*):
            Class name of the target, such as `"Qwen3ForCausalLM"`.

    Returns:
        `list[str]`: The files of the folder, relative to it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drafter = merged(drafter)
    config = drafter.config
    state = drafter.state_dict()
    tensors = {key: value.contiguous() for key, value in state.items() if not key.startswith("ar_head.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stored = _speculators_config(config, drafter.dtype, target_id, target_architecture)
    (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    text = render_speculators_card(config, name=folder.resolve().name, target_id=target_id)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return list_files(folder)


def push(folder: str | os.PathLike, repo_id: str, *, private: bool = False, dry_run: bool = False) -> list[str]:
    """Upload an exported folder.

    Args:
        folder (`str` or `os.PathLike`):
            What [`export_drafter`] wrote.
        repo_id (`str`):
            Repository to create or update.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        dry_run (`bool`, *optional*, defaults to `False`):
            Only check and list the files.

    Returns:
        `list[str]`: The files, relative to the folder.

    Raises:
        ValueError: If a text file holds an absolute path or an access token.
    """
    files = list_files(folder)
    if not dry_run:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        # Exactly what was checked, whatever is written to the folder meanwhile.
        api.upload_folder(repo_id=repo_id, folder_path=Path(folder), allow_patterns=files)
    return files


def list_files(folder: str | os.PathLike) -> list[str]:
    """List a folder's files, refusing absolute paths and access tokens in its text files."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and ".cache" not in path.parts]
    for path in paths:
        if path.suffix not in TEXT_SUFFIXES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern, what in ((ABSOLUTE_PATH, "an absolute path"), (HUB_TOKEN, "an access token")):
                if pattern.search(line):
                    raise ValueError(f"{path}, line {number}, holds {what}, which must not be published.")
    return [path.relative_to(folder).as_posix() for path in paths]


def without_paths(text: str) -> str:
    """Shorten absolute paths to their last part."""
    return ABSOLUTE_PATH.sub(lambda match: re.split(r"[\\/]", match[0])[-1], text)


def merged(drafter):
    """Return a drafter without adapters: a PEFT model's are merged into a copy."""
    if hasattr(drafter, "merge_and_unload"):
        return copy.deepcopy(drafter).merge_and_unload()
    if getattr(drafter, "_hf_peft_config_loaded", False):
        raise ValueError(
            "This drafter has adapters attached. Load them with `PeftModel.from_pretrained(drafter, adapter_folder)` "
            "and export that: its adapters are merged."
        )
    return drafter


def _write_code(config, folder: Path) -> None:
    """Copy the modules a repository needs: for `AutoModel` beside the config, for `generate` below custom_generate."""
    config = copy.deepcopy(config)
    config.auto_map = {
        "AutoConfig": "configuration_treeflash.TreeFlashConfig",
        "AutoModel": "modeling_treeflash.TreeFlashDraftModel",
    }
    config.save_pretrained(folder)
    # Code in custom_generate cannot import from its parent folder, so shared modules are there a second time.
    for module, place in ((modeling_treeflash, folder), (generation, folder / "custom_generate")):
        place.mkdir(exist_ok=True)
        for source in {str(module.__file__), *get_relative_import_files(str(module.__file__))}:
            shutil.copyfile(source, place / Path(source).name)
    (folder / "custom_generate" / "generate.py").write_text(CUSTOM_GENERATE, encoding="utf-8")


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


__all__ = ["export_drafter", "export_speculators", "push"]
