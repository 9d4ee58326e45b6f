"""`hf-treeflash`: demo, generate, bench, train, export, push."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from transformers import TextStreamer
from transformers.utils import logging

from .bench.arms import standard_arms
from .bench.compare import compare
from .bench.pairs import describe_pair, encode_prompt, load_pair, load_target
from .bench.tables import text_table

app = typer.Typer(
    help="Lossless tree speculative decoding inside transformers' generate().",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Target = Annotated[str, typer.Option(help="Folder or Hub repository of the target.")]
Drafter = Annotated[str, typer.Option(help="Folder or Hub repository of the drafter, in any published layout.")]
Tokens = Annotated[int, typer.Option(help="New tokens per prompt.")]
Budget = Annotated[int | None, typer.Option(help="Nodes per target pass; the drafter's own by default.")]
Candidates = Annotated[int | None, typer.Option(help="Previous tokens per slot; the drafter's own by default.")]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily.")]
Thinking = Annotated[bool, typer.Option(help="Thinking mode of the chat template.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda or cpu; cuda if there is one by default.")]
Dtype = Annotated[str | None, typer.Option(help="Such as bfloat16; as stored by default, float32 on a CPU.")]


@app.callback()
def quiet() -> None:
    """Lossless tree speculative decoding inside transformers' generate()."""
    logging.disable_progress_bar()


