"""Export a drafter to a folder that works without this package, with its card."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .. import generation, modeling_treeflash
from .card import plot_acceptance, render_card
from .evaluation import check_pair, read_evaluation
from .folder import CARD, write_export
from .scan import without_paths

CUSTOM_GENERATE = '''"""Tree drafting for `generate(assistant_model=drafter, custom_generate=<this repository>)`."""

from .generation import install_hook


def generate(model, **kwargs):
    """Run the model's own `generate`, in which the drafter now drafts trees."""
    install_hook()
    return model.generate(**kwargs)
'''


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
    record: dict[str, Any] | None = None,
) -> list[str]:
    """Write a drafter as a Hub repository: weights, config, knobs, the code to run it, and a card.

    The folder works where this package is not installed: `AutoModel.from_pretrained(folder, trust_remote_code=True)`,
    then `target.generate(..., assistant_model=drafter, custom_generate=folder, trust_remote_code=True)`. Absolute
    paths in the evaluation, the command and the record are shortened to their last part.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            The drafter; the adapters of a PEFT model are merged into a copy.
        folder (`str` or `os.PathLike`):
            Where to write: a new folder, an empty one, or that of an earlier export, which is replaced.
        target_id (`str`):
            Hub id of the target it was made for.
        target_revision (`str`, *optional*):
            Commit of the target; by default the one the evaluation ran with.
        name (`str`, *optional*):
            Repository id the card shows; the folder's name by default.
        license (`str`, *optional*), datasets (`list[str]`, *optional*):
            For the card's metadata.
        evaluation (`dict` or path, *optional*):
            What an evaluation of this drafter with this target wrote (`hf-treeflash bench --json`); the card's only
            source of numbers.
        command (path, *optional*):
            The `command.txt` of the training.
        record (`dict`, *optional*):
            How the training went: plain data, which becomes `training_record.json`.

    Returns:
        `list[str]`: The files of the folder, relative to it.

    Raises:
        ValueError: If adapters cannot be merged, the evaluation is of another pair, the folder holds anything but an
            earlier export, or a file would carry an absolute path or a credential. Nothing is written then.
    """
    given, drafter = drafter, merged(drafter)
    sizes = {given.num_parameters(), drafter.num_parameters()}
    measured = training = None
    if evaluation is not None:
        measured = read_evaluation(evaluation)
        check_pair(measured, target_id, target_revision, sizes)
        target_revision = target_revision or measured["target"].get("revision")
    if command is not None:
        training = without_paths(Path(command).read_text("utf-8")).strip()

    def write(place: Path) -> None:
        drafter.save_pretrained(place)
        _write_code(drafter.config, place)
        plot = None
        if measured is not None:
            (place / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
            plot = plot_acceptance(measured["results"], place / "acceptance.png")
        if training is not None:
            (place / "command.txt").write_text(training + "\n", encoding="utf-8")
        if record is not None:
            text = json.dumps(without_paths(record), indent=1) + "\n"
            (place / "training_record.json").write_text(text, encoding="utf-8")
        card = render_card(
            drafter,
            name=name or Path(folder).resolve().name,
            target_id=target_id,
            target_revision=target_revision,
            license=license,
            datasets=datasets,
            evaluation=measured,
            command=training,
            plot=plot,
        )
        (place / CARD).write_text(str(card), encoding="utf-8")

    return write_export(folder, write)


def merged(drafter):
    """Return a drafter without adapters: a PEFT model's are merged into a copy."""
    if drafter.config.model_type != "treeflash":
        raise ValueError(f"A model of type {drafter.config.model_type!r} is no TreeFlash drafter; export the drafter.")
    if hasattr(drafter, "merge_and_unload"):
        return copy.deepcopy(drafter).merge_and_unload()
    if drafter._hf_peft_config_loaded:
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


__all__ = ["export_drafter"]
