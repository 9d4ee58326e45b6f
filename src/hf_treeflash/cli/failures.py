"""What a user sees when something goes wrong: one sentence, an exit code, and the traceback for who asks for it."""

import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import typer
from rich.markup import escape
from typer.core import TyperGroup

from .terminal import errors

UsageError = typer.BadParameter.__base__ or typer.BadParameter  # of the click that this typer is built on
DEBUG = "--debug"
MISTAKE, FAULT, INTERRUPTED = 2, 1, 130  # exit codes


class Commands(TyperGroup):
    """The commands, whose errors are sentences."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run a command; exit code 0, 1 where it found something wrong, 2 for a mistake, 130 if interrupted."""
        words = list(sys.argv[1:] if args is None else args) or ["--help"]
        words, debug = without_debug(words)
        try:
            code = super().main(words, prog_name, **{**extra, "standalone_mode": False})
        except Exception as error:
            if debug:
                raise
            code = say(error)
        sys.exit(code if isinstance(code, int) else 0)


def without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of a command line, wherever it stands before a `--`."""
    end = words.index("--") if "--" in words else len(words)
    return [word for word in words[:end] if word != DEBUG] + words[end:], DEBUG in words[:end]


def say(error: Exception) -> int:
    """Print what went wrong in one sentence; return the exit code."""
    if isinstance(error, BrokenPipeError):  # who reads us has seen enough; nothing can be flushed any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    message, code = in_words(error)
    errors().print(f"[red]{escape(message)}[/red]", soft_wrap=True)
    return code


def in_words(error: Exception) -> tuple[str, int]:
    """Return what an error says on one line, and the exit code it stands for."""
    if isinstance(error, UsageError):
        return f"{one_line(cast(Any, error).format_message())}{hint(error)}", MISTAKE
    message = one_line(str(error)) or type(error).__name__
    if isinstance(error, ImportError):
        return f"{message}: is an extra missing? (pip install 'hf-treeflash[cli,train,plot]')", MISTAKE
    if isinstance(error, (ValueError, OSError)) or "out of memory" in message:
        return message, MISTAKE
    return f"{type(error).__name__}: {message} ({DEBUG} shows where)", FAULT


def hint(error: Any) -> str:
    """Say where the help is."""
    context = getattr(error, "ctx", None)
    return f" ({context.command_path} --help)" if context is not None else ""


def one_line(text: str) -> str:
    return " ".join(text.split())
