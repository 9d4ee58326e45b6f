"""How far something is, as a bar on a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 0.2  # between two drawings


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error while the context is open; where that is no terminal, nothing.

    The bar is drawn when it is told something, by no thread of its own, which would compete with what is measured.

    Args:
        what (`str`):
            What is counted.

    Yields:
        `Callable[[int, int], None]`: To be told how much is done, and of how much.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    drawn = 0.0
    with bar:
        task = bar.add_task(what, total=None)

        def tell(done: int, total: int) -> None:
            nonlocal drawn
            bar.update(task, completed=done, total=total)
            if time.monotonic() - drawn > SECONDS:
                bar.refresh()
                drawn = time.monotonic()

        yield tell


__all__ = ["progress"]
