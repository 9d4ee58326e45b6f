"""`hf-treeflash inspect`: what a drafter is, from its config and tensor headers alone."""

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .options import model_source
from .terminal import output, quiet_off_a_terminal


def inspect(
    drafter: Annotated[str, typer.Argument(help="Folder or Hub repository of a drafter.", callback=model_source)],
    target: Annotated[
        str | None, typer.Option(help="A target that it may fit, also by its config alone.", callback=model_source)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the drafter.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what a drafter is and how it is run, whether it is read, and whether it fits a target. Loads no weights.

    Exit code 1 where it is refused or does not fit.
    """
    quiet_off_a_terminal()
    from ..hub.inspection import inspect_drafter

    found = inspect_drafter(drafter, target, revision)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)
    raise typer.Exit(0 if found["read"] and found.get("fits", {"fits": True})["fits"] else 1)


def show(found: dict[str, Any]) -> None:
    """Print what was found, section by section."""
    console = output()
    console.print(f"[bold]{escape(found['source'])}[/bold]: {escape(found['layout'])}", soft_wrap=True)
    if not found["read"]:
        console.print(f"[red]refused:[/red] {escape(found['refusal'])}", soft_wrap=True)
    for warning in found["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)
    for section in ("forward", "sizes", "knobs", "about"):
        table = Table(title=section, title_justify="left", box=None, show_header=False, pad_edge=False)
        for name, value in found[section].items():
            table.add_row(f"  {name}", escape(shown(value)))
        if table.row_count:
            console.print(table)
    if "fits" in found:
        fits = found["fits"]
        verdict = "[green]fits[/green]" if fits["fits"] else "[red]does not fit[/red]"
        reason = f": {escape(fits['reason'])}" if fits["reason"] else ""
        console.print(f"{verdict} {escape(fits['target'])}{reason}", soft_wrap=True)


def shown(value: Any) -> str:
    """Write a value as a table shows it."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(entry)}" for name, entry in value.items())
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
