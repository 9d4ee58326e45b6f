"""`hf-treeflash`, the command line: a module per command.

Nothing here imports torch or transformers before a command runs, so that help is there at once.
"""

import importlib.metadata
from typing import Annotated

import typer

from .bench import bench
from .chat import chat
from .check import check
from .demo import demo
from .env import env
from .evaluate import evaluate
from .export import export
from .failures import DEBUG, Commands
from .generate import generate
from .inspect import inspect
from .push import push
from .trace import trace
from .train import train
from .vocabulary import vocabulary

app = typer.Typer(
    cls=Commands,
    help="Lossless tree speculative decoding inside transformers' generate().",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(value: bool) -> None:
    """Print the version, and end."""
    if value:
        try:
            typer.echo(importlib.metadata.version("hf-treeflash"))
        except importlib.metadata.PackageNotFoundError:
            typer.echo("source tree")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Lossless tree speculative decoding inside transformers' generate()."""


app.command()(demo)
app.command()(chat)
app.command()(generate)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(check)
app.command()(inspect)
app.command()(trace)
app.command()(env)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command()(vocabulary)
app.command()(export)
app.command()(push)
