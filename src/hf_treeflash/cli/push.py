"""`hf-treeflash push`: what an export wrote, to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .options import REPOSITORY


def repository_id(value: str) -> str:
    """Refuse what is no name of a repository."""
    if REPOSITORY.fullmatch(value) is None:
        raise typer.BadParameter(f"{value!r} is no name of a repository, such as me/treeflash-my-target.")
    return value


def push(
    folder: Annotated[Path, typer.Argument(help="An exported folder.", exists=True, file_okay=False)],
    repository: Annotated[str, typer.Argument(help="Such as me/treeflash-my-target.", callback=repository_id)],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only list the files.")] = False,
) -> None:
    """Upload an exported folder to the Hub."""
    from ..hub.upload import push as upload

    files = upload(folder, repository, private=private, dry_run=dry_run)
    typer.echo("\n".join([f"{'would upload' if dry_run else 'uploaded'} to {repository}:", *files]))
