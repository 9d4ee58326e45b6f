"""`hf-treeflash bench`: ways to decode, timed against each other."""

from typing import Annotated

import typer

from . import options
from .files import writing_to
from .measuring import Limit, Output, Prompts, checked_prompts, measure
from .pair import load


def bench(
    prompts: Prompts = None,
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
    output: Output = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    tree_budget: options.TreeBudget = None,
    num_candidates: options.Candidates = None,
) -> None:
    """Compare plain decoding, the chain, the marginal tree and the TreeFlash tree.

    Ctrl-C ends it with what was measured.
    """
    sampling = options.sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    name, conversations = checked_prompts(prompts, target, limit)
    with writing_to(output, "--json") as write:
        pair = load(target, drafter, device, dtype, tree_budget=tree_budget, num_candidates=num_candidates)
        from ..bench.compare import standard_arms

        code = measure(
            pair,
            standard_arms(pair[2]),
            conversations,
            write,
            thinking=thinking,
            task=task or name,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            seed=seed,
            **sampling,
        )
    raise typer.Exit(code)
