"""`hf-treeflash env`: what is installed, and what falls back."""

import json
from typing import Annotated

import typer
from rich.table import Table

from .terminal import output


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Versions, devices, kernels, and what falls back and why: for reports of faults."""
    from ..bench.surroundings import surroundings

    facts = surroundings()
    if as_json:
        typer.echo(json.dumps([fact._asdict() for fact in facts], indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for fact in facts:
        table.add_row(fact.what, fact.found, f"[yellow]{fact.meaning}[/yellow]" if fact.meaning else "")
    output().print(table)
