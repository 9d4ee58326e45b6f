"""What the steps of `gpu_session.py` measured, as rows of one table: figure, floor, ratio, expected, verdict.

Nothing here imports torch, which would take the driver seconds.
"""

import xml.etree.ElementTree
from collections.abc import Iterator
from typing import Any, NamedTuple

# Milliseconds per round at a context of 2048 tokens and 64 nodes, as they were estimated before any run: by card and
# preset, for every arm from the least to the greatest.
EAGER = {"vanilla": (16, 22), "eager": (24, 32), "reference": (24, 32), "static": (19, 26)}
EXPECTED = {
    ("H100", "qwen3-4b"): EAGER | {"graphed": (4.9, 5.4), "graphed vanilla": (3.5, 3.9)},
    ("H100", "qwen3-8b"): EAGER | {"graphed": (8.2, 8.8), "graphed vanilla": (6.0, 6.6)},
    ("H200", "qwen3-4b"): EAGER | {"graphed": (3.7, 4.2), "graphed vanilla": (2.7, 3.0)},
    ("H200", "qwen3-8b"): EAGER | {"graphed": (5.9, 6.5), "graphed vanilla": (4.3, 4.8)},
}
# What a round may cost: times its floor and times a plain step, both graphed, and times a plain step, both eager.
GRAPHED_TO_FLOOR, GRAPHED_TO_PLAIN, EAGER_TO_PLAIN = 1.5, 1.5, 1.25
SELECT_MILLISECONDS, SMALL_KERNELS_MILLISECONDS = 0.06, 0.15


class Row(NamedTuple):
    """One figure.

    Attributes:
        name (`str`), value (`Any`), unit (`str`):
            What was found.
        floor (`float`, *optional*):
            The least that the bytes allow, in the same unit.
        expected (`str`):
            What was estimated or is asked for.
        good (`bool`, *optional*):
            Whether it is as it must be, if anything is asked.
    """

    name: str
    value: Any
    unit: str = ""
    floor: float | None = None
    expected: str = ""
    good: bool | None = None

    @property
    def cells(self) -> list[str]:
        """The row as text."""
        number = isinstance(self.value, float)
        return [
            self.name[:70],
            f"{f'{self.value:.3f}' if number else str(self.value)[:90]} {self.unit}".strip(),
            "" if self.floor is None else f"{self.floor:.3f}",
            "" if self.floor is None or not number else f"{self.value / self.floor:.2f}",
            self.expected,
            "" if self.good is None else "ok" if self.good else "FAILED",
        ]


