"""What commands print with: colours and progress on a terminal, plain text elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


def output() -> Console:
    """Return a console over standard output, as it is now."""
    return Console(highlight=False)


def errors() -> Console:
    """Return a console over standard error, for what is no result: notes, progress, mistakes."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Say something that is no result."""
    errors().print(text, style="dim", markup=False, soft_wrap=True)


def quiet_off_a_terminal() -> None:
    """Leave the progress bars of downloads and loading to terminals."""
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal while the context is open; yields what is told how much is done, and of how much.

    The bar is drawn when it is told something, by no thread of its own, which would compete with what is measured.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = errors()
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(what, total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            bar.refresh()

        yield tell
