"""What commands print with: colours on a terminal, plain text elsewhere."""

import sys

from rich.console import Console


def output() -> Console:
    """Return a console over standard output, as it is now."""
    return Console(highlight=False)


def errors() -> Console:
    """Return a console over standard error, for what is no result: notes, mistakes."""
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
