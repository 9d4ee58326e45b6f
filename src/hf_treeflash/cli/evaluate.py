"""`hf-treeflash eval`: what a drafter's trees reach on prompts, without timing."""

from typing import Annotated, Any

import typer

from . import options
from .files import writing_to
from .measuring import Limit, Output, Prompts, checked_prompts, measure
from .pair import load

Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--tree-budget",
        help="Nodes per target pass, or auto; may be repeated. The drafter's own by default.",
        callback=options.tree_budgets,
        rich_help_panel=options.DRAFTING,
        metavar="INTEGER|auto",
    ),
]


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
    tree_budget: Budgets = None,
    num_candidates: options.Candidates = None,
) -> None:
    """Tokens per target pass and exactness of a drafter's trees, without timing: for a machine that is busy."""
    sampling = options.sampling(temperature)
    name, conversations = checked_prompts(prompts, target, limit)
    with writing_to(output, "--json") as write:
        pair = load(target, drafter, device, dtype, num_candidates=num_candidates)
        code = measure(
            pair,
            arms(pair[2], tree_budget or [None]),
            conversations,
            write,
            thinking=thinking,
            task=task or name,
            max_new_tokens=max_new_tokens,
            repeats=0,
            seed=seed,
            **sampling,
        )
    raise typer.Exit(code)


def arms(drafter: Any, budgets: list[Any]) -> list[Any]:
    """Return plain decoding, and the drafter's trees at each budget."""
    from ..bench.compare import Arm
    from ..bench.pairs import with_knobs

    trees = []
    for budget in budgets:
        view = with_knobs(drafter, **options.given(tree_budget=budget))
        trees.append(Arm(f"tree B{view.generation_config.tree_budget}", view))
    return [Arm("plain"), *trees]
