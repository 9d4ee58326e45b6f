"""Time every kernel against its oracle and against what libraries offer, each call in a CUDA graph of its own.

    python benchmarks/kernel_times.py --json kernels.json
    python benchmarks/kernel_times.py --compare kernels.json
    python benchmarks/kernel_times.py --smoke --device cpu

A way of computing something is timed by the device's clock with its caches flushed; one that needs the host is timed
by the host's. Without a GPU, oracles and libraries are timed as they are. Differences are those to the oracle.
(Not called `kernels.py`, the name of a package that transformers looks for, first of all in a script's own folder.)
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernel_cases import FULL, SMOKE, Case, Way, all_cases

from hf_treeflash.bench.measuring import (
    columns,
    device_milliseconds,
    graphed,
    host_milliseconds,
    in_turn,
    machine,
    spread,
)


class Timer(NamedTuple):
    """How one way is timed, or why it cannot be."""

    run: Callable[[], float] | None
    difference: float | None = None
    failure: str | None = None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="beginnings of names, such as K1; all by default")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens before the tree")
    parser.add_argument("--budgets", type=int, nargs="+", help="nodes per tree")
    parser.add_argument("--without-flex", action="store_true", help="leave FlexAttention out, which compiles long")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--compare", type=Path, nargs="+", help="print what was measured before, and measure nothing")
    return parser.parse_args(argv)


def difference(result: Any, expected: Any) -> float | None:
    """Return the greatest difference of two results; None where they are not to be compared."""
    if result is None:
        return None
    pairs = zip(result, expected, strict=True) if isinstance(result, list) else [(result, expected)]
    # Infinities stand for unused places, which both must agree on.
    return max(float((a.double() - b.double()).nan_to_num(nan=0.0).abs().max()) for a, b in pairs)


def prepare(ways: dict[str, Way], device: torch.device) -> dict[str, Timer]:
    """Check each way against the oracle, the first of them, and capture it."""
    errors: dict[str, float | None] = {}
    timers: dict[str, Timer] = {}
    expected = None
    for name, way in ways.items():  # all of them before any runs twice: some work in place
        with failures_noted(timers, name):
            result = way.run()
            expected = result if expected is None else expected
            errors[name] = difference(result, expected)
    for name in errors:
        with failures_noted(timers, name):
            if device.type == "cuda" and ways[name].on_device:
                run = functools.partial(device_milliseconds, graphed(ways[name].run))
            else:
                run = functools.partial(host_milliseconds, ways[name].run, device)
            timers[name] = Timer(run, errors[name])
    return {name: timers[name] for name in ways}


@contextmanager
def failures_noted(timers: dict[str, Timer], name: str) -> Iterator[None]:
    """A library that cannot compute something must not cost the figures of the others."""
    try:
        yield
    except Exception as problem:
        reason = (str(problem) or "no reason given").splitlines()[0]
        timers[name] = Timer(None, failure=f"{type(problem).__name__}: {reason[:200]}")


def measure(cases: Iterable[Case], device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of one case after the other."""
    for case in cases:
        timers = prepare(case.ways, device)
        times = in_turn({name: timer.run for name, timer in timers.items() if timer.run is not None}, repeats)
        yield {
            "case": case.name,
            "shape": case.shape,
            "ways": [
                {
                    "name": name,
                    "clock": "device" if device.type == "cuda" and case.ways[name].on_device else "host",
                    "milliseconds": spread(times.get(name, [])),
                    "difference": timer.difference,
                    "failure": timer.failure,
                }
                for name, timer in timers.items()
            ],
        }


def table(result: dict[str, Any]) -> str:
    """Lay one case out: microseconds, and how much longer than the kernel (without one, than the oracle) it takes."""
    shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
    measured = [way for way in result["ways"] if way["milliseconds"]]
    kernels = [way for way in measured if way["name"].startswith("kernel")]
    best = min(way["milliseconds"]["median"] for way in kernels or measured[:1])
    rows = [(f"{result['case']}: {shape}", "us (least to greatest)", "x kernel" if kernels else "x oracle", "differs")]
    for way in result["ways"]:
        if way["failure"]:
            rows.append((f"{way['name']}: {way['failure'][:60]}", "failed", "", ""))
            continue
        time, error = way["milliseconds"], way["difference"]
        figures = [f"{1e3 * time[part]:.1f}" for part in ("median", "min", "max")]
        rows.append(
            (
                way["name"] + (" (host's clock)" if way["clock"] == "host" else ""),
                f"{figures[0]} ({figures[1]} to {figures[2]})",
                f"{time['median'] / best:.2f}",
                "" if error is None else f"{error:.1e}",
            )
        )
    return columns(rows)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.compare:
        for path in args.compare:
            record = json.loads(path.read_text(encoding="utf-8"))
            print(f"{path.name}: {record['environment']}\n")
            print("\n\n".join(map(table, record["results"])))
        return
    device = torch.device(args.device)
    sizes = SMOKE if args.smoke else FULL
    sizes = sizes._replace(contexts=args.contexts or sizes.contexts, budgets=args.budgets or sizes.budgets)
    torch.manual_seed(args.seed)
    record = {
        "environment": machine(device),
        "settings": {"seed": args.seed, "repeats": args.repeats, "sizes": sizes._asdict()},
        "results": [],
    }
    with torch.no_grad():
        for result in measure(all_cases(sizes, device, args.cases, not args.without_flex), device, args.repeats):
            record["results"].append(result)
            print(table(result), end="\n\n", flush=True)
            if args.json:  # after every case: a long run that is stopped keeps what it has
                args.json.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
