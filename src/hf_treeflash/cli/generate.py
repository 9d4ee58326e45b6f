"""`hf-treeflash generate`: one text."""

import json
import sys
from typing import Annotated, Any

import typer

from . import options
from .pair import encoded, load
from .terminal import note, output
from .writing import LEGEND, Writer, reached


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer or continue; -: standard input.")] = None,
    target: options.Target = None,
    drafter: options.Drafter = None,
    device: options.Device = None,
    dtype: options.DtypeOption = None,
    max_new_tokens: options.Tokens = 256,
    system: options.System = None,
    thinking: options.Thinking = False,
    stop: Annotated[
        list[str] | None, typer.Option(help="End where this is written; may be repeated.", rich_help_panel="Run")
    ] = None,
    seed: options.Seed = 0,
    show_draft: options.ShowDraft = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Without the drafter, to compare.", rich_help_panel="Run")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text and figures as JSON.", rich_help_panel="Run")
    ] = False,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    no_repeat_ngram_size: options.NoRepeat = None,
    tree_budget: options.TreeBudget = None,
    num_candidates: options.Candidates = None,
    branching: options.Branching = None,
    draft_temperature: options.DraftTemperature = None,
    draft_window: options.DraftWindow = None,
    lookup: options.Lookup = None,
    static: options.Static = False,
) -> None:
    """Stream a text."""
    cuts = options.sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    settings = {
        **cuts,
        **options.given(
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            stop_strings=stop or None,
            prompt_lookup_num_tokens=None if plain else lookup,
            cache_implementation="static" if static else None,
        ),
    }
    text = prompt_text(prompt)
    model, tokenizer, draft_model = load(
        target,
        drafter,
        device,
        dtype,
        tree_budget=tree_budget,
        num_candidates=num_candidates,
        branching=branching,
        draft_temperature=draft_temperature,
        draft_window=draft_window,
    )
    ids = encoded(model, tokenizer, text, system, thinking, max_new_tokens)
    call = {"seed": seed, "max_new_tokens": max_new_tokens, **settings}
    if stop:
        call["tokenizer"] = tokenizer
    write(model, tokenizer, None if plain else draft_model, ids, call, show_draft=show_draft, as_json=as_json)


def prompt_text(prompt: str | None) -> str:
    """Return what was given as prompt, or standard input."""
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("Give a prompt, or pipe one in.", param_hint="PROMPT")
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text:
        raise typer.BadParameter("The prompt is empty.", param_hint="PROMPT")
    return text


def write(model: Any, tokenizer: Any, drafter: Any, ids: Any, call: dict, *, show_draft: bool, as_json: bool) -> None:
    """Generate and print, as text or as JSON."""
    from ..bench.answering import answer

    if as_json:
        result = answer(model, drafter, ids, **call)
        record = {
            "text": tokenizer.decode(result.token_ids, skip_special_tokens=True),
            "token_ids": result.token_ids,
            "prompt_tokens": ids.shape[1],
            "block_efficiency": result.block_efficiency,
            "acceptance_lengths": result.acceptance_lengths,
            "prompt_seconds": result.prompt_seconds,
            "tokens_per_second": result.tokens_per_second,
            "settings": {name: value for name, value in call.items() if name != "tokenizer"},
        }
        typer.echo(json.dumps(record, indent=2))
        return
    if show_draft:
        output().print(LEGEND)
    with Writer(tokenizer, show_draft) as writer:
        result = answer(model, drafter, ids, on_round=writer.round, **call)
    note(reached(result.block_efficiency, result.tokens_per_second, len(result.token_ids)))
