"""A text on the terminal as it is written: in colours by who wrote it, with what was reached so far below it."""

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .terminal import output

DRAFTED, CHOSEN = "green", "bold yellow"
LEGEND = Text.assemble(("drafted and accepted", DRAFTED), ", ", ("the target's own", CHOSEN))


class Writer:
    """Prints rounds of tokens.

    On a terminal the line under way and what was reached so far are drawn anew with each round; elsewhere pieces of
    text are printed as they come, and nothing else.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            Of the target.
        colours (`bool`):
            Whether to tell drafted tokens from the target's own, the last of each round.
        console ([`Console`], *optional*):
            Where to print; standard output by default.
    """

    def __init__(self, tokenizer: Any, colours: bool = False, console: Console | None = None):
        self.tokenizer, self.colours = tokenizer, colours
        self.console = console or output()
        self.held: list[int] = []  # tokens of the line under way
        self.shown = ""  # of their text
        self.line = Text()
        drawn = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if drawn else None

    def __enter__(self) -> "Writer":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            self.live.stop()
            self.console.print(self.line, end="", soft_wrap=True)
        self.console.print()

    def round(self, tokens: list[int], tau: float | None, speed: float) -> None:
        """Print the tokens of a round; arguments are those of [`TimedRounds`]."""
        for index, token in enumerate(tokens):
            piece = self._text_of(token)
            style = "" if not self.colours else CHOSEN if index == len(tokens) - 1 else DRAFTED
            self.line.append(piece, style)
        if self.live is None:
            self.console.print(self.line, end="", soft_wrap=True)
            self.line = Text()
            return
        done = self._finished_lines()
        self.live.update(Group(self.line, Text(reached(tau, speed), style="dim")))
        for line in done:  # above what is drawn anew
            self.console.print(line, soft_wrap=True)
        self.live.refresh()

    def _text_of(self, token: int) -> str:
        """Return what a token adds to the text."""
        self.held.append(token)
        text = self.tokenizer.decode(self.held, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""  # half of a character
        piece, self.shown = text[len(self.shown) :], text
        if text.endswith("\n"):  # the next line is decoded by itself, as all of them would take ever longer
            self.held, self.shown = [], ""
        return piece

    def _finished_lines(self) -> list[Text]:
        """Take the lines that are finished off the one under way."""
        *done, self.line = self.line.split("\n", allow_blank=True) or [Text()]
        wrapped = self.line.wrap(self.console, self.console.width)
        if len(wrapped) > self.console.height // 2:  # what does not fit on the screen cannot be drawn anew
            *rest, self.line = wrapped
            done += rest
        return done


def reached(tau: float | None, speed: float | None, tokens: int | None = None) -> str:
    """Say in a line what a text has reached."""
    parts = [] if tokens is None else [f"{tokens} tokens"]
    parts += [] if tau is None else [f"τ {tau:.2f}"]
    parts += [] if speed is None else [f"{speed:.1f} tokens/s"]
    return ", ".join(parts)
