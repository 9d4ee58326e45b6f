"""`hf-treeflash eval`: what a drafter's trees reach on prompts, without timing."""

from typing import Annotated, Any

import typer

from . import options
from .files import writing_to
from .measuring import Grid, Limit, Output, Prompts, checked_prompts, measure
from .pair import load
from .report import Report


def evaluate(
    prompts: Prompts = None,
    target: options.Target = None,
    drafter: options.Drafter = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    task: Annotated[str | None, typer.Option(help="Name of the prompts; the file's by default.")] = None,
    limit: Limit = None,
    max_new_tokens: options.Tokens = 128,
    thinking: options.Thinking = False,
    seed: options.Seed = 0,
    output: Output = None,
    temperature: options.Temperature = 0.0,
    tree_budget: options.TreeBudgets = None,
    num_candidates: options.Candidates = None,
) -> None:
    """Tokens per target pass and exactness of a drafter's trees, without timing: for a machine that is busy."""
    grid = Grid(batch_sizes=[1], samplings=[options.sampling(temperature)])
    read = checked_prompts(prompts, target, limit)
    with writing_to(output, "--json") as write:
        pair = load(target, drafter, device, dtype, num_candidates=num_candidates)
        ways, report = arms(pair[2], tree_budget or [None]), Report(write, ignore, ignore)
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repeats": 0, "seed": seed, "thinking": thinking}
        code = measure(pair, ways, read, grid, report, task=task or read.name, **settings)
    raise typer.Exit(code)


def ignore(text: str) -> None:
    """Write nothing."""


def arms(drafter: Any, budgets: list[Any]) -> list[Any]:
    """Return plain decoding, and the drafter's trees at each budget."""
    from ..bench.arms import Arm
    from ..bench.pairs import with_knobs

    trees = []
    for budget in budgets:
        view = with_knobs(drafter, **options.given(tree_budget=budget))
        trees.append(Arm(f"tree B{view.generation_config.tree_budget}", view))
    return [Arm("plain"), *trees]
