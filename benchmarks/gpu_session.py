"""The first minutes on a GPU: exactness, then times, each step in a process of its own with a limit.

    python benchmarks/gpu_session.py --part a --seconds 330 --out results
    python benchmarks/gpu_session.py --part b --seconds 420 --out results
    python benchmarks/gpu_session.py --self-test

Part A says whether texts are exact, and leaves compiled code in a temporary folder; part B finds it there and times
rounds and kernels, alone on the card. A step that crashes or runs out of time ends nothing but itself. The summary is
written after every step; a table comes last. Nothing needs to be installed but torch, triton and transformers.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gpu_figures

ROOT = Path(__file__).resolve().parents[1]
# Both parts, and another run, find what was compiled before, and the roofs that part A measured.
SCRATCH = Path(tempfile.gettempdir()) / "hf-treeflash-gpu"
TAIL_LINES, LOG_BYTES = 30, 2**20
RESERVE, SHORTEST = 4.0, 3.0  # seconds kept for the table, and too few to begin a step with


class Step(NamedTuple):
    """One process.

    Attributes:
        name (`str`):
            Its name in the summary.
        limit (`float`), expected (`float`):
            Seconds it may take, and is thought to take.
        command (`list[str]`):
            Arguments of the interpreter.
        result (`Path`, *optional*):
            File that it writes its figures to.
        rows (`str`, *optional*):
            Function of `gpu_figures` that makes rows of them.
        unless (`Callable[[], bool]`, *optional*):
            Leaves the step out where it returns True.
        instead (`list[str]`, *optional*):
            Arguments to try where the command failed.
    """

    name: str
    limit: float
    expected: float
    command: list[str]
    result: Path | None = None
    rows: str | None = None
    unless: Callable[[], bool] | None = None
    instead: list[str] | None = None


def own(device: str, name: str, result: Path) -> list[str]:
    """Return the arguments of a step of `gpu_steps.py`."""
    return ["benchmarks/gpu_steps.py", name, "--device", device, "--json", str(result)]


def rounds(device: str, preset: str, budget: int, result: Path, *options: str) -> list[str]:
    """Return the arguments of `round.py`; without a GPU shapes are tiny."""
    preset, context = (preset, 2048) if device == "cuda" else ("tiny", 64)
    shape = ["--preset", preset, "--contexts", str(context), "--budgets", str(budget), "--device", device]
    return ["benchmarks/round.py", *shape, *options, "--json", str(result)]


def part_a(out: Path, device: str) -> list[list[Step]]:
    """Exactness, and the compile caches for part B; the steps of one list run side by side."""
    warm = ["--arms", "graphed", "graphed vanilla", "--repeats", "1"]
    tests = ["-m", "pytest", "-v", "--tb=short", "-n", "6", "-p", "no:cacheprovider"]
    tests += ["tests/kernels", "tests/static/test_gpu.py"]
    report = out / "a_tests.xml"

    def step(name: str, limit: float, expected: float) -> Step:
        result = SCRATCH / f"a_{name}.json"
        return Step(name, limit, expected, own(device, name, result), result, "found_rows")

    def compilation(preset: str, limit: float, expected: float) -> Step:
        result = SCRATCH / f"a_{preset}.json"
        return Step(
            f"compile {preset}", limit, expected, rounds(device, preset, 64, result, *warm), result, "compile_rows"
        )

    return [
        [step("env", 60, 12)],  # the first to read the libraries from disk
        [
            step("smoke", 100, 35),
            step("graphs", 200, 75),
            Step("tests", 240, 120, [*tests, f"--junitxml={report}"], report, "test_rows"),
            compilation("qwen3-4b", 270, 130),
            compilation("qwen3-8b", 280, 150),
        ],
        [step("cudnn", 40, 12)],
    ]


def part_b(out: Path, device: str) -> list[list[Step]]:
    """Times, one step after the other."""
    graphed = ["graphed vanilla", "graphed"] if graphs_are_recorded() else []
    four, eight, sixteen = (out / f"round_{name}.json" for name in ("qwen3_4b", "qwen3_8b", "qwen3_4b_b16"))
    attention, others, texts = (out / f"{name}.json" for name in ("kernels_k1", "kernels_k2_k5", "end_to_end"))
    plain = ["--arms", "vanilla", "eager", "static"]
    tiny = ROOT / "src" / "hf_treeflash" / "tiny"
    pair = ["--target", str(tiny / "target"), "--drafter", str(tiny / "drafter"), "--dtype", "bfloat16"]
    pair += ["--prompts", str(tiny / "prompts.json"), "--limit", "2", "--temperatures", "0", "--repeats", "2"]
    pair += ["--max-new-tokens", "96"]
    pair += ["--device", device]
    kernels = ["benchmarks/kernel_times.py", "--repeats", "30", "--without-flex", "--device", device]
    kernels += ["--contexts"] if device == "cuda" else ["--smoke", "--contexts"]

    def timed(name: str, preset: str, budget: int, limit: float, expected: float, result: Path, *options) -> Step:
        spare = rounds(device, preset, budget, result, *plain)  # where graphs bring the process down
        command = rounds(device, preset, budget, result, *options)
        return Step(name, limit, expected, command, result, "round_rows", instead=spare)

    def end_to_end(name: str, result: Path, *options) -> Step:
        command = ["benchmarks/end_to_end.py", *pair, *options, "--json", str(result)]
        return Step(name, 90, 45, command, result, "text_rows")

    profile = SCRATCH / "b_profile.json"
    profiling = rounds(device, "qwen3-4b", 64, profile, "--arms", "graphed", "--repeats", "3", "--profile")
    roof = SCRATCH / "a_env.json"
    steps = [
        Step("env", 60, 12, own(device, "env", roof), roof, "found_rows", unless=lambda: bool(roofs())),
        timed("round 4B", "qwen3-4b", 64, 110, 75, four, *plain, "reference", *graphed, "--profile"),
        timed("round 8B", "qwen3-8b", 64, 110, 80, eight, *plain, *graphed),
        Step("kernels K1", 40, 25, [*kernels, "2048", "8192", "--budgets", "16", "64", "--cases", "K1", "--json",
             str(attention)], attention, "kernel_rows"),
        Step("kernels K2 to K5", 45, 30, [*kernels, "2048", "--budgets", "16", "64", "--cases", "K2", "K3", "K4", "K5",
             "output", "--json", str(others)], others, "kernel_rows"),
        timed("round 4B, 16 nodes", "qwen3-4b", 16, 70, 50, sixteen, "--arms", *(graphed or ["vanilla", "eager"])),
        Step("profile", 45, 35, profiling,
             profile, "round_rows", unless=lambda: not graphed or has_profile(four)),
        end_to_end("texts", texts, "--tree-budgets", "16", "64", "--num-candidates", "16", "--arms", "chain",
                   "TreeFlash"),
        end_to_end("texts, static", SCRATCH / "b_static.json", "--static", "--tree-budgets", "64", "--num-candidates",
                   "16", "--arms", "plain", "TreeFlash"),
    ]  # fmt: skip
    return [[step] for step in steps]


def graphs_are_recorded() -> bool:
    """Return whether part A could record graphs, as far as it got; a text that differs stops no timing."""
    path = SCRATCH / "a_graphs.json"
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else []
    return all(figure["good"] is not False for figure in figures if figure["name"] == "graphs recorded")


def has_profile(path: Path) -> bool:
    """Return whether a record of rounds already has the profile of a graph."""
    if not path.exists():
        return False
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return any("graphed" in result.get("profiles", {}) for result in results)


def environment() -> dict[str, str]:
    """Return what the steps' environment adds to this process's."""
    return {
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(SCRATCH / "inductor"),
        "TRITON_CACHE_DIR": str(SCRATCH / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "6",
        "OMP_NUM_THREADS": "4",
    }


class Session:
    """Runs steps and writes down what became of them.

    Args:
        part (`str`), out (`Path`), seconds (`float`):
            The part's name, where its summary goes, and how long it may take in all.
    """

    def __init__(self, part: str, out: Path, seconds: float):
        self.out, self.part, self.seconds = out, part, seconds
        self.begin, self.lock = time.monotonic(), threading.Lock()
        self.children: set[subprocess.Popen] = set()
        self.record: dict[str, Any] = {"part": part, "seconds": seconds, "environment": environment(), "steps": []}
        out.mkdir(parents=True, exist_ok=True)
        SCRATCH.mkdir(parents=True, exist_ok=True)
        self.logs = SCRATCH / f"{part}_logs"
        self.logs.mkdir(exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds left for steps."""
        return self.seconds - RESERVE - (time.monotonic() - self.begin)

    def run(self, phases: list[list[Step]]) -> None:
        """Run lists of steps one after the other, the steps of each side by side."""
        for steps in phases:
            with ThreadPoolExecutor(len(steps)) as pool:
                list(pool.map(self.take, steps))

    def take(self, step: Step) -> None:
        """Run one step, and its spare command where it failed; nothing that happens here ends the session."""
        try:
            if step.unless is not None and step.unless():
                return self.note({"name": step.name, "skipped": "another step has it, or it cannot be had"})
            if step.result is not None:
                step.result.unlink(missing_ok=True)
            done = self.attempt(step, step.command)
            self.note(done)
            if done["return_code"] != 0 and step.instead is not None and not has_figures(done):
                if step.result is not None:
                    step.result.unlink(missing_ok=True)
                self.note(self.attempt(step, step.instead, " (spare)"))
        except Exception as problem:
            self.note({"name": step.name, "driver_failed": f"{type(problem).__name__}: {problem}"})

    def attempt(self, step: Step, command: list[str], suffix: str = "") -> dict[str, Any]:
        """Run a command within its limit and what is left; return what became of it."""
        limit, start = min(step.limit, self.left), time.monotonic()
        done: dict[str, Any] = {"name": step.name + suffix, "command": command, "limit": round(limit, 1)}
        done |= {"expected": step.expected, "began": round(start - self.begin, 1)}
        log = self.logs / (done["name"].replace(" ", "_") + ".txt")
        if limit < SHORTEST:
            return done | {
                "return_code": None,
                "timed_out": False,
                "seconds": 0.0,
                "tail": ["no time left"],
                "rows": [],
            }
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own
            )
            self.children.add(child)
            try:
                code, timed_out = child.wait(limit), False
            except subprocess.TimeoutExpired:
                code, timed_out = None, True
            finally:
                end(child)
                self.children.discard(child)
        done |= {"return_code": code, "timed_out": timed_out, "seconds": round(time.monotonic() - start, 1)}
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return done | {"tail": lines[-TAIL_LINES:], "rows": rows_of(step)}

    def note(self, done: dict[str, Any]) -> None:
        """Add a step to the summary and write it."""
        with self.lock:
            self.record["steps"].append(done)
            outcome = "out of time" if done.get("timed_out") else f"code {done.get('return_code')}"
            outcome = done.get("skipped") or done.get("driver_failed") or outcome
            now = time.monotonic() - self.begin
            print(f"[{now:6.1f} s] {done['name']}: {outcome}, {done.get('seconds', 0)} s", flush=True)
            self.write()

    def write(self) -> None:
        """Write the summary as a whole or not at all."""
        self.record["elapsed"] = round(time.monotonic() - self.begin, 1)
        path = self.out / f"{self.part}_summary.json"
        draft = path.with_suffix(".part")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(self.record, file, indent=2, default=str)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def finish(self) -> str:
        """Write the steps' output into one file, and return the table."""
        with (self.out / f"{self.part}_log.txt").open("wb") as file:
            for log in sorted(self.logs.iterdir()):
                file.write(f"==== {log.stem}\n".encode() + log.read_bytes()[-LOG_BYTES:] + b"\n")
        return tabulated(self.record)

    def stop(self) -> None:
        """End what still runs."""
        for child in list(self.children):
            end(child)