def table(rows: list[Row]) -> str:
    """Lay rows out for a terminal."""
    cells = [["", "figure", "floor", "ratio", "expected", "verdict"], *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def found_rows(record: dict[str, Any], roofs: dict[str, float]) -> list[Row]:
    """Return the figures of a step of `gpu_steps.py`."""
    return [Row(figure["name"], figure["value"], figure["unit"], good=figure["good"]) for figure in record["figures"]]


def test_rows(text: str) -> list[Row]:
    """Return what a JUnit report says: how many tests ran, and which failed."""
    suite = xml.etree.ElementTree.fromstring(text).find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    rows = [Row("tests", ", ".join(f"{count} {name}" for name, count in counts.items()), good=failed == 0)]
    for case in suite.iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            message = " ".join((problem.get("message") or "").split())
            rows.append(Row(f"{case.get('classname')}::{case.get('name')}"[-70:], message, good=False))
    return rows


def compile_rows(record: dict[str, Any], roofs: dict[str, float]) -> list[Row]:
    """Return how long arms took to compile, where times mean nothing as other steps ran beside them."""
    preset, rows = record["settings"]["preset"], []
    for result in record["results"]:
        for arm in result["arms"]:
            name = f"{preset} {arm['name']}: compiled and warm"
            if "failure" in arm:
                rows.append(Row(name, arm["failure"], good=False))
            else:
                rows.append(Row(name, arm["warm_up_seconds"], "s", good="fell_back" not in arm or None))
                rows += [Row(name, arm["fell_back"], good=False)] if "fell_back" in arm else []
    return rows


def round_rows(record: dict[str, Any], roofs: dict[str, float]) -> list[Row]:
    """Return the rounds of every arm against their floors, and against plain steps in the same mode."""
    rows: list[Row] = []
    for result in record["results"]:
        rows += _rounds(record, result, roofs)
        for name, profile in result.get("profiles", {}).items():
            busy = profile["busy_share"]
            label = f"{record['settings']['preset']} B{result['budget']} {name}"
            rows.append(Row(f"{label}: kernels, copies and fills", profile["events"]))
            rows.append(Row(f"{label}: share of the time the device is busy", busy))
            rows.append(Row(f"{label}: own kernels", str(profile["own_kernels"])))
            for kernel in profile["longest"]:
                rows.append(Row(f"  {kernel['count']} x {kernel['name']}", kernel["microseconds"] / 1e3, "ms"))
    return rows


def _rounds(record: dict[str, Any], result: dict[str, Any], roofs: dict[str, float]) -> Iterator[Row]:
    preset, budget = record["settings"]["preset"], result["budget"]
    card = "H200" if "H200" in record["environment"]["device"] else "H100"
    expected = EXPECTED.get((card, preset), {}) if (result["context"], budget) == (2048, 64) else {}
    medians = {}
    for arm in result["arms"]:
        name, label = arm["name"], f"{preset} B{budget} {arm['name']}"
        if "failure" in arm:
            yield Row(label, arm["failure"], good=False)
            continue
        if "fell_back" in arm:
            yield Row(label, arm["fell_back"], good=False)
        medians[name] = time = arm["round_milliseconds"]["median"]
        kind = "plain" if "vanilla" in name else "round"
        floor = result["bytes"][kind] / roofs["copy"] / 1e6 if "copy" in roofs else None
        good = time <= GRAPHED_TO_FLOOR * floor if name == "graphed" and floor else None
        low, high = expected.get(name, (None, None))
        yield Row(label, time, "ms", floor, "" if low is None else f"{low}-{high}", good)
    for own, plain, most in (
        ("graphed", "graphed vanilla", GRAPHED_TO_PLAIN),
        ("eager", "vanilla", EAGER_TO_PLAIN),
    ):
        if own in medians and plain in medians:
            ratio = medians[own] / medians[plain]
            yield Row(f"{preset} B{budget} {own} / {plain}", ratio, "", None, f"at most {most}", ratio <= most)


def kernel_rows(record: dict[str, Any], roofs: dict[str, float]) -> list[Row]:
    """Return each kernel's time as a call would run it, its floor, and the best of the libraries."""
    rows, small = [], {}
    sizes = record["settings"]["sizes"]
    for result in record["results"]:
        ways = {way["name"]: way for way in result["ways"]}
        label = f"{result['case']} {tuple(result['shape'].values())}"
        rows += [Row(f"{label} {name}", way["failure"], good=False) for name, way in ways.items() if way["failure"]]
        medians = {name: way["milliseconds"]["median"] for name, way in ways.items() if way["milliseconds"]}
        kernels = {name: time for name, time in medians.items() if name.startswith("kernel")}
        others = {name: time for name, time in medians.items() if not name.startswith(("kernel", "oracle"))}
        chosen = next((name for name in kernels if name.endswith("default")), next(iter(kernels), None))
        if chosen is not None:
            time = kernels[chosen]
            floor = least_kernel_bytes(result, sizes) / roofs["copy"] / 1e6 if "copy" in roofs else None
            most = SELECT_MILLISECONDS if result["case"] == "K2 head selection" else None
            wanted = "" if most is None else f"at most {most}"
            rows.append(Row(f"{label} {chosen}", time, "ms", floor or None, wanted, most and time <= most))
            fastest = min(kernels, key=kernels.__getitem__)
            if fastest != chosen:
                rows.append(Row(f"{label} fastest: {fastest}", kernels[fastest], "ms"))
            if result["case"][:2] in ("K3", "K4", "K5") and result["shape"].get("nodes", 64) == 64:
                small[result["case"]] = time
        if others:
            best = min(others, key=others.__getitem__)
            rows.append(Row(f"{label} {best}", others[best], "ms"))
    if len(small) == 3:
        total, most = sum(small.values()), SMALL_KERNELS_MILLISECONDS
        rows.append(Row("build + accept + compaction, 64 nodes", total, "ms", None, f"at most {most}", total <= most))
    return rows


def least_kernel_bytes(result: dict[str, Any], sizes: dict[str, Any]) -> int:
    """Return the bytes a kernel must move; 0 where so few that they say nothing."""
    shape = result["shape"]
    if result["case"].startswith("K1"):
        slots = shape["context"] + shape["nodes"]
        return 2 * (2 * sizes["kv_heads"] * slots + 2 * sizes["heads"] * shape["nodes"]) * sizes["head_dim"]
    if result["case"] == "K2 head selection":
        return 2 * shape["rows"] * shape["vocabulary"]
    if result["case"].startswith("K5"):
        return 2 * 2 * shape["tensors"] * sizes["kv_heads"] * shape["path"] * sizes["head_dim"]
    return 0


def text_rows(record: dict[str, Any], roofs: dict[str, float]) -> list[Row]:
    """Return how fast texts came, and tokens per pass."""
    rows = []
    for arm in (arm for result in record["results"] for arm in result["arms"]):
        tau, gain = arm["tau"], arm["speedup"]
        told = f"tau {tau:.2f}, x {gain['median']:.2f}, {'same' if arm['identical'] else 'other'} text"
        rows.append(Row(f"end to end, {arm['name']}", arm["tokens_per_second"]["median"], "tokens/s", None, told))
    return rows


__all__ = ["Row", "compile_rows", "found_rows", "kernel_rows", "round_rows", "table", "test_rows", "text_rows"]
