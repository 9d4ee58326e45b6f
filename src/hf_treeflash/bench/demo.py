"""A look at tree drafting in a terminal: a coloured stream, the tree of one round, and a table of the arms."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ..candidate_generator import TreeFlashCandidateGenerator
from ..context import Context
from ..taps import tapped_states
from ..tree import DraftTree
from .arms import standard_arms, with_lookup
from .compare import RoundRecorder, compare
from .models import smollm2
from .pairs import encode_prompt, load_pair, with_knobs
from .progress import progress
from .tables import table_rows

# A small trained target and drafter, and two prompts held out of their training, whose texts repeat themselves least.
EMBEDDED = Path(__file__).parents[1] / "tiny"
# A drafter for a chat model, and prompts; in the repository, not in the package.
CHAT = Path(__file__).parents[3] / "drafters"
CHAT_DRAFTER, CHAT_PROMPTS = "smollm2-135m-instruct-treeflash", "prompts_held_out.json"
ACCEPTED, CHOSEN = "green", "bold yellow"
MEASURED_PROMPTS, SHOWN_NODES = 2, 22
TOKENS, CHAT_TOKENS = 96, 64  # so that a laptop is done in some minutes
CHAT_BUDGET = 8  # the chat model's drafter comes with "auto", which shows no trees where they do not pay


def run(
    target_name: str | None = None,
    drafter_name: str | None = None,
    prompts_file: Path | None = None,
    *,
    tiny: bool = False,
    max_new_tokens: int | None = None,
    repeats: int = 5,
    console: Console | None = None,
) -> dict[str, Any]:
    """Show what a drafter does: for SmolLM2-135M-Instruct where its drafter is at hand, else on the embedded pair.

    Args:
        target_name (`str`, *optional*), drafter_name (`str`, *optional*):
            Folders or Hub repositories of another pair.
        prompts_file (`Path`, *optional*):
            JSON list of `{"source": ..., "prompt": ...}`; the first two prompts are streamed and measured.
        tiny (`bool`, *optional*, defaults to `False`):
            Take the embedded pair.
        max_new_tokens (`int`, *optional*):
            Tokens per prompt; by default 64 of SmolLM2 and 96 of other targets.
        repeats (`int`, *optional*, defaults to 5):
            Timed repeats.
        console ([`Console`], *optional*):
            Where to print.

    Returns:
        `dict`: The comparison behind the table, see [`compare`].
    """
    console = console or Console(highlight=False)
    own = None if tiny or target_name or drafter_name else chat_pair(console)
    max_new_tokens = max_new_tokens or (CHAT_TOKENS if own else TOKENS)
    pair = own or (target_name or str(EMBEDDED / "target"), drafter_name or str(EMBEDDED / "drafter"))
    target, tokenizer, drafter = load_pair(*pair)
    if own:
        drafter = with_knobs(drafter, tree_budget=CHAT_BUDGET)
    prompts = read_prompts(prompts_file or (CHAT / CHAT_PROMPTS if own else EMBEDDED / "demo.json"))
    encoded = [encode_prompt(tokenizer, prompt["prompt"]).to(target.device) for prompt in prompts]

    legend = Text.assemble("the prompt, ", ("accepted draft tokens", ACCEPTED), ", ", ("the target's own", CHOSEN))
    console.print(legend)
    streamed = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        console.rule(f"The target continues {prompt['source']}", style="dim")
        console.print(Text(prompt["prompt"]), end="\n\n" if tokenizer.chat_template else "", soft_wrap=True)
        streamed.append(stream(target, tokenizer, drafter, ids, max_new_tokens, console))
    console.rule("The tree of one round", style="dim")
    show_round(target, tokenizer, drafter, encoded[0], streamed[0], console)
    arms = standard_arms(drafter)
    if own:  # answers to a question repeat its words
        arms.append(with_lookup(arms[-1]))
    console.rule(f"{max_new_tokens} tokens after each of {len(prompts)} prompts, in {len(arms)} ways", style="dim")
    console.print(f"measuring {repeats} repeats, all ways in turn ...\n", style="dim")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repeats": repeats, "do_sample": False}
    with progress("texts") as tell:
        result = compare(target, arms, encoded, progress=tell, **settings)
    show_table(result, console)
    return result


def chat_pair(console: Console) -> tuple[str, str] | None:
    """Return SmolLM2-135M-Instruct and its drafter; None where one of them cannot be had."""
    if not (CHAT / CHAT_DRAFTER / "config.json").exists():
        return None
    try:
        return str(smollm2()), str(CHAT / CHAT_DRAFTER)
    except RuntimeError as error:
        console.print(f"Showing the embedded pair: {error}", style="dim")
        return None


def read_prompts(file: Path) -> list[dict[str, str]]:
    """Return the prompts to show: the first ones, of different kinds where they name a kind."""
    by_kind: dict[Any, dict[str, str]] = {}
    for index, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        by_kind.setdefault(row.get("kind", index), row)
    return list(by_kind.values())[:MEASURED_PROMPTS]


def stream(target, tokenizer, drafter, prompt: torch.Tensor, max_new_tokens: int, console: Console) -> list[list[int]]:
    """Generate, printing each round as it is committed; return the tokens of each round."""
    ids = prompt[0].tolist()

    def print_round(tokens: list[int]) -> None:
        for index, token in enumerate(tokens):
            before = tokenizer.decode(ids, skip_special_tokens=True)
            ids.append(token)
            style = CHOSEN if index == len(tokens) - 1 else ACCEPTED
            text = tokenizer.decode(ids, skip_special_tokens=True)[len(before) :]
            console.print(Text(text, style=style), end="", soft_wrap=True)

    recorder = RoundRecorder(print_round)
    with recorder.watching(target):
        target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=drafter,
            streamer=recorder,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    console.print("\n")
    return recorder.rounds


def show_round(target, tokenizer, drafter, prompt: torch.Tensor, rounds: list[list[int]], console: Console) -> None:
    """Print the draft tree of a round of typical length, and the path the target took through it."""
    lengths = [len(tokens) for tokens in rounds[1:]]
    mean = sum(lengths) / len(lengths)
    number = 1 + min(range(len(lengths)), key=lambda index: abs(lengths[index] - mean))
    before = [token for tokens in rounds[:number] for token in tokens]
    tree = draft_after(target, drafter, torch.cat([prompt, prompt.new_tensor([before])], dim=1))
    path = [0]
    for token in rounds[number][:-1]:
        if (path[-1], token) not in tree.children[0]:
            break  # drafted again from a single pass over the text, which rounds differently in half precision
        path.append(tree.children[0][path[-1], token])
    nodes = tree.token_ids.shape[1]
    shown = sorted({*range(min(SHOWN_NODES, nodes)), *path})
    console.print(
        f"Round {number} of {len(lengths)}: the drafter proposed {nodes - 1} nodes in one pass "
        f"({len(shown) - 1} of them shown), each with its probability after the node before it. The target checked "
        f"them in one pass and accepted {len(path) - 1} tokens.\n"
    )
    console.print(rich_tree(tree, tokenizer, shown, path, rounds[number][-1]))
    console.print()


@torch.no_grad()
def draft_after(target, drafter, ids: torch.Tensor) -> DraftTree:
    """Draft the tree that follows a text of shape `(1, length)`, as the round after it would."""
    with tapped_states(target, drafter.config.target_layer_ids) as taps:
        outputs = target(input_ids=ids[:, :-1], use_cache=False, **taps.model_kwargs)
    length = ids.shape[1] - 1
    context = Context(taps.take(outputs), torch.arange(length, device=ids.device)[None], [length])
    generator = TreeFlashCandidateGenerator(drafter, target.get_input_embeddings(), target.get_output_embeddings())
    return generator.draft_tree(ids[:, -1], context)


def rich_tree(tree: DraftTree, tokenizer, shown: list[int], path: list[int], own_choice: int) -> Tree:
    """Lay a draft tree out for the terminal.

    Args:
        shown (`list[int]`):
            Nodes to draw, root first; closed under parents.
        path (`list[int]`):
            Nodes the target accepted, root first.
        own_choice (`int`):
            The token the target chose after them.
    """
    tokens, parents, scores = tree.token_ids[0].tolist(), tree.parents[0].tolist(), tree.path_log_probs[0]
    branches = {0: Tree(Text(f"{tokenizer.decode([tokens[0]])!r}  the newest token of the text"))}
    for node in shown[1:]:
        parent = parents[node]
        probability = float((scores[node] - scores[parent]).exp())
        label = Text.assemble(
            (repr(tokenizer.decode([tokens[node]])), ACCEPTED if node in path else ""), (f"  {probability:.2f}", "dim")
        )
        branches[node] = branches[parent].add(label, guide_style=ACCEPTED if node in path else "")
    branches[path[-1]].add(Text(f"{tokenizer.decode([own_choice])!r}  the target's own", style=CHOSEN))
    return branches[0]


def show_table(result: dict[str, Any], console: Console) -> None:
    """Print a comparison."""
    heading, *rows = table_rows(result)
    table = Table()
    for index, name in enumerate(heading):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    settings, where = result["settings"], result["environment"]
    console.print(
        f"Greedy, batch 1, {where['device']}, {where['threads']} threads, {where['dtype']}; medians of "
        f"{settings['repeats']} interleaved repeats. Distinct 4-grams of the text: "
        f"{result['arms'][0]['distinct_4grams']:.2f} (repetition flatters every drafter).",
        style="dim",
    )
