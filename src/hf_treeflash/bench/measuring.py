"""What all measurements share: where they ran, their spread, time by stage, and calls timed in turn."""

import functools
import importlib.metadata
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers

# Written between two timed calls, so that none finds in the device's cache what the one before it left there.
FLUSH_BYTES = 256 * 2**20


def machine(device: torch.device | str) -> dict[str, Any]:
    """Describe where a measurement is made: versions and hardware."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf-treeflash": _version("hf-treeflash") or "source tree",
        "triton": _version("triton"),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Return median, extremes and all values; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up the own time of nested stages, round by round, in milliseconds.

    The device is waited for at every boundary, so stages do not overlap, and together take longer than a round that
    nobody watches.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rounds: list[dict[str, float]] = []
        self.current: dict[str, float] = defaultdict(float)  # the round that is running, or a prompt's pass
        self.running: list[list[float]] = []  # of each open stage: the time inside the stages it called

    def new_round(self) -> None:
        """Begin a round."""
        self.current = defaultdict(float)
        self.rounds.append(self.current)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of what is running."""
        start = self._now()
        self.running.append([0.0])
        try:
            yield
        finally:
            total = self._now() - start
            own = total - self.running.pop()[0]
            if self.running:
                self.running[-1][0] += total
            self.current[name] += own

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter() * 1e3

    def around(self, function: Callable, name: str) -> Callable:
        """Return a function that runs another as a stage."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """Capture a call in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles outside the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def device_milliseconds(call: Callable[[], Any]) -> float:
    """Time what a call has the device do, by the device's clock; the host must be done before the device is."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()  # also keeps the device busy until the host has launched the call
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def host_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time a call by the host's clock, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def in_turn(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every timer once per repeat, each time beginning with another: a slow moment meets all of them alike."""
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for turn in range(len(names)):
            name = names[(turn + repeat) % len(names)]
            times[name].append(timers[name]())
    return times


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay text cells out for a terminal: the first row is the heading, the first column the names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
