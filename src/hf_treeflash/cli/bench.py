"""`hf-treeflash bench`: ways to decode, timed against each other."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .files import folder_for_writing, writing_to
from .measuring import Grid, Limit, Output, Prompts, checked_prompts, measure
from .pair import load
from .report import Report

ARMS = "Arms"


class PaperTask(str, Enum):
    """The sets of prompts that the TreeFlash paper compares on."""

    gsm8k = "gsm8k"
    math500 = "math500"
    humaneval = "humaneval"
    mbpp = "mbpp"
    mt_bench = "mt-bench"


def bench(
    prompts: Prompts = None,
    paper_task: Annotated[
        PaperTask | None,
        typer.Option("--paper-task", help="64 prompts of one of the paper's sets, by `datasets`."),
    ] = None,
    target: options.Target = None,
    drafter: options.Drafter = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    task: Annotated[str | None, typer.Option(help="Name of the prompts; the file's by default.")] = None,
    limit: Limit = None,
    max_new_tokens: options.Tokens = 128,
    repeats: options.Repeats = 7,
    thinking: options.Thinking = False,
    seed: options.Seed = 0,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Prompts at once; may be repeated. 1 by default.", min=1, max=1024)
    ] = None,
    quick: Annotated[bool, typer.Option(help="Two prompts, 48 tokens, 3 repeats, trees of 8 and 16 nodes.")] = False,
    tree_budget: options.TreeBudgets = None,
    num_candidates: Annotated[
        list[int] | None,
        typer.Option(
            help="Previous tokens per slot; may be repeated.", min=1, max=1024, rich_help_panel=options.DRAFTING
        ),
    ] = None,
    branching: options.Branching = None,
    draft_temperature: options.DraftTemperature = None,
    draft_window: options.DraftWindow = None,
    compiled: Annotated[
        bool, typer.Option(help="Also plain decoding compiled, and trees over static caches.", rich_help_panel=ARMS)
    ] = False,
    arms: Annotated[
        list[str] | None,
        typer.Option(help="Beginning of an arm's name, such as 'TreeFlash'; may be repeated.", rich_help_panel=ARMS),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            help="0 decodes greedily; may be repeated. 0 by default.",
            min=0.0,
            max=100.0,
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    output: Output = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables there.", rich_help_panel="Run")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row per arm there.", rich_help_panel="Run")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for three pictures.", rich_help_panel="Run")] = None,
) -> None:
    """Compare plain decoding, prompt lookup, chains and trees: same prompts, in turn, texts checked as it runs.

    Exit code 1: some arm's text was not plain decoding's. Ctrl-C ends it with what was measured.
    """
    if quick:
        limit, max_new_tokens, repeats = limit or 2, 48, 3
    budgets: list[Any] = tree_budget or ([8, 16] if quick else [])
    grid = Grid(
        batch_sizes=batch_size or [1],
        samplings=options.samplings(temperature or [0.0], top_k=top_k, top_p=top_p, min_p=min_p),
    )
    if paper_task is not None and prompts is not None:
        raise typer.BadParameter("Give a file of prompts or --paper-task, not both.")
    read = checked_prompts(prompts, target, limit, paper_task and paper_task.value)
    with (
        writing_to(output, "--json") as write_json,
        writing_to(markdown, "--markdown") as write_markdown,
        writing_to(csv, "--csv") as write_csv,
        folder_for_writing(plots, "--plots") as folder,
    ):
        knobs = {"branching": branching, "draft_temperature": draft_temperature, "draft_window": draft_window}
        pair = load(target, drafter, device, dtype, **knobs)
        report = Report(write_json, write_markdown, write_csv, folder)
        ways = chosen(pair[2], budgets, num_candidates, compiled, arms)
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "seed": seed,
            "thinking": thinking,
        }
        code = measure(pair, ways, read, grid, report, task=task or read.name, **settings)
    raise typer.Exit(code)


def chosen(
    drafter: Any, budgets: list[Any], candidates: list[int] | None, compiled: bool, names: list[str] | None
) -> list[Any]:
    """Return the arms whose names begin as asked; plain decoding is always the first."""
    from ..bench.arms import all_arms

    config = drafter.generation_config
    listed = all_arms(drafter, budgets or [config.tree_budget], candidates or [config.num_candidates], compiled)
    if not names:
        return listed
    for name in names:
        if not any(arm.name.startswith(name) for arm in listed):
            there = ", ".join(arm.name for arm in listed)
            raise typer.BadParameter(f"No arm's name begins with {name!r}; there are {there}.", param_hint="--arms")
    return [listed[0], *(arm for arm in listed[1:] if arm.name.startswith(tuple(names)))]
