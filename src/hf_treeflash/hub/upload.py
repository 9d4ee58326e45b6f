"""Push an exported folder, after a look for what must not be published."""

import os
from pathlib import Path

from huggingface_hub import HfApi

from .scan import list_files


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


__all__ = ["push"]
