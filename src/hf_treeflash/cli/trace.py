"""`hf-treeflash trace`: a generation round by round, on a page."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .files import folder_for_writing
from .generate import prompt_text
from .pair import encoded, load
from .terminal import note


def trace(
    prompt: Annotated[str | None, typer.Argument(help="What to answer or continue; -: standard input.")] = None,
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write trace.html and trace.json to.", file_okay=False)
    ] = Path("trace"),
    picture: Annotated[
        int | None, typer.Option(help="Also write this round's tree, as round.svg.", min=1, max=2**20)
    ] = None,
    target: options.Target = None,
    drafter: options.Drafter = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    max_new_tokens: options.Tokens = 256,
    system: options.System = None,
    thinking: options.Thinking = False,
    seed: options.Seed = 0,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    tree_budget: options.TreeBudget = None,
    num_candidates: options.Candidates = None,
    branching: options.Branching = None,
    draft_temperature: options.DraftTemperature = None,
    lookup: options.Lookup = None,
) -> None:
    """Write a generation down, round by round: a page with its trees, both models' probabilities, and the time."""
    settings = options.sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    settings |= options.given(prompt_lookup_num_tokens=lookup)
    text = prompt_text(prompt)
    knobs = {"num_candidates": num_candidates, "branching": branching, "draft_temperature": draft_temperature}
    with folder_for_writing(folder, "--output"):
        model, tokenizer, draft_model = load(target, drafter, device, dtype, tree_budget=tree_budget, **knobs)
        ids = encoded(model, tokenizer, text, system, thinking, max_new_tokens)
        call = {"max_new_tokens": max_new_tokens, **settings}
        for file in record(model, tokenizer, draft_model, ids, call, seed, folder, picture):
            typer.echo(file)


def record(
    model: Any, tokenizer: Any, drafter: Any, ids: Any, call: dict, seed: int, folder: Path, picture: int | None
) -> list[Path]:
    """Generate, and write what was seen; return the files."""
    from ..bench.answering import answer
    from ..bench.progress import progress
    from ..tracing import round_picture, trace, write_trace

    written: list[int] = []

    def on_round(tokens: list[int], *reached: float | None) -> None:
        written.extend(tokens)
        tell(len(written), call["max_new_tokens"])

    with trace() as seen, progress("tokens") as tell:
        answer(model, drafter, ids, on_round=on_round, seed=seed, **call)
    (text,) = seen.texts
    tokens, passes = sum(len(each.emitted) for each in text.rounds), len(text.rounds) - 1
    note(f"{tokens} tokens, {passes} target passes after the prompt's: {(tokens - 1) / max(passes, 1):.2f} per pass")
    files = write_trace(seen, folder, tokenizer)
    if picture is not None:
        if picture > passes:
            raise typer.BadParameter(f"There are {passes} rounds, none of number {picture}.", param_hint="--picture")
        file = folder / "round.svg"
        file.write_text(round_picture(seen.to_dict(tokenizer), picture), encoding="utf-8")
        files.append(file)
    return files