@app.command()
def demo(
    target: Annotated[str | None, typer.Option(help="Another target than the embedded one.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Its drafter.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON list of {"source": ..., "prompt": ...}.')] = None,
    max_new_tokens: Tokens = 96,
    repeats: Annotated[int, typer.Option(help="Timed repeats.")] = 5,
) -> None:
    """Watch a small embedded pair draft trees: a coloured stream, one tree, a table. Works offline."""
    from .bench.demo import EMBEDDED, run

    if not EMBEDDED.exists() and None in (target, drafter, prompts):
        raise typer.BadParameter("this installation has no embedded pair: give --target, --drafter and --prompts")
    run(target, drafter, prompts, max_new_tokens=max_new_tokens, repeats=repeats)


@app.command()
def generate(
    target: Target,
    drafter: Drafter,
    prompt: Annotated[str, typer.Argument(help="What to answer or continue.")],
    max_new_tokens: Tokens = 256,
    tree_budget: Budget = None,
    num_candidates: Candidates = None,
    temperature: Temperature = 0.0,
    thinking: Thinking = False,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Stream a text."""
    model, tokenizer, draft_model = load_pair(target, drafter, device=device, dtype=dtype)
    set_knobs(draft_model, tree_budget, num_candidates)
    ids = encode_prompt(tokenizer, prompt, thinking).to(model.device)
    torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=draft_model,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **sampling(temperature),
    )
    tokens, passes = out.sequences.shape[1] - ids.shape[1], len(out.acceptance_lengths[0])
    typer.echo(f"\n{tokens} tokens, {passes} target passes after the prompt's: {out.block_efficiency:.2f} per pass")


@app.command()
def bench(
    target: Target,
    drafter: Drafter,
    prompts: Annotated[Path, typer.Argument(help='Prompts: a text file, one per line, or JSON as for "demo".')],
    task: Annotated[str | None, typer.Option(help="Name of the prompts; the file's by default.")] = None,
    max_new_tokens: Tokens = 128,
    tree_budget: Budget = None,
    num_candidates: Candidates = None,
    temperature: Temperature = 0.0,
    thinking: Thinking = False,
    repeats: Annotated[int, typer.Option(help="Timed repeats, all arms in turn.")] = 7,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the evaluation there, for a card.")] = None,
) -> None:
    """Compare plain decoding, the chain, the marginal tree and the TreeFlash tree."""
    model, tokenizer, draft_model = load_pair(target, drafter, device=device, dtype=dtype)
    set_knobs(draft_model, tree_budget, num_candidates)
    encoded = [encode_prompt(tokenizer, text, thinking) for text in read_prompts(prompts)]
    result = compare(
        model,
        standard_arms(draft_model),
        encoded,
        task=task or prompts.stem,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        seed=seed,
        **sampling(temperature),
    )
    typer.echo(text_table(result))
    if output is not None:
        record = {**describe_pair(model, tokenizer, draft_model, thinking), "results": [result]}
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    target: Target,
    drafter: Drafter,
    samples: Annotated[
        Path, typer.Option(help="Responses of the target, JSONL or parquet; made from --chats if new.")
    ],
    chats: Annotated[str | None, typer.Option(help="Chats for the target to answer: JSONL or a data set.")] = None,
    eval_prompts: Annotated[Path | None, typer.Option(help='Held-out prompts, as for "bench".')] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per response to a chat.")] = 1024,
    thinking: Thinking = False,
) -> None:
    """Train a drafter for a target, from one that exists; examples/train_drafter.py also starts from nothing.

    Everything else is a training argument, such as --output_dir out --stage head --learning_rate 1e-4 --max_steps 500.
    """
    from transformers import HfArgumentParser

    from .modeling_treeflash import TreeFlashDraftModel
    from .training import TreeFlashTrainer, TreeFlashTrainingArguments, chat_prompts, load_samples, regenerate

    (arguments,) = HfArgumentParser(cast(Any, TreeFlashTrainingArguments)).parse_args_into_dataclasses(context.args)
    model, tokenizer = load_target(target, device=str(arguments.device), dtype="auto" if arguments.bf16 else "float32")
    if chats is not None:
        prompts = chat_prompts(tokenizer, chats, enable_thinking=thinking)
        extra = {"enable_thinking": thinking, "data": chats}
        regenerate(model, tokenizer, prompts, samples, provenance_extra=extra, max_new_tokens=max_new_tokens)
    head = {} if arguments.stage == "backbone" else {"ar_head": "swiglu"}
    trainer = TreeFlashTrainer(
        TreeFlashDraftModel.from_pretrained(drafter, dtype=model.dtype, **head),
        arguments,
        target=model,
        train_dataset=load_samples(samples),
        eval_prompts=[encode_prompt(tokenizer, text, thinking)[0].tolist() for text in read_prompts(eval_prompts)],
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()


@app.command()
def export(
    drafter: Annotated[str, typer.Argument(help="Folder or Hub repository of the drafter.")],
    folder: Annotated[Path, typer.Argument(help="Where to write: new, empty, or an earlier export.")],
    target: Annotated[str, typer.Option(help="Hub id of the target.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the target.")] = None,
    name: Annotated[str | None, typer.Option(help="Repository id on the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, such as apache-2.0.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Training data; may be repeated.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="What bench --json or a training wrote.")] = None,
    command: Annotated[Path | None, typer.Option(help="The training's command.txt.")] = None,
    speculators: Annotated[bool, typer.Option(help="Only the backbone, in the form of vLLM's speculators.")] = False,
) -> None:
    """Write a drafter as a Hub repository, with the code to run it and a card."""
    from .hub import export_drafter, export_speculators
    from .modeling_treeflash import TreeFlashDraftModel

    with refusals_in_words():
        model = TreeFlashDraftModel.from_pretrained(drafter)
        if speculators:
            files = export_speculators(model, folder, target)
        else:
            files = export_drafter(
                model,
                folder,
                target_id=target,
                target_revision=revision,
                name=name,
                license=license,
                datasets=dataset,
                evaluation=evaluation,
                command=command,
            )
    typer.echo("\n".join(files))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    repository: Annotated[str, typer.Argument(help="Such as me/treeflash-my-target.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only list the files.")] = False,
) -> None:
    """Upload an exported folder to the Hub."""
    from .hub import push as upload

    with refusals_in_words():
        files = upload(folder, repository, private=private, dry_run=dry_run)
    typer.echo("\n".join([f"{'would upload' if dry_run else 'uploaded'} to {repository}:", *files]))


@contextmanager
def refusals_in_words() -> Iterator[None]:
    """Show what was refused as a sentence rather than as a traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def set_knobs(drafter, tree_budget: int | None, num_candidates: int | None) -> None:
    """Set the drafting knobs that were given."""
    for knob, value in (("tree_budget", tree_budget), ("num_candidates", num_candidates)):
        if value is not None:
            setattr(drafter.generation_config, knob, value)


def sampling(temperature: float) -> dict:
    """Return the arguments of `generate` for a temperature."""
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def read_prompts(path: Path | None) -> list[str]:
    """Read prompts from JSON (`[{"prompt": ...}, ...]`) or from the lines of a text file."""
    if path is None:
        return []
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [prompt["prompt"] for prompt in json.loads(text)]
    return [line for line in text.splitlines() if line.strip()]