def end(child: subprocess.Popen) -> None:
    """Kill a process and all of its group."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def roofs() -> dict[str, float]:
    """Return what part A measured: GB/s and TFLOP/s by name."""
    path = SCRATCH / "a_env.json"
    if not path.exists():
        return {}
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return {figure["name"]: figure["value"] for figure in figures if figure["unit"] in ("GB/s", "TFLOP/s")}


def rows_of(step: Step) -> list[list[Any]]:
    """Return the rows of a step's figures, such as it left."""
    if step.result is None or step.rows is None or not step.result.exists():
        return []
    text = step.result.read_text(encoding="utf-8")
    try:
        if step.rows == "test_rows":
            found = gpu_figures.test_rows(text)
        else:
            found = getattr(gpu_figures, step.rows)(json.loads(text), roofs())
    except Exception as problem:
        found = [gpu_figures.Row(step.name, f"unreadable: {type(problem).__name__}: {problem}", good=False)]
    return [list(row) for row in found]


def has_figures(done: dict[str, Any]) -> bool:
    """Return whether a step measured something before it failed."""
    return any(row[2] == "ms" for row in done["rows"])


def tabulated(record: dict[str, Any]) -> str:
    """Lay the whole session out: every step and its figures."""
    rows = []
    for done in record["steps"]:
        bad = done.get("timed_out") or done.get("return_code") != 0
        outcome = done.get("skipped") or done.get("driver_failed")
        outcome = outcome or ("out of time" if done["timed_out"] else f"code {done['return_code']}")
        expected = f"{done['expected']} s, limit {done['limit']} s" if "expected" in done else ""
        title = f"{outcome}, {done.get('seconds', 0)} s"
        rows.append(
            gpu_figures.Row(
                f"== {done['name']}", title, expected=expected, good=None if "skipped" in done else not bad
            )
        )
        rows += [gpu_figures.Row(*row) for row in done.get("rows", ())]
    return gpu_figures.table(rows)


