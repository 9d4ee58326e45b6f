"""The example and the benchmarks, through their `main(argv)`, on a tiny pair."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.hub.pair_on_disk import save_pair

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(places, *names):
    return [part for name in names for part in (name, places[name])]


def test_generate_streams_and_measures(places, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fgh\n\n")
    argv = [*options(places, "--target", "--drafter"), "--prompt", "abc", "--prompts", str(prompts)]
    argv += ["--max-new-tokens", "8", "--tree-budget", "4", "--num-candidates", "2", "--repeats", "2"]
    script("examples/generate.py").main([*argv, "--json", str(tmp_path / "out.json")])
    output = capsys.readouterr().out
    assert "abc" in output and "tokens per target pass" in output and "TreeFlash tree B4 M2" in output
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["target"]["id"] == "target" and record["results"][0]["settings"]["prompts"] == 2
    assert all(arm["identical"] for arm in record["results"][0]["arms"])


def test_constrained_json_is_plain_generates_json(capsys):
    pytest.importorskip("xgrammar")
    example = script("examples/constrained_json.py")
    example.main(["--max-new-tokens", "60"])  # the embedded pair, whose tokenizer can write JSON
    output = capsys.readouterr().out
    assert "identical: yes" in output
    text = json.loads(output[output.index("{") :])
    assert list(text) == example.PERSON["required"]


def test_generate_wants_a_prompt(places, capsys):
    with pytest.raises(SystemExit):
        script("examples/generate.py").main(options(places, "--target", "--drafter"))
    assert "--prompt" in capsys.readouterr().err


def test_end_to_end_covers_the_grid(places, tmp_path):
    argv = [
        *options(places, "--target", "--drafter", "--prompts"),
        "--tree-budgets",
        "2",
        "6",
        "--num-candidates",
        "1",
    ]
    argv += ["--temperatures", "0", "0.9", "--max-new-tokens", "6", "--repeats", "1", "--limit", "1"]
    script("benchmarks/end_to_end.py").main([*argv, "--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["settings"].get("temperature") for result in results] == [None, 0.9]
    names = ["plain", "chain", "marginal tree B2", "marginal tree B6", "TreeFlash tree B2 M1", "TreeFlash tree B6 M1"]
    assert [arm["name"] for arm in results[0]["arms"]] == names


def test_stages_add_up_and_leave_nothing_wrapped(places, tmp_path, capsys):
    stages = script("benchmarks/stages.py")
    walk = stages.generation.TreeDecoding.walk
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--max-new-tokens", "12"]
    stages.main([*argv, "--tree-budget", "4", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(stages.MODELS) < set(result["stages_ms"]) and {"walk", "commit", "tree build"} < set(
        result["stages_ms"]
    )
    assert 0 < result["share_outside_models"] < 1 and result["rounds"] > 1
    assert "outside the models' forwards" in capsys.readouterr().out
    assert stages.generation.TreeDecoding.walk is walk


def test_lookup_counts_both_kinds_of_prompts(places, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    lines = [f"    value_{index} = number + {index}" for index in range(7)]
    (sources / "one.py").write_text("\n".join(["def first(number):", *lines, "    return number"]))
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--sources", str(sources), "--tree-budgets", "4"]
    script("benchmarks/lookup.py").main([*argv, "--max-new-tokens", "6", "--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["prompts"], row["count"]) for row in results] == [("copy-heavy", 1), ("ordinary", 2)]
