"""Push an export: exactly the files that were written, checked once more."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from .folder import CARD, check_files, list_files, read_manifest

# What an earlier push may have left in the repository and this export no longer has.
SHARDS = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]
RECORDS = ["evaluation.json", "acceptance.png", "command.txt", "training_record.json"]
EARLIER = [*RECORDS, *SHARDS, "custom_generate/*.py"]


def push(folder: str | os.PathLike, repo_id: str, *, private: bool = False, dry_run: bool = False) -> list[str]:
    """Upload an export, and remove from the repository what an earlier one had more.

    Args:
        folder (`str` or `os.PathLike`):
            What [`export_drafter`] or [`export_speculators`] wrote. The card may have been edited since, nothing else.
        repo_id (`str`):
            Repository to create or update.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        dry_run (`bool`, *optional*, defaults to `False`):
            Only check and list the files.

    Returns:
        `list[str]`: The files, relative to the folder.

    Raises:
        ValueError: If the folder is not an export, holds a link or a file that the export did not write, lacks one or
            has a changed one, or if a file holds an absolute path or a credential. Nothing is uploaded then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    written = read_manifest(folder)
    files = list_files(folder)
    if foreign := sorted(set(files) - set(written)):
        raise ValueError(f"{folder} holds {foreign[0]}, which the export did not write. Remove it, or export again.")
    if missing := sorted(set(written) - set(files)):
        raise ValueError(f"{folder} lacks {missing[0]}, which the export wrote. Export again.")
    # What is checked is a copy, and the copy is uploaded, whatever is written to the folder meanwhile.
    with TemporaryDirectory() as temporary:
        for name in files:
            Path(temporary, name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, Path(temporary, name), follow_symlinks=False)
        for name, digest in check_files(Path(temporary)).items():
            if digest != written[name] and name != CARD:
                raise ValueError(f"{folder / name} was changed since it was exported. Export again.")
        if not dry_run:
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=temporary, allow_patterns=files, delete_patterns=EARLIER)
    return files


__all__ = ["push"]
