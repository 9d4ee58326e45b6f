"""What a call has a CUDA device do: every kernel, copy and fill with its time, as the profiler's trace lists them."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

ON_THE_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def device_events(call: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """Return name, begin and length, in microseconds, of what a call runs on the device, in order."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    found = [event for event in events if event.get("cat") in ON_THE_DEVICE]
    return sorted(((event["name"], event["ts"], event["dur"]) for event in found), key=lambda event: event[1])


def summarised(events: list[tuple[str, float, float]], longest: int = 15) -> dict[str, Any]:
    """Return how many events there are, the share of the time the device was busy, and what took longest."""
    if not events:
        return {"events": 0, "milliseconds": 0.0, "busy_share": None, "longest": []}
    begin, busy, reached = events[0][1], 0.0, events[0][1]
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, length in events:
        busy += max(0.0, start + length - max(reached, start))
        reached = max(reached, start + length)
        by_name[name].append(length)
    rows = sorted(by_name.items(), key=lambda row: -sum(row[1]))[:longest]
    return {
        "events": len(events),
        "milliseconds": (reached - begin) / 1e3,
        "busy_share": busy / (reached - begin),
        "longest": [{"name": name[:120], "count": len(own), "microseconds": sum(own)} for name, own in rows],
    }


def own_kernels(events: list[tuple[str, float, float]]) -> dict[str, int]:
    """Count the launches of this package's Triton kernels, whose names all read `_..._kernel`."""
    counts: dict[str, int] = defaultdict(int)
    for name, _, _ in events:
        if name.startswith("_") and name.endswith("_kernel"):
            counts[name] += 1
    return dict(counts)


__all__ = ["device_events", "own_kernels", "summarised"]
