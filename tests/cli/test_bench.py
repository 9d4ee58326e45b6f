"""`hf-treeflash bench`: the grid, the files, exit codes, and conversations with answers between."""

import csv
import json

import pytest

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from hf_treeflash.bench import compare as comparing  # noqa: E402
from hf_treeflash.bench import tasks  # noqa: E402
from hf_treeflash.cli import app  # noqa: E402
from tests.helpers.pair_on_disk import CHAT_TEMPLATE, save_pair  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), CHAT_TEMPLATE)


def bench(places, *arguments, prompts=True):
    words = ["bench", "--target", places["--target"], "--drafter", places["--drafter"]]
    words += [places["--prompts"]] if prompts else []
    words += ["--max-new-tokens", "8", "--repeats", "1", *map(str, arguments)]
    return typer_testing.CliRunner().invoke(app, words)


def test_grid_and_files(places, tmp_path):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / name for name in ("out.json", "out.md", "out.csv", "plots")}
    result = bench(
        *(places, "--limit", 2, "--tree-budget", 4, "--tree-budget", 8, "--tree-budget", "auto"),
        *("--num-candidates", 2, "--temperature", 0, "--temperature", 0.8, "--batch-size", 1, "--batch-size", 2),
        *("--json", files["out.json"], "--markdown", files["out.md"], "--csv", files["out.csv"]),
        *("--plots", files["plots"]),
    )
    assert result.exit_code == 0, result.output
    results = json.loads(files["out.json"].read_text())["results"]
    settings = [(one["settings"]["batch_size"], one["settings"].get("temperature", 0)) for one in results]
    assert settings == [(1, 0), (1, 0.8), (2, 0), (2, 0.8)]
    names = [arm["name"] for arm in results[0]["arms"]]
    assert names == [
        *("plain", "prompt lookup", "chain", "our chain"),
        *("marginal tree B4", "marginal tree B8", "marginal tree Bauto"),
        *("TreeFlash tree B4 M2", "TreeFlash tree B8 M2", "TreeFlash tree Bauto M2"),
    ]
    assert files["out.md"].read_text().count("| plain |") == 4
    assert len(list(csv.DictReader(files["out.csv"].open()))) == sum(len(one["arms"]) for one in results)
    assert {path.name for path in files["plots"].iterdir()} == {"budgets.png", "acceptance.png", "stages.png"}


def test_knobs_reach_every_tree(places, tmp_path):
    knobs = {"branching": 3, "draft_temperature": 0.5, "draft_window": 4}
    words = [word for name, value in knobs.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert bench(places, "--limit", 1, *words, "--json", tmp_path / "out.json").exit_code == 0
    *_, marginal, tree = json.loads((tmp_path / "out.json").read_text())["results"][0]["arms"]
    for arm in (marginal, tree):
        assert {name: arm["knobs"][name] for name in knobs} == knobs


def test_arms_by_the_beginning_of_their_names(places):
    result = bench(places, "--arms", "our chain", "--arms", "TreeFlash", "--limit", 1)
    assert result.exit_code == 0 and "our chain" in result.output and "marginal" not in result.output
    result = bench(places, "--arms", "medusa")
    assert result.exit_code == 2 and "No arm's name begins with 'medusa'" in result.stderr


def test_a_text_that_differs_is_told_by_the_exit_code(places, monkeypatch, tmp_path):
    recorded = comparing._recorded

    def corrupted(decode, calls, arm):
        texts, passes = recorded(decode, calls, arm)
        if arm.is_ours:
            texts[0][3] += 1
        return texts, passes

    monkeypatch.setattr(comparing, "_recorded", corrupted)
    result = bench(places, "--limit", 1, "--json", tmp_path / "out.json")
    assert result.exit_code == 1 and "not plain decoding's" in result.stderr.replace("\n", " ")
    arms = json.loads((tmp_path / "out.json").read_text())["results"][0]["arms"]
    assert [arm["identical"] for arm in arms] == [True, True, True, False, False, False]


def test_an_interrupt_keeps_what_was_compared(places, monkeypatch, tmp_path):
    timed = comparing._time_interleaved

    def interrupted(*arguments):
        timed(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "_time_interleaved", interrupted)
    result = bench(places, "--limit", 1, "--temperature", 0, "--temperature", 1, "--json", tmp_path / "out.json")
    assert result.exit_code == 130
    (only,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert only["settings"]["interrupted"] and only["settings"]["repeats"] == 1


def test_the_papers_prompts_and_the_targets_answers_between_turns(places, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "load_task", lambda name, samples: [["ab", "cd"], ["efg"]][:samples])
    result = bench(places, "--paper-task", "mt-bench", "--json", tmp_path / "out.json", prompts=False)
    assert result.exit_code == 0, result.output
    (only,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert only["task"] == "mt-bench" and only["settings"]["prompts"] == 3  # a turn each
    assert bench(places, "--paper-task", "mt-bench").exit_code == 2  # and a file


def test_a_folder_for_pictures_that_cannot_be(places, tmp_path):
    (tmp_path / "file").write_text("")
    result = bench(places, "--plots", tmp_path / "file")
    assert result.exit_code == 2 and "cannot be written to" in result.stderr.replace("\n", " ")
