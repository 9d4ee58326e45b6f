"""Pictures of what was measured; needs matplotlib (extra `plot`)."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.6  # inches of a panel
LABELS = {"tau": "tokens per target pass", "tokens_per_second": "tokens per second"}


def plot_budgets(results: list[dict[str, Any]], path: Path) -> None:
    """Draw block efficiency and speed over the nodes of a tree, a column per comparison.

    Args:
        results (`list[dict]`):
            From [`~hf_treeflash.bench.compare.compare`].
        path (`Path`):
            Where to write; the ending tells the format.
    """
    figure = Figure(figsize=(WIDTH * len(results), 6.4), layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False, sharex=True, sharey="row")
    for column, result in zip(panels.T, results, strict=True):
        for axes, figure_name in zip(column, LABELS, strict=True):
            _over_budgets(axes, result, figure_name)
        column[0].set_title(_short(result), fontsize=9)
        column[1].set_xlabel("nodes per tree")
    for axes, label in zip(panels[:, 0], LABELS.values(), strict=True):
        axes.set_ylabel(label)
    _shared_legend(figure, panels.flat)
    figure.suptitle(_machine(results[0]), fontsize=9)
    figure.savefig(path, dpi=130)


def _over_budgets(axes: Axes, result: dict[str, Any], figure_name: str) -> None:
    lines: dict[str, list[tuple[int, float, float, float]]] = defaultdict(list)
    across: list[tuple[str, float]] = []  # what has no size, or changes it
    for arm in result["arms"]:
        value = arm[figure_name]
        if value is None:
            continue
        low, middle, high = (value,) * 3 if figure_name == "tau" else (value["min"], value["median"], value["max"])
        budget = arm["knobs"].get("tree_budget")
        if isinstance(budget, int) and arm["method"] != arm["name"]:
            lines[arm["method"]].append((budget, low, middle, high))
        else:
            across.append((arm["method"] + (", auto" if budget == "auto" else ""), middle))
    for method, points in lines.items():
        budgets, low, middle, high = zip(*sorted(points), strict=True)
        axes.plot(budgets, middle, marker="o", markersize=4, color=_colour(method), label=method)
        axes.fill_between(budgets, low, high, color=_colour(method), alpha=0.15, linewidth=0)
    for label, value in across:
        style = "--" if label == "plain" else ":"
        axes.axhline(value, linestyle=style, linewidth=1.2, color=_colour(label.removesuffix(", auto")), label=label)
    sizes = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def plot_acceptance(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of passes that accept each depth, passes that accept nothing included; each method at its best.

    Args:
        results (`list[dict]`):
            From [`~hf_treeflash.bench.compare.compare`].
        path (`Path`):
            Where to write.
    """
    figure = Figure(figsize=(WIDTH * len(results), 3.9), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharex=True, sharey=True)[0]
    for axes, result in zip(panels, results, strict=True):
        for arm in _best_of_each(result["arms"]):
            rates = [1.0, *arm["acceptance_rates"]]
            passes = f" ({arm['passes']:,} passes)" if "passes" in arm else ""
            label = _plain_text(f"{arm['name']}{passes}")
            axes.plot(range(len(rates)), rates, marker="o", markersize=3, color=_colour(_method(arm)), label=label)
        axes.set_title(_short(result), fontsize=9)
        axes.set(xlabel="depth", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("share of target passes that accept it")
    figure.suptitle(_machine(results[0]), fontsize=9)
    figure.savefig(path, dpi=130)


def _best_of_each(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the fastest arm of each method that drafts, or the one of longest paths if none is timed."""
    best: dict[str, dict[str, Any]] = {}
    for arm in arms:
        before = best.get(_method(arm))
        if arm["acceptance_rates"] and (before is None or _worth(arm) > _worth(before)):
            best[_method(arm)] = arm
    return list(best.values())


def _method(arm: dict[str, Any]) -> str:
    return arm.get("method", arm["name"])  # evaluations of earlier versions name the arm alone


def _worth(arm: dict[str, Any]) -> float:
    return arm["speedup"]["median"] if arm["speedup"] else arm["tau"]


def plot_stages(stages: dict[str, dict[str, float]], path: Path, where: str = "") -> None:
    """Draw where the time of a round goes, a bar per arm.

    Args:
        stages (`dict[str, dict[str, float]]`):
            By the name of an arm, the milliseconds of each stage.
        path (`Path`):
            Where to write.
        where (`str`, *optional*):
            The machine, for the title.
    """
    names = sorted({name for of_arm in stages.values() for name in of_arm}, key=lambda name: -_greatest(stages, name))
    figure = Figure(figsize=(8.5, 1.6 + 0.55 * len(stages)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(stages)
    for number, name in enumerate(names):
        widths = [of_arm.get(name, 0.0) for of_arm in stages.values()]
        colour = f"C{number}" if number < 10 else "0.7"
        axes.barh(list(stages), widths, left=left, label=name, color=colour, alpha=0.9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a round")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(f"Where a round's time goes{where and f' ({where})'}", fontsize=9)
    figure.savefig(path, dpi=130)


def _greatest(stages: dict[str, dict[str, float]], name: str) -> float:
    return max(of_arm.get(name, 0.0) for of_arm in stages.values())


def _short(result: dict[str, Any]) -> str:
    """Return a panel's title: what was decoded, and how."""
    settings = result["settings"]
    way = f"temperature {settings.get('temperature', 1.0)}" if settings.get("do_sample") else "greedy"
    batch = "" if settings.get("batch_size", 1) == 1 else f", batch {settings['batch_size']}"
    return _plain_text(f"{result['task']}, {settings['prompts']} prompts, {way}{batch}")


def _machine(result: dict[str, Any]) -> str:
    where = result["environment"]
    threads = f"{where['threads']} threads" if "threads" in where else None
    return _plain_text(", ".join(str(part) for part in (where.get("device"), threads, where.get("dtype")) if part))


def _plain_text(text: str) -> str:
    """Keep a text from being read as a formula, or as several lines."""
    printable = "".join(sign if sign.isprintable() else " " for sign in text)
    return " ".join(printable.split()).replace("$", r"\$")


def _colour(method: str) -> str:
    """Return a colour that a method has in every panel and picture."""
    known = ["plain", "prompt lookup", "chain", "our chain", "marginal tree", "plain, compiled"]
    if method in known:
        return ["0.35", "C8", "C5", "C4", "C1", "0.6"][known.index(method)]
    return f"C{(0, 2, 3, 9, 6)[sum(map(ord, method)) % 5]}"


def _shared_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    handles, labels = list(entries.values()), list(entries)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


__all__ = ["plot_acceptance", "plot_budgets", "plot_stages"]
