"""The driver of the first minutes on a GPU, without one: limits, kills, records, and every step's own code."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_figures
    import gpu_session
    import gpu_steps

    return gpu_session, gpu_steps, gpu_figures


def test_steps_are_limited_killed_and_written_down(modules, tmp_path, monkeypatch):
    session, *_ = modules
    monkeypatch.setattr(session, "SCRATCH", tmp_path / "scratch")
    record = session.self_test(tmp_path / "out")
    assert len(record["steps"]) == 7
    assert "the last words" in (tmp_path / "out" / "self_test_log.txt").read_text()


@pytest.mark.parametrize("part", ["part_a", "part_b"])
def test_commands_are_understood(modules, tmp_path, monkeypatch, part):
    """A misspelt option would cost minutes of a GPU."""
    session, steps, _ = modules
    monkeypatch.setattr(session, "SCRATCH", tmp_path)
    import end_to_end
    import kernel_times
    import round as rounds

    parsers = {
        "benchmarks/round.py": rounds.parse,
        "benchmarks/kernel_times.py": kernel_times.parse,
        "benchmarks/end_to_end.py": end_to_end.parse,
    }
    for device in ("cuda", "cpu"):
        listed = [step for phase in getattr(session, part)(tmp_path, device) for step in phase]
        for step in listed:
            for script, *argv in filter(None, (step.command, step.instead)):
                if script in parsers:
                    args = parsers[script](argv)
                    assert args.device == device and args.json == step.result
                elif script != "-m":
                    assert script == "benchmarks/gpu_steps.py" and argv[0] in steps.STEPS
        results = [step.result for step in listed]
        assert len(set(results)) == len(results)


def test_texts_of_the_embedded_pair_are_compared(modules, tmp_path):
    _, steps, figures = modules
    found = steps.Findings(tmp_path / "found.json")
    pair = steps.Pair(torch.device("cpu"))
    pair.compare(found, "dynamic", 1, False)
    assert found.figures[0]["good"] and found.figures[0]["tau"] >= 1
    text = pair.plain(1, False)
    other = text.clone()
    other[0, -2] = (other[0, -2] + 1) % 2048
    assert f"column {text.shape[1] - 2}" in pair.first_difference(other, text)
    assert pair.first_difference(text[:, :-1], text).startswith("lengths")
    record = json.loads((tmp_path / "found.json").read_text())
    assert figures.found_rows(record, {})[0].good


def test_figures_of_rounds_are_held_against_floors(modules):
    *_, figures = modules
    times = {"vanilla": 20.0, "eager": 24.0, "graphed vanilla": 3.8, "graphed": 5.4}
    arms = [{"name": name, "round_milliseconds": {"median": time}} for name, time in times.items()]
    arms.append({"name": "compiled", "failure": "RuntimeError: no"})
    result = {"context": 2048, "budget": 64, "bytes": {"plain": 8.34e9, "round": 11.6e9}, "arms": arms}
    profile = {"events": 900, "busy_share": 0.9, "own_kernels": {}, "longest": []}
    result["profiles"] = {"graphed": profile}
    record = {"settings": {"preset": "qwen3-4b"}, "environment": {"device": "cuda (NVIDIA H100)"}, "results": [result]}
    rows = {row.name: row for row in figures.round_rows(record, {"copy": 3000.0})}
    assert rows["qwen3-4b B64 graphed"].good and rows["qwen3-4b B64 graphed"].expected == "4.9-5.4"
    assert abs(rows["qwen3-4b B64 graphed vanilla"].floor - 2.78) < 0.01
    assert rows["qwen3-4b B64 graphed / graphed vanilla"].good and rows["qwen3-4b B64 eager / vanilla"].good
    assert rows["qwen3-4b B64 compiled"].good is False
    assert "ok" in figures.table(list(rows.values()))


def test_floors_are_those_of_qwen3_4b(modules):
    import round as rounds

    target, drafter = rounds.random_pair("qwen3-4b", torch.device("meta"), torch.bfloat16)
    drafter.generation_config.num_candidates = 16
    floors = rounds.least_bytes(rounds.Setting(target, drafter, 2048, 7))
    assert abs(floors["plain"] / 3e9 - 2.78) < 0.03 and abs(floors["round"] / 3e9 - 3.86) < 0.15


def test_failed_tests_are_named(modules):
    *_, figures = modules
    text = (
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0"><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure message="no\nsuch"/></testcase></testsuite></testsuites>'
    )
    first, second = figures.test_rows(text)
    assert first.good is False and second.name == "a::c" and second.value == "no such"
