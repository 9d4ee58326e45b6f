"""What must not be published: machine paths and credentials."""

import os
import re
from pathlib import Path

ABSOLUTE_PATH = re.compile(r"file://\S+|(?<![\w.:/~\-)\]}>])/(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Za-z]:\\[^\s\"']+")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
TEXT_SUFFIXES = {".json", ".md", ".py", ".txt"}


def list_files(folder: str | os.PathLike) -> list[str]:
    """List a folder's files, refusing absolute paths and access tokens in its text files."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and ".cache" not in path.parts]
    for path in paths:
        if path.suffix not in TEXT_SUFFIXES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern, what in ((ABSOLUTE_PATH, "an absolute path"), (HUB_TOKEN, "an access token")):
                if pattern.search(line):
                    raise ValueError(f"{path}, line {number}, holds {what}, which must not be published.")
    return [path.relative_to(folder).as_posix() for path in paths]


def without_paths(text: str) -> str:
    """Shorten absolute paths to their last part."""
    return ABSOLUTE_PATH.sub(lambda match: re.split(r"[\\/]", match[0])[-1], text)
