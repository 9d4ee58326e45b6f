"""Files that commands write: opened before anything is measured, so that a result always has a place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


@contextmanager
def writing_to(path: Path | None, option: str) -> Iterator[Callable[[str], None]]:
    """Open a file for what comes at the end; yields what writes it.

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
        if not written and file.seekable():
            file.truncate(0)
        written = True
        file.write(text)

    with file:
        try:
            yield write
        finally:
            if is_new and not written:
                path.unlink()
