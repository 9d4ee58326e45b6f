"""A trace as one HTML page that needs nothing but a browser."""

import json
import os
from pathlib import Path
from typing import Any

from .recorder import Trace

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "{{trace}}"


def render_page(trace: dict[str, Any]) -> str:
    """Return the page of a trace: one file, which loads nothing.

    Args:
        trace (`dict`):
            What [`Trace.to_dict`] returns, or what was read from its JSON.
    """
    # Inside a script element only "<" could end it; texts are put on the page as text.
    data = json.dumps(trace, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, data)


def write_trace(trace: Trace, folder: str | os.PathLike, tokenizer) -> list[Path]:
    """Write `trace.json` and `trace.html`.

    Args:
        trace ([`Trace`]):
            What was recorded.
        folder (`str` or `os.PathLike`):
            Where to; it is made if it is missing.
        tokenizer ([`PreTrainedTokenizerBase`]):
            The target's.

    Returns:
        `list[Path]`: Both files.

    Raises:
        ValueError: If nothing was recorded.
    """
    if not trace.texts:
        raise ValueError(
            "The trace is empty: no call of `generate` with a TreeFlash drafter ran while it was open, in its thread."
        )
    data = trace.to_dict(tokenizer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"trace.json": json.dumps(data, ensure_ascii=False) + "\n", "trace.html": render_page(data)}
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]


__all__ = ["render_page", "write_trace"]
