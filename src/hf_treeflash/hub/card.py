"""Model cards: metadata for the Hub, and text whose numbers all come from an evaluation's JSON."""

import html
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from ..bench.tables import table_rows
from ..knobs import DraftingKnobs

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")
HEAD_NAMES = {
    None: "none",
    "swiglu": "AR approximation (SwiGLU)",
    "markov": "DSpark's Markov head",
    "selector": "DFlash-2's selector",
}
TAGS = ["speculative-decoding", "draft-model", "dflash", "custom_code", "arxiv:2602.06036"]


def render_card(
    drafter, *, name: str, target_id: str, evaluation=None, license=None, datasets=None, command=None, **fields
) -> ModelCard:
    """Render the card of an exported drafter; see [`export_drafter`] for the fields."""
    results = evaluation["results"] if evaluation else []
    fence = "```"
    while command is not None and fence in command:
        fence += "`"
    data = ModelCardData(
        model_name=one_line(name),
        base_model=one_line(target_id),
        library_name="transformers",
        pipeline_tag="text-generation",
        license=one_line(license),
        datasets=one_line(datasets),
        tags=["treeflash", "arxiv:2606.03819", *TAGS] if drafter.config.ar_head == "swiglu" else TAGS,
        eval_results=[found for found in map(_eval_result, one_line(results)) if found] or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=escaped(name),
        target_id=escaped(target_id),
        target_url=f"https://huggingface.co/{quote(target_id)}",
        config=drafter.config,
        heads=HEAD_NAMES,
        parameters=drafter.num_parameters(),
        knobs=DraftingKnobs.read(drafter.generation_config),
        evaluation=escaped(evaluation),
        license=escaped(license),
        datasets=escaped(datasets),
        command=command,
        fence=fence,
        table_rows=table_rows,
        sampling=describe_sampling,
        **{key: escaped(value) for key, value in fields.items()},
    )


def one_line(value: Any) -> Any:
    """Put a text on one line, without what cannot be printed; in plain data every text."""
    if isinstance(value, dict):
        return {one_line(key): one_line(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [one_line(entry) for entry in value]
    if not isinstance(value, str):
        return value
    return " ".join("".join(sign if sign.isprintable() else " " for sign in value).split())


def escaped(value: Any) -> Any:
    """Make a text, or every text in plain data, safe in a card: it brings no line, tag, link, cell or code along."""
    if isinstance(value, dict):
        return {escaped(key): escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [escaped(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = html.escape(one_line(value))
    return "".join(f"&#{ord(sign)};" if sign in "`|[]" else sign for sign in text)


def describe_sampling(settings: dict[str, Any]) -> str:
    """Name the decoding of a comparison: greedy, or sampling with its parameters."""
    if not settings.get("do_sample"):
        return "greedy"
    names = ("temperature", "top_k", "top_p", "min_p")
    return ", ".join(["sampled", *(f"{name} {settings[name]}" for name in names if settings.get(name) is not None)])


def _eval_result(result: dict[str, Any]) -> EvalResult | None:
    trees = [arm for arm in result["arms"] if arm["knobs"] and arm["tau"] is not None]
    if not trees:
        return None
    best = max(trees, key=lambda arm: arm["speedup"]["median"] if arm["speedup"] else arm["tau"])
    return EvalResult(
        task_type="text-generation",
        dataset_type=result["task"],
        dataset_name=result["task"],
        metric_type="block_efficiency",
        metric_name=f"tokens per target pass, {best['name']}, {describe_sampling(result['settings'])}",
        metric_value=round(best["tau"], 3),
    )


def render_speculators_card(config, *, name: str, target_id: str) -> str:
    """Render the card of a backbone in the form of vLLM's speculators."""
    data = ModelCardData(
        base_model=one_line(target_id),
        library_name="speculators",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", "dflash", "vllm", "arxiv:2602.06036"],
    )
    dropped = "Its head was **dropped**: serving engines do not know it in this form. " if config.ar_head else ""
    return (
        f"---\n{data}\n---\n\n# {escaped(name)}\n\n"
        f"The DFlash backbone of a drafter for `{escaped(target_id)}`, in the form of vLLM's speculators, "
        f"to be served as a chain of up to {config.num_drafted} tokens. {dropped}Trees need hf-treeflash and the "
        "drafter this was made from.\n\nThe form follows the speculators config and reads back into hf-treeflash bit "
        "for bit; it was not run in vLLM.\n"
    )


def plot_acceptance(results: list[dict[str, Any]], path: Path) -> str | None:
    """Draw the per-depth acceptance of each method that drafts; needs matplotlib (extra `plot`)."""
    try:
        from ..bench.plots import plot_acceptance as draw
    except ImportError:
        logger.warning("The card has no acceptance plot: install matplotlib (`pip install 'hf-treeflash[plot]'`).")
        return None
    draw(results, path)
    return path.name
