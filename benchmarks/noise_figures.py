"""Lay out what knowing the draws brings: the README's tables and plot, from what other benchmarks wrote.

    python benchmarks/noise_figures.py --counts benchmarks/results/noise_golden_cpu.json
    python benchmarks/noise_figures.py --speeds noise.json --plot noise.png

Counts are of `noise.py`, speeds of `end_to_end.py --without-noise`.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

WITHOUT = ", without noise"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, help="JSON of noise.py")
    parser.add_argument("--speeds", type=Path, help="JSON of end_to_end.py --without-noise")
    parser.add_argument("--plot", type=Path, help="draw the speeds there; needs matplotlib")
    return parser.parse_args(argv)


def markdown(rows: list[list[str]]) -> str:
    """Lay cells out as a table of Markdown; the first row is the heading."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def count_table(rows: list[dict[str, Any]]) -> str:
    """Return τ of every setting by ranking and `draft_temperature`, seeds pooled; gains are over unknown draws."""
    pooled: dict[tuple, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in rows:
        key = tuple(row[name] for name in ("temperature", "top_k", "top_p", "tree_budget"))
        for place, value in enumerate((row["tokens"], row["passes"])):
            pooled[key][row["draws"], row["draft_temperature"]][place] += value
    ways = sorted({way for own in pooled.values() for way in own}, key=lambda way: (way[0] != "unknown", way))
    lines = [["temperature", "top-k", "top-p", "nodes", *(f"{draws}, {sharpness:g}" for draws, sharpness in ways)]]
    for key, own in sorted(pooled.items()):
        tau = {way: tokens / passes for way, (tokens, passes) in own.items()}
        before = next((tau[way] for way in ways if way[0] == "unknown" and way in tau), None)
        gains = {
            way: "" if before is None or way[0] == "unknown" else f" ({tau[way] / before - 1:+.0%})" for way in tau
        }
        cells = [f"{tau[way]:.2f}{gains[way]}" if way in tau else "" for way in ways]
        lines.append([*(f"{part:g}" for part in key), *cells])
    return markdown(lines)


def speeds_of(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return each arm at each temperature, by name and by how the table calls the column."""
    arms: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        temperature = result["settings"].get("temperature", 0) if result["settings"]["do_sample"] else 0
        for arm in result["arms"]:
            name = arm["name"].removesuffix(WITHOUT)
            column = f"temperature {temperature:g}" if temperature else "greedy"
            arms[name][column + (WITHOUT if name != arm["name"] else "")] = arm
    return arms


def speed_table(results: list[dict[str, Any]]) -> str:
    """Return speed-ups over plain decoding, least and greatest in brackets, and τ."""
    arms = speeds_of(results)
    columns = list(dict.fromkeys(column for arm in arms.values() for column in arm))

    def cell(arm: dict[str, Any] | None) -> str:
        if arm is None:
            return ""
        gain = arm["speedup"]
        return f"{gain['median']:.2f} ({gain['min']:.2f} to {gain['max']:.2f}), τ {arm['tau']:.2f}"

    shown = {name: arm for name, arm in arms.items() if name != "plain"}
    return markdown(
        [["", *columns], *([name, *(cell(arm.get(column)) for column in columns)] for name, arm in shown.items())]
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw each arm's speed-up at every temperature, without and with the draws known."""
    from matplotlib.figure import Figure

    arms = {name: arm for name, arm in speeds_of(results).items() if name != "plain"}
    columns = list(dict.fromkeys(column for arm in arms.values() for column in arm if not column.endswith(WITHOUT)))
    figure = Figure(figsize=(4 * len(columns), 3.2), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False, sharey=True)[0], columns, strict=True):
        for shift, key, label in ((-0.2, column + WITHOUT, "draws unknown"), (0.2, column, "draws known")):
            found = [(place, arm[key]["speedup"]) for place, arm in enumerate(arms.values()) if key in arm]
            if found:
                heights = [gain["median"] for _, gain in found]
                spread = [
                    [gain["median"] - gain["min"] for _, gain in found],
                    [gain["max"] - gain["median"] for _, gain in found],
                ]
                axes.bar([place + shift for place, _ in found], heights, 0.4, yerr=spread, label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=7)
        axes.set_title(column)
    axes.legend(fontsize=7)
    figure.supylabel("speed-up over plain decoding", fontsize=8)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.counts:
        print(count_table(json.loads(args.counts.read_text(encoding="utf-8"))["rows"]))
    if args.speeds:
        results = json.loads(args.speeds.read_text(encoding="utf-8"))["results"]
        print(speed_table(results))
        if args.plot:
            plot(results, args.plot)


if __name__ == "__main__":
    main()
