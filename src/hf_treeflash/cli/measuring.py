"""What `bench` and `eval` share: prompts from a file, arms compared, a table, and a record for a card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .pair import check_length
from .terminal import note, progress

Prompts = Annotated[
    Path | None,
    typer.Argument(
        help="Prompts: .jsonl or .json with `prompt` or `messages` in each row, or text, one prompt per line. "
        "Without a file, those of the embedded pair.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many prompts.", min=1, rich_help_panel="Run")]
Output = Annotated[
    Path | None,
    typer.Option("--json", help="Write the record there, for a card.", rich_help_panel="Run"),
]
EMBEDDED_PROMPTS = Path(__file__).parents[1] / "tiny" / "prompts.json"


def checked_prompts(prompts: Path | None, target: str | None, limit: int | None) -> tuple[str, list[Any]]:
    """Return the task's name and the conversations, before anything loads."""
    from ..bench.prompts import read_prompts

    if prompts is None and target is not None:
        raise typer.BadParameter("Give a file of prompts for this target.", param_hint="PROMPTS")
    path = prompts or EMBEDDED_PROMPTS
    return path.stem if prompts else "embedded", read_prompts(path, limit or (None if prompts else 4))


def measure(
    pair: tuple, arms: list[Any], conversations: list[Any], write: Callable[[str], None], **settings: Any
) -> int:
    """Compare arms, print the table, write the record; return the exit code.

    Args:
        pair (`tuple`):
            Target, tokenizer and drafter.
        arms (`list[Arm]`):
            What to compare.
        conversations (`list`):
            From [`read_prompts`].
        write (`Callable`):
            Takes the record.
        settings:
            Of [`compare`], and `thinking`.
    """
    from ..bench.compare import compare, text_table
    from ..bench.pairs import describe_pair, encode_messages

    target, tokenizer, drafter = pair
    thinking = settings.pop("thinking")
    encoded = [encode_messages(tokenizer, messages, thinking) for messages in conversations]
    for ids in encoded:
        check_length(target, ids.shape[1], settings["max_new_tokens"])
    with progress("texts") as tell:
        result = compare(target, arms, encoded, progress=tell, **settings)
    typer.echo(text_table(result))
    if result["settings"].get("interrupted"):
        note("interrupted: this is what had been measured")
    record = {**describe_pair(target, tokenizer, drafter, thinking), "results": [result]}
    write(json.dumps(record, indent=2) + "\n")
    return 130 if result["settings"].get("interrupted") else 0
