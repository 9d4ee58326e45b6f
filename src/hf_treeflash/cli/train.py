"""`hf-treeflash train`: a drafter for a target, from one that exists."""

from argparse import ArgumentParser
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

from . import options
from .options import model_source
from .terminal import quiet_off_a_terminal


class Head(str, Enum):
    """Heads that condition a drafted token on the one before it."""

    swiglu = "swiglu"
    markov = "markov"
    selector = "selector"
    none = "none"


def train(
    context: typer.Context,
    target: Annotated[str | None, typer.Option(help="Folder or Hub repository.", callback=model_source)] = None,
    drafter: Annotated[
        str | None, typer.Option(help="Drafter to start from, in any published layout.", callback=model_source)
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Responses of the target, JSONL or parquet; made from --chats if new.", dir_okay=False),
    ] = None,
    chats: Annotated[str | None, typer.Option(help="Chats for the target to answer: JSONL or a data set.")] = None,
    eval_prompts: Annotated[
        Path | None, typer.Option(help='Held-out prompts, as for "bench".', exists=True, dir_okay=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per response to a chat.", min=1)] = 1024,
    thinking: options.Thinking = False,
    ar_head: Annotated[
        Head, typer.Option("--ar-head", "--ar_head", help="Head for a drafter that has none.")
    ] = Head.swiglu,
    head_rank: Annotated[
        int, typer.Option("--head-rank", "--head_rank", help="Width of a markov or selector head.", min=1, max=2**16)
    ] = 256,
    arguments: Annotated[bool, typer.Option("--arguments", help="List the training arguments, and end.")] = False,
) -> None:
    """Train a drafter for a target, from one that exists; examples/train_drafter.py also starts from nothing.

    Everything else is a training argument, such as --output_dir out --stage head --learning_rate 1e-4 --max_steps 500;
    --arguments lists them.
    """
    if arguments:
        typer.echo(training_parser().format_help())
        return
    for name, value in (("--target", target), ("--drafter", drafter), ("--samples", samples)):
        if value is None:
            raise ValueError(f"Missing option {name}.")
    check_data(cast(Path, samples), chats)
    quiet_off_a_terminal()
    (given,) = cast(Any, training_parser()).parse_args_into_dataclasses(context.args)
    run(
        cast(str, target),
        cast(str, drafter),
        cast(Path, samples),
        given,
        chats=chats,
        eval_prompts=eval_prompts,
        max_new_tokens=max_new_tokens,
        thinking=thinking,
        head={} if ar_head is Head.none else {"ar_head": ar_head.value, "head_rank": head_rank},
    )


def check_data(samples: Path, chats: str | None) -> None:
    """Refuse data that are not there, before anything loads."""
    if samples.suffix not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"{samples} must end in .jsonl or .parquet.", param_hint="--samples")
    if chats is None and not samples.exists():
        raise typer.BadParameter(f"There is no {samples}, and no --chats to make it from.", param_hint="--samples")
    if chats is not None and Path(chats).suffix == ".jsonl" and not Path(chats).is_file():
        raise typer.BadParameter(f"There is no file {chats}.", param_hint="--chats")


def training_parser() -> ArgumentParser:
    """Return the parser of the training arguments, whose mistakes are sentences."""
    from transformers import HfArgumentParser

    from ..training import TreeFlashTrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"Training arguments: {message} (hf-treeflash train --arguments lists them).")

    return Parser(cast(Any, TreeFlashTrainingArguments), prog="hf-treeflash train", add_help=False)


def run(
    target: str,
    drafter: str,
    samples: Path,
    arguments: Any,
    *,
    chats: str | None,
    eval_prompts: Path | None,
    max_new_tokens: int,
    thinking: bool,
    head: dict[str, Any],
) -> None:
    """Make the responses, where they are not there yet, and train."""
    from ..bench.pairs import encode_messages, load_target
    from ..bench.prompts import read_prompts
    from ..generation import install_hook
    from ..hub.inspection import check_names
    from ..training import TreeFlashTrainer, chat_prompts, load_samples, regenerate

    check_names(target, drafter)
    install_hook()
    held_out = [] if eval_prompts is None else read_prompts(eval_prompts)
    model, tokenizer = load_target(target, device=str(arguments.device), dtype="auto" if arguments.bf16 else "float32")
    if chats is not None:
        prompts = chat_prompts(tokenizer, chats, enable_thinking=thinking)
        extra = {"enable_thinking": thinking, "data": chats}
        regenerate(model, tokenizer, prompts, samples, provenance_extra=extra, max_new_tokens=max_new_tokens)
    trainer = TreeFlashTrainer(
        load_drafter(drafter, model.dtype, {} if arguments.stage == "backbone" else head),
        arguments,
        target=model,
        train_dataset=load_samples(samples),
        eval_prompts=[encode_messages(tokenizer, messages, thinking)[0].tolist() for messages in held_out],
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()


def load_drafter(name: str, dtype: Any, head: dict[str, Any]) -> Any:
    """Load a drafter, with a fresh head where it has none."""
    from ..modeling_treeflash import TreeFlashDraftModel

    drafter = TreeFlashDraftModel.from_pretrained(name, dtype=dtype)
    if drafter.config.ar_head is not None or not head:
        return drafter
    return TreeFlashDraftModel.from_pretrained(name, dtype=dtype, **head)
