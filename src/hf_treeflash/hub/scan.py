"""What must not be published: credentials, and paths of a machine."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARY_SUFFIXES = {".safetensors", ".png"}
# By what they begin with, which is quickly found in gigabytes of weights too.
CREDENTIALS = {
    "hf_": rb"hf_[A-Za-z0-9]{30,}",
    "api_org_": rb"api_org_[A-Za-z0-9]{30,}",
    "AKIA": rb"AKIA[0-9A-Z]{16}",
    "ASIA": rb"ASIA[0-9A-Z]{16}",
    "AIza": rb"AIza[\w-]{35}",
    "sk-": rb"sk-[\w-]{20,}",
    "github_pat_": rb"github_pat_\w{22,}",
    **{f"gh{kind}_": rb"gh\w_[A-Za-z0-9]{36,}" for kind in "pousr"},
    "glpat-": rb"glpat-[\w-]{20,}",
    "pypi-": rb"pypi-[\w-]{40,}",
    "npm_": rb"npm_[A-Za-z0-9]{36}",
    "xox": rb"xox[abeoprs]-[\w-]{10,}",
    "eyJ": rb"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+",
    "-----BEGIN ": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
}
HOMES = {home: re.escape(home.encode()) + rb"[\w.-]{2,}" for home in ("/home/", "/Users/", "/root/", "\\Users\\")}
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
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        binary = path.suffix in BINARY_SUFFIXES
        for start, what in _in_bytes(data):
            line = data[:start].count(b"\n") + 1
            where = f"byte {start}" if binary else f"line {line}"
            raise ValueError(f"{name}, {where}, holds {what}, which must not be published.")
        if path.suffix == ".safetensors":
            text = data[8 : 8 + int.from_bytes(data[:8], "little")]
        else:
            text = b"" if binary else data[:]
    check_text(text, name)


def check_text(data: bytes, name: str) -> None:
    """Refuse a text that holds a path of a machine or a secret; see [`check_file`]."""
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8 (byte {error.start}), so it cannot be checked.") from None
    for number, line in enumerate(lines, start=1):
        for what in _in_line(line):
            raise ValueError(f"{name}, line {number}, holds {what}, which must not be published.")


def _in_bytes(data) -> Iterator[tuple[int, str]]:
    for patterns, what in ((CREDENTIALS, "an access token"), (HOMES, "an absolute path")):
        for beginning, pattern in patterns.items():
            start = data.find(beginning.encode())
            while start >= 0:
                if re.compile(pattern).match(data, start):
                    yield start, what
                start = data.find(beginning.encode(), start + 1)


def _in_line(line: str) -> Iterator[str]:
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
