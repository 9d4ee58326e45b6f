"""`hf-treeflash demo`: a look at tree drafting."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import quiet_off_a_terminal


def demo(
    target: options.Target = None,
    drafter: options.Drafter = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON list of {"source": ..., "prompt": ...}.', exists=True, dir_okay=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="New tokens per prompt; 64 of SmolLM2, else 96.", min=8, max=4096)
    ] = None,
    repeats: options.Repeats = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="The embedded pair, though a chat model is at hand.")] = False,
) -> None:
    """Watch a pair draft trees: coloured streams, one tree, a table. SmolLM2 in a checkout, else an embedded pair."""
    given = [value is not None for value in (target, drafter, prompts)]
    if any(given) and not all(given):
        raise ValueError("Give --target, --drafter and --prompts together, or none of them.")
    quiet_off_a_terminal()
    from ..bench import demo as shown
    from ..generation import install_hook

    if not any(given) and not shown.EMBEDDED.exists():
        raise ValueError("This installation has no embedded pair: give --target, --drafter and --prompts.")
    install_hook()
    shown.run(target, drafter, prompts, tiny=tiny, max_new_tokens=max_new_tokens, repeats=repeats)
