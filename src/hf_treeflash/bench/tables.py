"""A comparison as tables: for a terminal, for a Markdown page, for a spreadsheet."""

from typing import Any

from .measuring import columns

WORTH_DRAFTING = 1.2  # tokens per pass that a drafter of another target hardly reaches


def table_rows(result: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Lay a comparison out as text cells: a heading, then one row per arm."""
    rows = [("", "tokens per pass", "tokens/s", "speed-up (least to greatest)", "identical")]
    for arm in result["arms"]:
        speed, gain = arm["tokens_per_second"], arm["speedup"]
        rows.append(
            (
                arm["name"],
                "n/a" if arm["tau"] is None else f"{arm['tau']:.2f}",
                "n/a" if speed is None else f"{speed['median']:.0f}",
                "n/a" if gain is None else f"{gain['median']:.2f} ({gain['min']:.2f} to {gain['max']:.2f})",
                "yes" if arm["identical"] else "no" if arm.get("promises_text", True) else "other draws",
            )
        )
    return rows


def text_table(result: dict[str, Any]) -> str:
    """Lay a comparison out for a terminal."""
    lines = [columns(table_rows(result))]
    if result["arms"][0]["distinct_4grams"] is not None:  # repetition flatters every drafter
        lines.append(f"distinct 4-grams of the plain text: {result['arms'][0]['distinct_4grams']:.2f}")
    return "\n".join(lines)


def markdown_table(result: dict[str, Any]) -> str:
    """Lay a comparison out for a Markdown page."""
    heading, *rows = table_rows(result)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(result: dict[str, Any]) -> str:
    """Say in a line under what conditions a comparison was made."""
    settings, where = result["settings"], result["environment"]
    names = ("temperature", "top_k", "top_p", "min_p")
    sampling = [f"{name.replace('_', '-')} {settings[name]}" for name in names if settings.get(name) is not None]
    return ", ".join(
        [
            f"{result['task']}: {settings['prompts']} prompts, up to {settings['max_new_tokens']} new tokens each",
            " ".join(sampling) if settings.get("do_sample") else "greedy",
            f"batch {settings.get('batch_size', 1)}",
            f"{where['device']}, {where['threads']} threads, {where['dtype']}",
            f"medians of {settings['repeats']} interleaved repeats" if settings["repeats"] else "not timed",
        ]
    )


def csv_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per arm of every comparison, numbers as they are.

    Args:
        results (`list[dict]`):
            From [`~hf_treeflash.bench.compare.compare`].
    """
    rows = []
    for result in results:
        settings = result["settings"]
        for arm in result["arms"]:
            row = {"task": result["task"], "arm": arm["name"]}
            row["temperature"] = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
            row["batch_size"] = settings.get("batch_size", 1)
            row |= {name: arm["knobs"].get(name) for name in ("tree_budget", "num_candidates")}
            row |= {name: arm[name] for name in ("tau", "identical", "tokens", "passes")}
            for name in ("tokens_per_second", "speedup"):
                row |= {f"{name}_{part}": arm[name] and arm[name][part] for part in ("median", "min", "max")}
            rows.append(row)
    return rows


def remarks(result: dict[str, Any]) -> list[str]:
    """Return what a reader of the table ought to know: arms that were not exact, and drafters that do not fit."""
    said = []
    for arm in result["arms"]:
        if arm["promises_text"] and not arm["identical"]:
            first = arm["differences"][0]
            gap = "" if first["gap"] is None else f", where the target's logits are {first['gap']:.3g} apart"
            said.append(
                f"{arm['name']}: {len(arm['differences'])} of {result['settings']['prompts']} texts are not plain "
                f"decoding's. The first differs at token {first['token']}{gap}."
            )
    drafted = [arm["tau"] for arm in result["arms"] if arm["knobs"] and arm["tau"] is not None]
    if drafted and max(drafted) < WORTH_DRAFTING:
        said.append(
            f"No tree reaches {WORTH_DRAFTING} tokens per pass: the drafter does not fit this target, its chat "
            "template or its thinking mode. `hf-treeflash check` looks for the reason."
        )
    return said


__all__ = ["conditions", "csv_rows", "markdown_table", "remarks", "table_rows", "text_table"]
