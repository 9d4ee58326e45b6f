"""The options that commands share, each checked as it is read, before anything loads."""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

MODELS, DRAFTING, SAMPLING, RUN = "Models", "Drafting", "Sampling", "Run"
# A Hub repository: a name, or an owner and a name.
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS_ARE_ELSEWHERE = (".safetensors", ".bin", ".pt", ".gguf")


class Dtype(str, Enum):
    """What weights may be loaded as."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def model_source(context: typer.Context, value: str | None) -> str | None:
    """Refuse what can be neither a folder with a model nor the name of a repository."""
    if value is None or context.resilient_parsing:
        return value
    path = Path(value).expanduser()
    if path.is_file():
        raise typer.BadParameter(f"{value} is a file; name the folder it lies in.")
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise typer.BadParameter(f"The folder {value} holds no config.json, so no model.")
        return str(path)
    if value.startswith((".", "/", "~")) or value.endswith("/") or value.count("/") > 1 or "\\" in value:
        raise typer.BadParameter(f"There is no folder {value}.")
    if REPOSITORY.fullmatch(value) is None or value.endswith(WEIGHTS_ARE_ELSEWHERE):
        raise typer.BadParameter(f"{value!r} is neither a folder nor the name of a repository, such as owner/name.")
    return value


def tree_budget(value: str | None) -> Any:
    """Read a number of nodes, or `auto`."""
    if value is None or value == "auto":
        return value
    if not re.fullmatch(r"\d{1,5}", value) or not 2 <= int(value) <= 4096:
        raise typer.BadParameter(f"{value!r} is neither a number from 2 to 4096 nor 'auto'.")
    return int(value)


def tree_budgets(values: list[str] | None) -> Any:
    """Read several of them."""
    return [tree_budget(value) for value in values or []]


Target = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub repository of the target; without target and drafter, the embedded pair.",
        callback=model_source,
        rich_help_panel=MODELS,
    ),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hub repository of its drafter, in any published layout.",
        callback=model_source,
        rich_help_panel=MODELS,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cuda or cpu; cuda by default, if there is one.", rich_help_panel=MODELS)
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="As stored by default, float32 on a CPU.", rich_help_panel=MODELS)
]
Thinking = Annotated[bool, typer.Option(help="Thinking mode of the chat template.", rich_help_panel=RUN)]
System = Annotated[str | None, typer.Option(help="System message, for the chat template.", rich_help_panel=RUN)]
Tokens = Annotated[int, typer.Option(help="New tokens per text, at most.", min=1, max=2**20, rich_help_panel=RUN)]
Seed = Annotated[int, typer.Option(help="Seed of what is sampled.", min=0, max=2**63 - 1, rich_help_panel=RUN)]
Repeats = Annotated[int, typer.Option(help="Timed repeats, all arms in turn.", min=1, max=1000, rich_help_panel=RUN)]
ShowDraft = Annotated[
    bool, typer.Option(help="Colour what was drafted, and what the target wrote itself.", rich_help_panel=RUN)
]

TreeBudget = Annotated[
    str | None,
    typer.Option(
        help="Nodes per target pass, 2 to 4096, or auto; the drafter's own by default.",
        callback=tree_budget,
        rich_help_panel=DRAFTING,
        metavar="INTEGER|auto",
    ),
]
TreeBudgets = Annotated[
    list[str] | None,
    typer.Option(
        "--tree-budget",
        help="Nodes per target pass, or auto; may be repeated. The drafter's own by default.",
        callback=tree_budgets,
        rich_help_panel=DRAFTING,
        metavar="INTEGER|auto",
    ),
]
Candidates = Annotated[
    int | None, typer.Option(help="Previous tokens per slot.", min=1, max=1024, rich_help_panel=DRAFTING)
]
Branching = Annotated[
    int | None, typer.Option(help="Next tokens per previous token.", min=1, max=1024, rich_help_panel=DRAFTING)
]
DraftTemperature = Annotated[
    float | None, typer.Option(help="Divides the draft's logits.", min=1e-3, max=1e3, rich_help_panel=DRAFTING)
]
DraftWindow = Annotated[
    int | None, typer.Option(help="Tokens the drafter looks back on.", min=1, max=2**31, rich_help_panel=DRAFTING)
]
Lookup = Annotated[
    int | None,
    typer.Option(help="Tokens to draft from earlier text, too.", min=1, max=256, rich_help_panel=DRAFTING),
]
Static = Annotated[
    bool, typer.Option(help="Whole rounds on the device, over static caches.", rich_help_panel=DRAFTING)
]

Temperature = Annotated[float, typer.Option(help="0 decodes greedily.", min=0.0, max=100.0, rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest tokens.", min=1, rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None, typer.Option(help="The likeliest tokens of this mass.", min=1e-6, max=1.0, rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float | None,
    typer.Option(help="Tokens this likely beside the best.", min=0.0, max=1.0, rich_help_panel=SAMPLING),
]
TypicalP = Annotated[
    float | None,
    typer.Option(help="The typical tokens of this mass.", min=1e-6, max=1.0, rich_help_panel=SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1: fewer repetitions.", min=0.01, max=100.0, rich_help_panel=SAMPLING),
]
NoRepeat = Annotated[
    int | None, typer.Option(help="No n-gram of this length twice.", min=1, max=1000, rich_help_panel=SAMPLING)
]


def sampling(temperature: float, **only_when_sampled: Any) -> dict[str, Any]:
    """Return the arguments of `generate` for a temperature, and for what cuts a distribution.

    Args:
        temperature (`float`):
            0: greedy decoding.
        only_when_sampled:
            `top_k`, `top_p` and their like; None: as the target's own generation config says.
    """
    given = {name: value for name, value in only_when_sampled.items() if value is not None}
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, **given}
    for name in given:
        raise ValueError(
            f"--{name.replace('_', '-')} changes nothing at temperature 0: give --temperature, such as 0.7."
        )
    return {"do_sample": False}


def samplings(temperatures: list[float], **only_when_sampled: Any) -> list[dict[str, Any]]:
    """Return the arguments of `generate` for each temperature; only sampled ones take what cuts a distribution."""
    if max(temperatures) == 0:
        return [sampling(0, **only_when_sampled)]
    return [sampling(value, **(only_when_sampled if value > 0 else {})) for value in temperatures]


def given(**settings: Any) -> dict[str, Any]:
    """Return what is not None."""
    return {name: value for name, value in settings.items() if value is not None}
