"""`hf-treeflash vocabulary`: the tokens that a drafter drafts."""

from pathlib import Path
from typing import Annotated

import typer

from .options import model_source
from .terminal import quiet_off_a_terminal


def vocabulary(
    drafter: Annotated[str, typer.Argument(help="Folder or Hub repository of the drafter.", callback=model_source)],
    samples: Annotated[
        Path, typer.Argument(help="Responses of the target, as train makes them.", exists=True, dir_okay=False)
    ],
    folder: Annotated[Path, typer.Argument(help="Where to save the drafter.", file_okay=False)],
    size: Annotated[int, typer.Option(help="Tokens to draft, the most frequent ones of the responses.", min=1)] = 8192,
) -> None:
    """Have a drafter draft frequent tokens only: rounds cost less, and texts stay the target's."""
    quiet_off_a_terminal()
    from ..modeling_treeflash import TreeFlashDraftModel
    from ..training.draft_vocabulary import frequent_tokens, held_out_share, response_tokens
    from ..training.responses import load_samples

    texts = list(response_tokens(load_samples(samples)))
    kept = frequent_tokens(texts, size)
    model = TreeFlashDraftModel.from_pretrained(drafter, dtype="auto")
    model.set_draft_vocabulary(kept)
    model.save_pretrained(folder)
    share, counted = held_out_share(texts, size), sum(map(len, texts))
    typer.echo(f"{folder} drafts {size} tokens, the most frequent ones of {counted}")
    typer.echo(f"so many of one half of the responses hold {share:.1%} of the other: more responses choose better")
