"""The folder of an export: written whole or not at all, and known again by a list of what was written."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from .scan import check_file

# Names and SHA-256 of the files of an export; it stays here when they are pushed.
MANIFEST = ".treeflash-export.json"
CARD = "README.md"


def write_export(folder: str | os.PathLike, write: Callable[[Path], None]) -> list[str]:
    """Write an export beside its place, check it, and put it in the place of an earlier one.

    Args:
        folder (`str` or `os.PathLike`):
            Where it goes: a new folder, an empty one, or that of an earlier export, whose files go.
        write (`Callable[[Path], None]`):
            Writes the files to an empty folder.

    Returns:
        `list[str]`: The files, relative to the folder.

    Raises:
        ValueError: If the folder holds anything else, or a file what must not be published; nothing is changed then.
    """
    folder = Path(folder)
    earlier = earlier_files(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        place = Path(temporary)
        write(place)
        files = check_files(place)
        folder.mkdir(exist_ok=True)
        for name in earlier:
            (folder / name).unlink()
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(place / name, folder / name)
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    return list(files)


def check_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder by its name, refusing what must not be published."""
    hashes = {}
    for name in list_files(folder):
        check_file(folder / name, name)
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        hashes[name] = digest.hexdigest()
    return hashes


def list_files(folder: Path) -> list[str]:
    """List all files of a folder but the manifest, relative to it and in order.

    Raises:
        ValueError: If there is a link or anything else that is neither a file nor a folder.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link; name the folder itself.")
    names = []
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in sorted([*folders, *files])):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is a link or no plain file; an export has none.")
        names += [Path(place, name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in names if name != MANIFEST)


def read_manifest(folder: Path) -> dict[str, str]:
    """Return names and SHA-256 of the files an export wrote to a folder.

    Raises:
        ValueError: If no export did.
    """
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is no exported folder: it has no {MANIFEST}. Write one with `export_drafter` or "
            "`hf-treeflash export`."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read ({error}); export again.") from error


def earlier_files(folder: Path) -> list[str]:
    """Return the files of an earlier export in a folder, refusing any that are not of one."""
    if not folder.exists() and not folder.is_symlink():
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    files = list_files(folder)
    written = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    if foreign := [name for name in files if name not in written]:
        raise ValueError(
            f"{folder} holds {foreign[0]}, which no export wrote. Export to a new folder, or empty this one."
        )
    return files


__all__ = ["CARD", "check_files", "list_files", "read_manifest", "write_export"]
