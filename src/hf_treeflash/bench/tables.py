"""A comparison as tables: for a terminal, for a Markdown page, for a spreadsheet."""

from typing import Any

from .measuring import columns


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
