"""`hf-treeflash check`: the report on a pair."""

import json
from typing import Annotated

import typer

from . import options
from .pair import check_device, named_pair
from .terminal import note, quiet_off_a_terminal


def check(
    target: options.Target = None,
    drafter: options.Drafter = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    max_new_tokens: options.Tokens = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say all that can be known of a pair, and whether it drafts: the first thing to ask when something is amiss.

    Exit code 1 where something stands in the way.
    """
    names = named_pair(target, drafter)
    check_device(device)
    quiet_off_a_terminal()
    from ..bench.check import check as report_on
    from ..bench.pairs import load_pair
    from ..bench.progress import progress
    from ..generation import install_hook

    install_hook()
    model, tokenizer, draft_model = load_pair(*names, device=device, dtype=dtype and dtype.value)
    note("generating three texts, with and without the drafter ...")
    with progress("texts") as tell:
        report = report_on(model, draft_model, tokenizer, max_new_tokens=max_new_tokens, progress=tell)
    typer.echo(json.dumps([row._asdict() for row in report.rows], indent=2) if as_json else str(report))
    raise typer.Exit(0 if report.ok else 1)
