"""What `bench` and `eval` share: prompts from a file, arms compared, a table, and a record for a card."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from .failures import FAULT, INTERRUPTED
from .pair import check_length
from .report import Report
from .terminal import note

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


class Read(NamedTuple):
    """Prompts as they were read: a name, and conversations to which answers may still have to be written.

    Args:
        name (`str`):
            Of the task.
        conversations (`list[list[dict[str, str]]]`):
            Messages of each; where users speak twice in a row, an answer of the target belongs between.
    """

    name: str
    conversations: list[list[dict[str, str]]]


class Grid(NamedTuple):
    """What a measurement runs over.

    Args:
        batch_sizes (`list[int]`):
            Prompts at once.
        samplings (`list[dict]`):
            Arguments of `generate`.
    """

    batch_sizes: list[int]
    samplings: list[dict[str, Any]]


def checked_prompts(
    prompts: Path | None, target: str | None, limit: int | None, paper_task: str | None = None
) -> Read:
    """Return the prompts, before anything loads."""
    if paper_task is not None:
        from ..bench.tasks import SAMPLES, load_task

        turns = load_task(paper_task, limit or SAMPLES)
        return Read(paper_task, [[{"role": "user", "content": turn} for turn in of_one] for of_one in turns])
    from ..bench.prompts import read_prompts

    if prompts is None and target is not None:
        raise typer.BadParameter("Give a file of prompts for this target.", param_hint="PROMPTS")
    path = prompts or EMBEDDED_PROMPTS
    return Read(path.stem if prompts else "embedded", read_prompts(path, limit or (None if prompts else 4)))


def measure(
    pair: tuple, arms: list[Any], read: Read, grid: Grid, report: Report, *, thinking: bool, **settings: Any
) -> int:
    """Compare arms at every point of a grid; return the exit code.

    Args:
        pair (`tuple`):
            Target, tokenizer and drafter.
        arms (`list[Arm]`):
            What to compare.
        read ([`Read`]):
            The prompts.
        grid ([`Grid`]):
            Batches and samplings.
        report ([`Report`]):
            Takes the record after every comparison.
        thinking (`bool`):
            Thinking mode of the chat template.
        settings:
            Of [`compare`].
    """
    from ..bench.compare import compare
    from ..bench.differences import is_exact
    from ..bench.pairs import describe_pair
    from ..bench.progress import progress
    from ..bench.stages import stages_of_arms
    from ..bench.tasks import encoded_turns

    target, tokenizer, drafter = pair
    encoded = encoded_turns(target, tokenizer, read.conversations, settings["max_new_tokens"], thinking)
    for ids in encoded:
        check_length(target, ids.shape[1], settings["max_new_tokens"])
    record: dict[str, Any] = {**describe_pair(target, tokenizer, drafter, thinking), "results": []}
    for size in grid.batch_sizes:
        for sampling in grid.samplings:
            with progress("texts") as tell:
                result = compare(target, arms, encoded, batch_size=size, progress=tell, **settings, **sampling)
            record["results"].append(result)
            report.add(record)
            if result["settings"].get("interrupted"):
                note("interrupted: this is what had been measured")
                return INTERRUPTED
    report.draw(record, lambda: stages_of_arms(target, arms, encoded, settings["max_new_tokens"]))
    return 0 if all(map(is_exact, record["results"])) else FAULT