def self_test_steps(out: Path) -> list[list[Step]]:
    """Steps that do well, crash, hang with a child of their own, write half a result, and find no time left."""
    good, marker = out / "good.json", out / "orphan"
    figure = {"name": "copy", "value": 1.5, "unit": "GB/s", "good": True}
    writes = f"import json; json.dump({{'figures': [{figure}]}}, open({str(good)!r}, 'w')); print('done')"
    child = f"import time; time.sleep(6); open({str(marker)!r}, 'w')"
    hangs = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    half = out / "half.json"
    crash = f"open({str(half)!r}, 'w').write('{{'); print('the last words', flush=True); import os; os.abort()"
    return [
        [Step("good", 20, 1, ["-c", writes], good, "found_rows")],
        [
            Step("crash", 20, 1, ["-c", crash], half, "found_rows", instead=["-c", "print('the spare')"]),
            Step("hang", 4, 60, ["-c", hangs]),
        ],
        [Step("unwanted", 20, 1, ["-c", "print(1)"], unless=lambda: True)],
        [Step("late", 60, 60, ["-c", "import time; time.sleep(60)"])],
        [Step("no time", 20, 1, ["-c", "print(1)"])],
    ]


def self_test(out: Path) -> dict[str, Any]:
    """Run those steps and check what is written down of them."""
    session = Session("self_test", out, seconds=14)
    session.run(self_test_steps(out))
    print(session.finish())
    record = json.loads((out / "self_test_summary.json").read_text(encoding="utf-8"))
    steps = {step["name"]: step for step in record["steps"]}
    assert steps["good"]["return_code"] == 0 and steps["good"]["rows"][0][:3] == ["copy", 1.5, "GB/s"]
    assert steps["crash"]["return_code"] == -signal.SIGABRT and steps["crash"]["tail"] == ["the last words"]
    assert steps["crash"]["rows"][0][1].startswith("unreadable") and steps["crash (spare)"]["tail"] == ["the spare"]
    assert steps["hang"]["timed_out"] and 4 <= steps["hang"]["seconds"] < 6
    assert "skipped" in steps["unwanted"]
    assert steps["late"]["timed_out"] and steps["late"]["limit"] < 8
    assert steps["no time"]["tail"] == ["no time left"]
    time.sleep(max(0.0, 8 - record["elapsed"]))
    assert not (out / "orphan").exists(), "a child outlived its step"
    return record


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("a", "b"))
    parser.add_argument("--seconds", type=float, help="for the whole part; 330 for a, 420 for b by default")
    parser.add_argument("--out", type=Path, help="folder for summary, log and records")
    parser.add_argument("--steps", nargs="+", help="names of those to run; all by default")
    parser.add_argument("--device", default="cuda", help="cpu tries every command at tiny shapes")
    parser.add_argument("--self-test", action="store_true", help="check limits, kills and records without a GPU")
    args = parser.parse_args(argv)
    if not args.self_test and (args.part is None or args.out is None):
        parser.error("--part and --out are needed")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.self_test:
        with tempfile.TemporaryDirectory() as folder:
            self_test(args.out or Path(folder))
        print("the driver does as it says")
        return
    session = Session(args.part, args.out.resolve(), args.seconds or {"a": 330.0, "b": 420.0}[args.part])

    def stop(*_) -> None:
        session.stop()
        os._exit(1)  # the summary is written

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    phases = {"a": part_a, "b": part_b}[args.part](session.out, args.device)
    chosen = [[step for step in steps if args.steps is None or step.name in args.steps] for steps in phases]
    session.run([steps for steps in chosen if steps])
    print(f"\n{session.finish()}", flush=True)


if __name__ == "__main__":
    main()
