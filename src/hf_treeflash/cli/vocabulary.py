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
    from ..training.draft_vocabulary import frequent_tokens, response_tokens
    from ..training.responses import load_samples

    texts = list(response_tokens(load_samples(samples)))
    kept = frequent_tokens(texts, size)
    model = TreeFlashDraftModel.from_pretrained(drafter, dtype="auto")
    model.set_draft_vocabulary(kept)
    model.save_pretrained(folder)
    known, tokens = set(kept.tolist()), [token for text in texts for token in text]
    share = sum(token in known for token in tokens) / max(1, len(tokens))
    typer.echo(f"{folder} drafts {size} tokens, {share:.2%} of what the responses hold")
