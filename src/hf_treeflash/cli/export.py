"""`hf-treeflash export`: a drafter as a Hub repository."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import model_source
from .terminal import quiet_off_a_terminal


def export(
    drafter: Annotated[str, typer.Argument(help="Folder or Hub repository of the drafter.", callback=model_source)],
    folder: Annotated[Path, typer.Argument(help="Where to write: new, empty, or an earlier export.", file_okay=False)],
    target: Annotated[str, typer.Option(help="Hub id of the target.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the target.")] = None,
    name: Annotated[str | None, typer.Option(help="Repository id on the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, such as apache-2.0.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Training data; may be repeated.")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What bench --json, eval --json or a training wrote.", exists=True, dir_okay=False),
    ] = None,
    command: Annotated[
        Path | None, typer.Option(help="The training's command.txt.", exists=True, dir_okay=False)
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="How the training went: a training_record.json.", exists=True, dir_okay=False)
    ] = None,
    speculators: Annotated[bool, typer.Option(help="Only the backbone, in the form of vLLM's speculators.")] = False,
) -> None:
    """Write a drafter as a Hub repository, with the code to run it and a card."""
    quiet_off_a_terminal()
    from ..hub.evaluation import read_evaluation
    from ..hub.folder import earlier_files

    earlier_files(folder)  # refuses what it would not replace, before anything loads
    if evaluation is not None:
        read_evaluation(evaluation)
    recorded = None if record is None else read_record(record)
    from ..hub import export_drafter, export_speculators
    from ..modeling_treeflash import TreeFlashDraftModel

    model = TreeFlashDraftModel.from_pretrained(drafter)
    if speculators:
        files = export_speculators(model, folder, target)
    else:
        files = export_drafter(
            model,
            folder,
            target_id=target,
            target_revision=revision,
            name=name,
            license=license,
            datasets=dataset,
            evaluation=evaluation,
            command=command,
            record=recorded,
        )
    typer.echo("\n".join(files))


def read_record(file: Path) -> dict:
    """Return the record in a file; refuse what is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise typer.BadParameter(f"{file} is no JSON: {error}.", param_hint="--record") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{file} holds no JSON object.", param_hint="--record")
    return found
