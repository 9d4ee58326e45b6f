"""Files that commands write: opened before anything is measured, so that a result always has a place."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


@contextmanager
def writing_to(path: Path | None, option: str) -> Iterator[Callable[[str], None]]:
    """Open a file for what comes at the end; yields what writes it, in place of what it wrote before.

    Args:
        path (`Path`, *optional*):
            The file; None: what is written goes nowhere.
        option (`str`):
            How a mistake names it.
    """
    if path is None:
        yield lambda text: None
        return
    is_new = not path.exists()
    try:
        file = open(path, "a", encoding="utf-8")  # what is there stays until there is something better
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise typer.BadParameter(f"{path} cannot be written: {reason}.", param_hint=option) from error
    written = False

    def write(text: str) -> None:
        nonlocal written
        if file.seekable():
            file.truncate(0)
        written = True
        file.write(text)
        file.flush()

    with file:
        try:
            yield write
        finally:
            if is_new and not written:
                path.unlink()


@contextmanager
def folder_for_writing(path: Path | None, option: str) -> Iterator[Path | None]:
    """Make a folder for files that come at the end; it goes again if none came.

    Args:
        path (`Path`, *optional*):
            The folder.
        option (`str`):
            How a mistake names it.
    """
    if path is None:
        yield None
        return
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise typer.BadParameter(f"{path} cannot be written to: {reason}.", param_hint=option) from error
    try:
        yield path
    finally:
        if is_new and not any(path.iterdir()):
            path.rmdir()
