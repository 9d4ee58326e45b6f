"""What must not be published: credentials, and paths of a machine."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BINARY_SUFFIXES = {".safetensors", ".png"}
# Binary files are read in parts; each is looked at together with the end of the one before.
AT_ONCE, OVERLAP = 2**24, 2**12
SHORTEST = 8  # characters of what is looked for in them
CREDENTIALS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|sk-[\w-]{20,}"
    rb"|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}|pypi-[\w-]{40,}|npm_[A-Za-z0-9]{36}"
    rb"|xox[abeoprs]-[\w-]{10,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+|-----BEGIN [A-Z ]*PRIVATE KEY"
)
HOMES = re.compile(rb"(?:/(?:home|Users|root)/|\\Users\\)[\w.-]{2,}")
# In text alone, where chance forms none: a word for a secret with a value that has letters and digits, and a URL
# with a password.
NAMED_SECRET = re.compile(
    r"(?i)(?:api[_-]?key|access[_-]?token|auth[_-]?token|hub[_-]?token|secret(?:[_-]?key)?|passw(?:or)?d)"
    r"[\"']?(?:\s*[:=]\s*|\s+)[\"']?(?=[\w/+.-]*\d)(?=[\w/+.-]*[a-z])[\w/+.-]{16,}"
)
PASSWORD_IN_URL = re.compile(r"\w://[^\s/:@\"']+:[^\s/@\"']+@")
URL = r"\b(?!file:)[a-zA-Z][\w+.-]*://[^\s\"'<>]*"
# A part of a path, with the blanks a shell would want escaped.
PART = r"(?:\\[ ]|[^\s/\\\"'`<>|*?,;()\[\]{}])"
PATH = (
    r"file:/[^\s\"'<>]+"
    r"|(?<=[\"'])/[^\"'\n/]+/[^\"'\n]*(?=[\"'])"  # quoted, so that it may hold blanks
    rf"|(?<![\w./~\-)\]}}])/(?:{PART}+/)+{PART}*"
    r"|/(?:home|Users)/[\w.-]+(?:/[\w.@+-]+)*"  # whatever stands before it
    rf"|\b[A-Za-z]:[\\/]{PART}+(?:[\\/]+{PART}+)*"
    rf"|(?<![\w\\])\\\\(?:\\\\)?[\w.-]+\\+[\w$.-]+(?:\\+{PART}+)*"
)
URL_OR_PATH = re.compile(rf"(?P<url>{URL})|(?P<path>{PATH})")
HOME_FOLDER = re.compile(r"(?:/home|/Users|[A-Za-z]:\\+Users)[\\/]+[^\\/]+")


def check_file(path: Path, name: str) -> None:
    """Refuse a file that holds what must not be published; every byte is looked at.

    Args:
        path (`Path`):
            The file.
        name (`str`):
            What to call it.

    Raises:
        ValueError: Naming the place and what is there.
    """
    if path.suffix not in BINARY_SUFFIXES:
        check_text(path.read_bytes(), name)
        return
    with path.open("rb") as file:
        if path.suffix == ".safetensors":  # begins with a text, after its length
            length = int.from_bytes(file.read(8), "little")
            check_text(file.read(min(length, path.stat().st_size)), name)
        file.seek(0)
        end = b""
        while part := file.read(AT_ONCE):
            for start, readable in _readable(end + part):
                for pattern, what in ((CREDENTIALS, "an access token"), (HOMES, "an absolute path")):
                    if found := pattern.search(readable):
                        place = file.tell() - len(end + part) + start + found.start()
                        raise ValueError(f"{name}, byte {place}, holds {what}, which must not be published.")
            end = part[-OVERLAP:]


def _readable(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each run of printable characters that is long enough to hold something, and where it starts."""
    codes = np.frombuffer(data, dtype=np.uint8)
    runs = (codes >= 0x20) & (codes < 0x7F)
    for length in (1, 2, 4):  # of 2, 4 and then 8 characters, by where they start
        runs = runs[:-length] & runs[length:]
    starts = np.flatnonzero(runs)
    for run in np.split(starts, np.flatnonzero(np.diff(starts) > 1) + 1):
        if len(run):
            yield int(run[0]), data[run[0] : run[-1] + SHORTEST]


def check_text(data: bytes, name: str) -> None:
    """Refuse a text that holds a credential or a path of a machine; see [`check_file`]."""
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8 (byte {error.start}), so it cannot be checked.") from None
    for number, line in enumerate(lines, start=1):
        for what in _in_line(line):
            raise ValueError(f"{name}, line {number}, holds {what}, which must not be published.")


def _in_line(line: str) -> Iterator[str]:
    if CREDENTIALS.search(line.encode()):
        yield "an access token"
    if NAMED_SECRET.search(line) or PASSWORD_IN_URL.search(line):
        yield "what looks like a secret"
    if any(match["path"] for match in URL_OR_PATH.finditer(line)):
        yield "an absolute path"


def without_paths(value: Any) -> Any:
    """Shorten absolute paths to their last part, in a text or in the values of plain data; keys stay as they are."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"/[^/\n]+/.*|[A-Za-z]:[\\/].*|\\\\.*", value):  # all of it, blanks too
        return _last_part(value)
    return URL_OR_PATH.sub(lambda match: match["url"] or _last_part(match["path"]), value)


def _last_part(path: str) -> str:
    if HOME_FOLDER.fullmatch(path.rstrip("\\/")):
        return "~"  # its last part is somebody's name
    return re.split(r"[\\/](?! )", path.rstrip("\\/"))[-1]


__all__ = ["check_file", "check_text", "without_paths"]
