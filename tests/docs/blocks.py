"""The code blocks of a Markdown page, and the mark that says why one does not run in a test."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
MARK = re.compile(r"<!-- (needs|prints)(?:: (.+?))? -->\n$")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language (`str`), code (`str`), line (`int`):
            As it stands on the page.
        needs (`str`, *optional*):
            What it takes to run it, where a test has not got it.
        is_output (`bool`):
            Whether it is what the block before it prints.
    """

    language: str
    code: str
    line: int
    needs: str | None
    is_output: bool


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        needs = mark[2] if mark and mark[1] == "needs" else None
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[2], line, needs, bool(mark and mark[1] == "prints")))
    return found
