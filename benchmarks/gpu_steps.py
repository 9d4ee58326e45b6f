"""The steps of `gpu_session.py` that no other benchmark takes: each prints what it finds and writes it as JSON.

    python benchmarks/gpu_steps.py env --json env.json
    python benchmarks/gpu_steps.py smoke --device cpu

A step that finds a difference ends with code 1, after all else that it looks at.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_treeflash.bench.measuring import host_milliseconds, machine

TINY = Path(__file__).parents[1] / "src" / "hf_treeflash" / "tiny"
REPLAYS = 20


class Findings:
    """What a step has found so far, written after every finding: a step that is stopped keeps what it has."""

    def __init__(self, path: Path | None):
        self.path, self.figures = path, []

    def add(self, name: str, value: Any, unit: str = "", good: bool | None = None, **more) -> None:
        """Note a figure; `good` says whether it is as it must be."""
        self.figures.append({"name": name, "value": value, "unit": unit, "good": good, **more})
        print(f"{name}: {value} {unit} {'' if good is None else 'ok' if good else 'FAILED'}", flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps({"figures": self.figures}, indent=2, default=str), encoding="utf-8")

    @contextmanager
    def failures(self, name: str) -> Iterator[None]:
        """Note an exception under a name, and go on."""
        try:
            yield
        except Exception as problem:
            reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
            self.add(name, reason, good=False)


def env(found: Findings, device: torch.device) -> None:
    """Versions, and the two roofs: bytes copied and bf16 products per second."""
    for name, value in {**machine(device), "cuda": torch.version.cuda, "cpus": os.cpu_count()}.items():
        found.add(name, value)
    on_cuda = device.type == "cuda"
    found.add("cudnn", torch.backends.cudnn.version())
    found.add("SDPA by cuDNN first", os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1")
    if on_cuda:
        properties = torch.cuda.get_device_properties(device)
        found.add("multiprocessors", properties.multi_processor_count)
        found.add("device memory", round(properties.total_memory / 2**30, 1), "GiB")
    elements, size = (2**30, 8192) if on_cuda else (2**20, 256)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    milliseconds = median_milliseconds(lambda: target.copy_(source), device)
    found.add("copy", 2 * source.nbytes / milliseconds / 1e6, "GB/s")
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    milliseconds = median_milliseconds(lambda: a @ b, device)
    found.add("bf16 product", 2 * size**3 / milliseconds / 1e9, "TFLOP/s")


def median_milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    for _ in range(3):
        call()
    return statistics.median(host_milliseconds(call, device) for _ in range(repeats))


class Pair:
    """The embedded pair in float32 without TF32, and prompts for one row and, padded on the left, for three."""

    def __init__(self, device: torch.device):
        from transformers.utils import logging

        from hf_treeflash.bench.pairs import load_pair, with_knobs

        logging.disable_progress_bar()
        torch.set_float32_matmul_precision("highest")
        assert not torch.backends.cuda.matmul.allow_tf32
        self.target, tokenizer, drafter = load_pair(
            str(TINY / "target"), str(TINY / "drafter"), device=device.type, dtype="float32"
        )
        self.drafter = with_knobs(drafter, tree_budget=64)
        texts = [entry["prompt"] for entry in json.loads((TINY / "prompts.json").read_text(encoding="utf-8"))[:3]]
        tokenizer.padding_side = "left"
        self.inputs = {
            rows: {
                name: tokenizer(texts[:rows], return_tensors="pt", padding=True)[name].to(device)
                for name in ("input_ids", "attention_mask")
            }
            for rows in (1, 3)
        }
        self.tokens = 64 if device.type == "cuda" else 6  # elsewhere only to see that everything runs
        self._plain: dict[tuple, torch.Tensor] = {}

    def generate(self, rows: int, sampled: bool, assisted: bool, tokens: int | None = None, **options):
        torch.manual_seed(7)
        return self.target.generate(
            **self.inputs[rows],
            **({"assistant_model": self.drafter, **options} if assisted else {}),
            **({"do_sample": True, "top_k": 20} if sampled else {"do_sample": False}),
            max_new_tokens=tokens or self.tokens,
            return_dict_in_generate=True,
        )

    def plain(self, rows: int, sampled: bool) -> torch.Tensor:
        """Return the text of plain decoding, decoded once."""
        if (rows, sampled) not in self._plain:
            self._plain[rows, sampled] = self.generate(rows, sampled, assisted=False).sequences
        return self._plain[rows, sampled]

    def compare(self, found: Findings, name: str, rows: int, sampled: bool, **options) -> None:
        """Compare a way to decode with plain decoding; in a batch samples are of the distribution, not the seed."""
        name = f"{name}, batch {rows}, {'seeded' if sampled else 'greedy'}"
        with found.failures(name):
            start = time.perf_counter()
            output = self.generate(rows, sampled, assisted=True, **options)
            seconds = time.perf_counter() - start
            lengths = [length for row in output.acceptance_lengths for length in row]
            more = {"tau": sum(lengths) / len(lengths), "seconds": round(seconds, 2)}
            if rows > 1 and sampled:
                found.add(name, f"{output.sequences.shape[1]} columns, nothing to compare with", **more)
                return
            said = self.first_difference(output.sequences, self.plain(rows, sampled))
            found.add(f"{name} (tau {more['tau']:.2f}, {seconds:.1f} s)", said or "equal", good=said is None, **more)

    @torch.no_grad()
    def first_difference(self, ids: torch.Tensor, expected: torch.Tensor) -> str | None:
        """Say where two texts differ first, and by how little plain decoding chose its token; None if nowhere."""
        width = min(ids.shape[1], expected.shape[1])
        different = (ids[:, :width] != expected[:, :width]).nonzero()
        if not different.numel():
            return None if ids.shape == expected.shape else f"lengths {ids.shape[1]} and {expected.shape[1]}"
        row, column = min(different.tolist(), key=lambda place: place[1])
        prompt = self.inputs[ids.shape[0]]
        mask = torch.cat([prompt["attention_mask"], torch.ones_like(expected[:, prompt["input_ids"].shape[1] :])], 1)
        begin = int(mask[row].argmax())
        logits = self.target(expected[row : row + 1, begin:column]).logits[0, -1]
        own, other = int(ids[row, column]), int(expected[row, column])
        gap = float(logits[other] - logits[own])
        return f"row {row}, column {column}: {own}, not {other}, whose logit is {gap:.2e} greater"


def kernels_run(found: Findings, name: str, call: Callable[[], Any], device: torch.device, wanted: tuple = ()) -> None:
    """Note which of our kernels a call launches."""
    if device.type != "cuda":
        found.add(f"kernels, {name}", "no CUDA device")
        return
    from device_profile import device_events, own_kernels

    with found.failures(f"kernels, {name}"):
        events = device_events(call)
        counts = own_kernels(events)
        good = all(kernel in counts for kernel in wanted) if events and wanted else None
        found.add(f"kernels, {name}", f"{len(events)} events; {counts}", good=good, own_kernels=counts)


def smoke(found: Findings, device: torch.device) -> None:
    """Plain, dynamic and static decoding of the embedded pair in float32, without compilation."""
    pair = Pair(device)
    uncompiled = {"cache_implementation": "static", "disable_compile": True}
    for rows, sampled in ((1, False), (1, True), (3, False), (3, True)):
        pair.compare(found, "dynamic", rows, sampled)
        pair.compare(found, "static uncompiled", rows, sampled, **uncompiled)
    kernels_run(found, "dynamic", lambda: pair.generate(1, False, True, tokens=8), device)
    wanted = ("_tree_attention_kernel", "_build_tree_kernel", "_accept_kernel", "_compact_kernel")
    kernels_run(found, "static", lambda: pair.generate(1, False, True, tokens=8, **uncompiled), device, wanted)


def graphs(found: Findings, device: torch.device) -> None:
    """The same texts compiled and recorded as CUDA graphs; then replayed rounds against launched ones."""
    from hf_treeflash import TreeFlashCandidateGenerator
    from hf_treeflash.memory import recall

    pair = Pair(device)
    options: dict[str, Any] = {"cache_implementation": "static"}
    if device.type != "cuda":  # elsewhere models are compiled on request, and nothing is recorded
        from transformers import CompileConfig

        options["compile_config"] = CompileConfig(backend="eager")
    # Code that comes out of a cache is not looked through.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        cache_buffers_counted() as sizes,
        captures_timed() as times,
    ):
        pair.compare(found, "graphs", 1, False, **options)
        with found.failures("graphs and kernels"):
            launcher = list(recall("sessions", pair.drafter, pair.target).values())[-1]
            note_session(found, launcher, sizes, times, device)
        with found.failures(f"{REPLAYS} replays equal launches"):
            if launcher.graphs:
                embeddings = pair.target.get_input_embeddings(), pair.target.get_output_embeddings()
                generator = TreeFlashCandidateGenerator(pair.drafter, *embeddings)
                launcher.round.hold(pair.target, generator)
                found.add(f"{REPLAYS} replays equal launches", *replays_equal_launches(launcher))
                launcher.let_go()
        pair.compare(found, "graphs again", 1, False, **options)
        pair.compare(found, "graphs", 1, True, **options)
        pair.compare(found, "graphs", 3, False, **options)


def note_session(found: Findings, launcher, sizes: list[tuple], times: list[float], device: torch.device) -> None:
    """Note how the first call was compiled and recorded."""
    on_cuda, round = device.type == "cuda", launcher.round
    found.add("fell back", launcher.failure, good=launcher.failure is None)
    found.add("graphs recorded", len(launcher.graphs or ()), good=bool(launcher.graphs) or not on_cuda)
    found.add("tree attention by its kernel", round.by_kernel, good=round.by_kernel or not on_cuda)
    spent = torch._dynamo.utils.compile_times(repr="csv", aggregate=True)
    seconds = {name: float(value) for name, value in zip(*spent, strict=True)}
    inductor = seconds.get("OutputGraph.call_user_compiler", 0.0)
    found.add("dynamo", round_to(seconds.get("_compile.compile_inner", 0.0) - inductor), "s")
    found.add("inductor", round_to(inductor), "s")
    found.add("capture", round_to(sum(times)), "s", each=times)
    shapes = {tuple(layer.keys.shape) for cache in (round.target_cache, round.drafter_cache) for layer in cache.layers}
    layers = len(round.target_cache.layers) + len(round.drafter_cache.layers)
    count = sum(size in shapes for size in sizes)
    found.add("cache-size buffers", count, good=count <= 2 * layers if on_cuda else None, written_in_place=2 * layers)
    for span, graph in (launcher.graphs or {}).items():
        wanted = ("_tree_attention_kernel", "_build_tree_kernel", "_accept_kernel", "_compact_kernel")
        kernels_run(found, f"replay of {span}", graph.replay, device, wanted)


def round_to(seconds: float) -> float:
    return float(f"{seconds:.2f}")


@torch.no_grad()
def replays_equal_launches(launcher) -> tuple[str, str, bool]:
    """Run rounds from one state, replayed and launched, and compare what each of them emits."""
    round, span = launcher.round, max(launcher.graphs)
    round.limits.fill_(10**6)
    round.active.fill_(True)
    caches = [
        states
        for cache in (round.target_cache, round.drafter_cache)
        for layer in cache.layers
        for states in (layer.keys, layer.values)
    ]
    state = [*round.state, *caches]
    before = [tensor.clone() for tensor in state]
    emitted: dict[str, list[torch.Tensor]] = {}
    for way, step in {"replayed": launcher.graphs[span].replay, "launched": lambda: round.run(span)}.items():
        for tensor, earlier in zip(state, before, strict=True):
            tensor.copy_(earlier)
        round.lengths.fill_(40)
        emitted[way] = []
        for _ in range(REPLAYS):
            if int(round.lengths.max()) + round.tail >= span:  # begin again before the end
                round.lengths.fill_(40)
            step()
            emitted[way].append(round.emitted.clone())
    equal = [bool(torch.equal(*pair)) for pair in zip(*emitted.values(), strict=True)]
    if all(equal):
        return "equal", "", True
    return f"round {equal.index(False)} differs", "", False


@contextmanager
def cache_buffers_counted() -> Iterator[list[tuple]]:
    """Collect the size of every buffer in the graphs that inductor compiles."""
    from torch._inductor.graph import GraphLowering

    sizes: list[tuple] = []
    codegen = GraphLowering.codegen

    def noted(graph, *args, **kwargs):
        result = codegen(graph, *args, **kwargs)
        for buffer in graph.buffers:
            if buffer.get_name() not in graph.removed_buffers:
                try:
                    sizes.append(tuple(int(size) for size in buffer.get_size()))
                except Exception:
                    continue  # no tensor, or a size that is no number
        return result

    with mock.patch.object(GraphLowering, "codegen", noted):
        yield sizes


@contextmanager
def captures_timed() -> Iterator[list[float]]:
    """Collect how many seconds each recording of a CUDA graph took."""
    times: list[float] = []
    enter, leave = torch.cuda.graph.__enter__, torch.cuda.graph.__exit__

    def timed_enter(self):
        self.began = time.perf_counter()
        return enter(self)

    def timed_exit(self, *args):
        result = leave(self, *args)
        times.append(time.perf_counter() - self.began)
        return result

    with mock.patch.multiple(torch.cuda.graph, __enter__=timed_enter, __exit__=timed_exit):
        yield times


def cudnn(found: Findings, device: torch.device) -> None:
    """Host time of attention at lengths never seen before, with cuDNN as SDPA orders it by default, and last."""
    for name, value in (("default", None), ("cuDNN last", "1")):
        environment = {key: own for key, own in os.environ.items() if key != "TORCH_CUDNN_SDPA_DEPRIORITIZED"}
        if value is not None:
            environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = value
        command = [sys.executable, __file__, "lengths", "--device", device.type]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                for case, figure in json.loads(line).items():
                    found.add(f"new length, {case}, {name}", figure, "ms")
        if done.returncode:
            found.add(name, " ".join(done.stderr.split())[-300:], good=False)


def lengths(found: Findings, device: torch.device) -> None:
    """Print the milliseconds of attention at 20 new lengths, and at one that is known, as one line of JSON."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attend, figures = torch.nn.functional.scaled_dot_product_attention, {}
    for queries, masked in ((64, True), (16, False), (1, False)):
        case = f"{queries} queries{' with a mask' if masked else ''}"
        times = []
        for turn in range(22):  # the first two warm up
            keys = (2048 if device.type == "cuda" else 64) + 7 * turn
            query = torch.randn(1, 32, queries, 128, device=device, dtype=dtype)
            key, value = torch.randn(2, 1, 32, keys, 128, device=device, dtype=dtype)
            mask = torch.zeros(1, 1, queries, keys, device=device, dtype=dtype) if masked else None
            call = lambda query=query, key=key, value=value, mask=mask: attend(query, key, value, attn_mask=mask)  # noqa: E731
            times.append(host_milliseconds(call, device))
        figures[case] = float(f"{statistics.median(times[2:]):.3f}")
        figures[f"{case}, known"] = float(f"{median_milliseconds(call, device):.3f}")
    print(json.dumps(figures), flush=True)


STEPS = {"env": env, "smoke": smoke, "graphs": graphs, "cudnn": cudnn, "lengths": lengths}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    found = Findings(args.json)
    STEPS[args.step](found, torch.device(args.device))
    return int(any(figure["good"] is False for figure in found.figures))


if __name__ == "__main__":
    sys.exit(main())
