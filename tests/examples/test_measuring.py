"""The example and the benchmarks, through their `main(argv)`, on a tiny pair."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from hf_treeflash.decoding import TreeDecoding
from hf_treeflash.hub.evaluation import read_evaluation
from tests.helpers.pair_on_disk import save_pair

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def script(name):
    folder = str((ROOT / name).parent)
    if folder not in sys.path:  # scripts import their neighbours
        sys.path.append(folder)
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
    example.main(["--max-new-tokens", "100"])  # the embedded pair, whose tokenizer can write JSON
    output = capsys.readouterr().out
    assert "identical: yes" in output
    text = json.loads(output[output.index("{") :])
    assert list(text) == example.PERSON["required"]


def test_kinds_of_prompts(places, tmp_path, capsys):
    prompts, record = tmp_path / "prompts.json", tmp_path / "kinds.json"
    prompts.write_text(json.dumps([{"kind": kind, "prompt": "fgh" + kind[0]} for kind in ("chat", "code", "code")]))
    argv = [*options(places, "--target", "--drafter"), "--prompts", str(prompts), "--json", str(record)]
    argv += ["--max-new-tokens", "6", "--tree-budgets", "4", "auto"]
    main = script("benchmarks/kinds.py").main
    main([*argv, "--samplings", "greedy"])
    results = main([*argv, "--samplings", "greedy", "T = 1", "--plot", str(tmp_path / "kinds.png")])  # goes on
    assert [(r["kind"], r["sampling"]) for r in results] == [
        ("chat", "greedy"), ("code", "greedy"), ("chat", "T = 1"), ("code", "T = 1")
    ]  # fmt: skip
    table = capsys.readouterr().out
    assert "greedy, batch 1, 3 prompts, 6 tokens each" in table and "| TreeFlash tree Bauto" in table
    assert all(arm["identical"] for r in results for arm in r["arms"] if arm["promises_text"])
    assert (tmp_path / "kinds.png").stat().st_size > 1000
    assert read_evaluation(record)["results"][0]["task"] == "chat"
    with pytest.raises(SystemExit, match="measured with max_new_tokens 6"):
        main([*argv, "--samplings", "greedy", "--max-new-tokens", "7"])


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


def test_end_to_end_over_static_caches_counts_the_same_passes(places, tmp_path):
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--tree-budgets", "6", "--num-candidates", "2"]
    argv += ["--static", "--temperatures", "0", "--max-new-tokens", "6", "--repeats", "1", "--limit", "1"]
    script("benchmarks/end_to_end.py").main([*argv, "--json", str(tmp_path / "out.json")])
    by_name = {arm["name"]: arm for arm in json.loads((tmp_path / "out.json").read_text())["results"][0]["arms"]}
    static = {name.removesuffix(", static") for name in by_name if name.endswith(", static")}
    assert static == {"plain", "marginal tree B6", "TreeFlash tree B6 M2"}
    for name in static:
        assert by_name[f"{name}, static"]["identical"]
        # Passes over dynamic caches stop at the length that the target's config names.
        assert by_name[f"{name}, static"]["tau"] >= by_name[name]["tau"]


def test_stages_add_up_and_leave_nothing_wrapped(places, tmp_path, capsys):
    stages = script("benchmarks/stages.py")
    walk = TreeDecoding.walk
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--max-new-tokens", "12"]
    stages.main([*argv, "--tree-budget", "4", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(stages.MODELS) < set(result["stages_ms"]) and {"walk", "commit", "tree build"} < set(
        result["stages_ms"]
    )
    assert 0 < result["share_outside_models"] < 1 and result["rounds"] > 1
    assert "noise of the draws" not in result["stages_ms"], "greedy calls draw nothing"
    stages.main([*argv, "--temperature", "1", "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text())["stages_ms"]["noise of the draws"] > 0
    assert "outside the models' forwards" in capsys.readouterr().out
    assert TreeDecoding.walk is walk


def test_the_draws_are_known_and_unknown_side_by_side(places, tmp_path, capsys):
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--tree-budgets", "6", "--num-candidates", "2"]
    argv += ["--without-noise", "--temperatures", "0", "1", "--max-new-tokens", "6", "--repeats", "1", "--limit", "1"]
    path, figures = tmp_path / "out.json", script("benchmarks/noise_figures.py")
    script("benchmarks/end_to_end.py").main([*argv, "--json", str(path)])
    greedy, sampled = json.loads(path.read_text())["results"]
    known = {"our chain", "marginal tree B6", "TreeFlash tree B6 M2"}
    assert {arm["name"] for arm in greedy["arms"]} == {"plain", "chain", *known}, "greedy calls draw nothing"
    without = {arm["name"] for arm in sampled["arms"]} - {"plain", "chain", *known}
    assert without == {name + figures.WITHOUT for name in known}
    assert all(arm["identical"] for arm in sampled["arms"] if arm["name"] != "chain")
    capsys.readouterr()
    pytest.importorskip("matplotlib")
    figures.main(["--speeds", str(path), "--plot", str(tmp_path / "noise.png")])
    heading = capsys.readouterr().out.splitlines()[0]
    assert heading == "|  | greedy | temperature 1 | temperature 1, without noise |"
    assert (tmp_path / "noise.png").stat().st_size > 0


def test_recurrent_layers_are_counted(tmp_path, capsys):
    path = tmp_path / "out.json"
    script("benchmarks/recurrent.py").main(["--nodes", "8", "--context", "4", "--repeats", "1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 6 and all(row["operations"] > 0 and row["pass_ms"] > 0 for row in rows)
    # A product of 8 queries with 12 keys, and one with their values.
    assert rows[0]["operations"] == 2 * 2 * 16 * 8 * 12 * 256


def test_noise_is_counted_with_and_without_and_a_run_goes_on(places, tmp_path, capsys, monkeypatch):
    noise, path = script("benchmarks/noise.py"), tmp_path / "out.json"
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--max-new-tokens", "8", "--json", str(path)]
    argv += ["--tree-budgets", "6", "--num-candidates", "3", "--temperatures", "0", "1", "--top-p", "1", "0.9"]
    argv += ["--penalties", "2"]
    noise.main([*argv, "--seeds", "0"])
    noise.main([*argv, "--seeds", "0", "1"])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 + 2 * (2 + 3) and all(row["identical"] and row["tokens"] > 0 for row in rows)
    assert {row["draws"] for row in rows} == {"greedy", "known", "unknown", "known, 2 nats"}
    assert "T 1, top-p 0.9, top-k 0, B 6" in capsys.readouterr().out
    script("benchmarks/noise_figures.py").main(["--counts", str(path)])
    heading, _, *lines = capsys.readouterr().out.splitlines()
    assert heading.endswith("| unknown, 0.7 | greedy, 0.7 | known, 0.7 | known, 2 nats, 0.7 |")
    starts = ["| 0 | 0 | 0.9 | 6 |", "| 0 | 0 | 1 | 6 |", "| 1 | 0 | 0.9 | 6 |", "| 1 | 0 | 1 | 6 |"]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    monkeypatch.setattr(noise.Pair, "count", None)  # nothing is counted again
    noise.main([*argv, "--seeds", "0", "1"])


def test_rounds_at_a_shape_are_compared_with_plain_steps(tmp_path, capsys):
    argv = ["--shape", "tiny", "--context", "9", "--draft-vocabulary", "20", "--max-new-tokens", "8"]
    out = ["--json", str(tmp_path / "out.json")]
    script("benchmarks/stages.py").main([*argv, *out, "--tree-budget", "4", "--repeats", "2", "--eager"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["shape"] == "tiny" and result["draft_vocabulary"] == 20 and result["rounds"] > 1
    assert len(result["plain_steps_per_round"]["plain"]["all"]) == 2 and "per round" in capsys.readouterr().out
    more = ["--tree-budgets", "4", "--num-candidates", "2", "--temperatures", "0", "--repeats", "1", "--limit", "1"]
    script("benchmarks/end_to_end.py").main([*argv, *out, *more, "--arms", "TreeFlash"])
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["arms"][1]["identical"]
    assert "plain steps per pass" in capsys.readouterr().out


def test_approximations_are_compared_with_the_exact_draft(places, tmp_path, capsys):
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--trees", "4:2", "8:4", "--draft-vocabulary", "2"]
    script("benchmarks/approximations.py").main(
        [*argv, "--max-new-tokens", "12", "--responses", "2", "--json", str(tmp_path / "out.json")]
    )
    plain, *arms = json.loads((tmp_path / "out.json").read_text())["results"][0]["arms"]
    assert [arm["name"].partition(" ")[2].partition(" ")[2] for arm in arms] == ["exact", "float8", "vocabulary 2"] * 2
    assert [arm["knobs"]["draft_lm_head"] for arm in arms] == [None, "float8", None] * 2
    assert plain["identical"] and all(arm["identical"] for arm in arms)
    assert arms[0]["tau_kept"] == arms[3]["tau_kept"] == 1
    # Of a random draft an approximation may even be the better one.
    assert arms[5]["tau"] != arms[3]["tau"] and arms[5]["tau_kept"] == arms[5]["tau"] / arms[3]["tau"]
    assert "of the exact draft's" in capsys.readouterr().out


def test_kernel_times_agree_with_the_oracles_and_are_printed_again(tmp_path, capsys):
    times, path = script("benchmarks/kernel_times.py"), tmp_path / "out.json"
    times.main(["--smoke", "--device", "cpu", "--repeats", "2", "--json", str(path)])
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert {result["case"][:2] for result in record["results"]} == {"K1", "K2", "K3", "K4", "K5", "ou"}
    assert record["environment"]["torch"] and record["settings"]["seed"] == 0
    for result in record["results"]:
        for way in result["ways"]:
            assert way["failure"] is None and len(way["milliseconds"]["all"]) == 2, way
            exact = "float8" not in way["name"]  # eight bits are not the oracle's
            assert way["difference"] is None or not exact or way["difference"] < 1e-4, (result["case"], way)
    times.main(["--compare", str(path)])
    again = capsys.readouterr().out
    assert all(line in again for line in printed.splitlines())


def test_a_library_that_fails_costs_no_other_figures():
    times = script("benchmarks/kernel_times.py")

    def broken():
        raise RuntimeError("no such thing\nhere")

    ways = {"oracle": times.Way(lambda: times.torch.ones(2)), "library": times.Way(broken)}
    (result,) = times.measure([times.Case("K0", {}, ways)], times.torch.device("cpu"), repeats=1)
    assert result["ways"][0]["milliseconds"] and result["ways"][1]["failure"] == "RuntimeError: no such thing"
    assert "failed" in times.table(result)


def test_rounds_are_split_into_stages_and_projected_by_name(tmp_path, capsys):
    rounds, path, evaluation = script("benchmarks/round.py"), tmp_path / "out.json", tmp_path / "evaluation.json"
    argv = ["--preset", "tiny", "--device", "cpu", "--contexts", "12", "40", "--budgets", "24", "--repeats", "2"]
    rounds.main([*argv, "--num-candidates", "4", "--accepted", "5", "--json", str(path)])
    record = json.loads(path.read_text())
    assert [result["context"] for result in record["results"]] == [12, 40]
    stages = {"draft", "heads", "build", "verify", "walk", "commit"}
    for result in record["results"]:
        arms = {arm["name"]: arm for arm in result["arms"]}
        assert set(arms) == {"vanilla", "eager", "reference", "static"}
        assert set(arms["static"]["stages_milliseconds"]) == {"draft", "verify", "commit"}
        assert set(arms["vanilla"]["stages_milliseconds"]) == {"verify", "walk"}
        assert set(arms["eager"]["stages_milliseconds"]) == set(arms["reference"]["stages_milliseconds"]) == stages
        assert [arm["accepted"] for arm in arms.values()] == [1, 5, 5, 5]
        assert all(len(arm["round_milliseconds"]["all"]) == 2 for arm in arms.values())
    capsys.readouterr()
    trained = {"name": "TreeFlash tree B24 M4", "knobs": {"tree_budget": 24, "num_candidates": 4}, "tau": 3.5}
    evaluation.write_text(json.dumps({"results": [{"arms": [{"name": "plain", "knobs": {}}, trained]}]}))
    rounds.main(["--compare", str(path), "--tau", str(evaluation), "--num-candidates", "4"])
    assert "projection: x vanilla at τ 3.50" in capsys.readouterr().out
    rounds.main(["--compare", str(path)])
    assert "projection" not in capsys.readouterr().out


def test_every_round_starts_where_the_last_one_did_and_both_ways_draft_the_same_tree():
    rounds = script("benchmarks/round.py")
    torch = rounds.torch
    target, drafter = rounds.random_pair("tiny", torch.device("cpu"), torch.float32)
    drafter = rounds.with_knobs(drafter, tree_budget=24, num_candidates=4, draft_temperature=0.01)
    trees = []
    with torch.no_grad():
        setting = rounds.Setting(target, drafter, context=20, accepted=6)
        for name in ("eager", "reference", "eager"):
            arm = rounds.ARMS[name](setting)
            for _ in range(3):
                arm.rewind()
                arm.round(lambda stage: rounds.nullcontext())
                trees.append(arm.tree)
            assert arm.accepted == 6
            arm.rewind()
            cache = arm.cache if name == "reference" else arm.prefix.cache
            assert cache.get_seq_length() == 20 and cache.layers[3].values.shape[2] == 20
    for tree in (trees[1], trees[2]):
        assert torch.equal(tree.token_ids, trees[0].token_ids)
    assert trees[0].depths.max() >= 6


def test_lookup_counts_every_kind_of_prompts(places, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    lines = [f"    value_{index} = number + {index}" for index in range(7)]
    (sources / "one.py").write_text("\n".join(["def first(number):", *lines, "    return number"]))
    argv = [*options(places, "--target", "--drafter", "--prompts"), "--sources", str(sources), "--tree-budgets", "4"]
    script("benchmarks/lookup.py").main([*argv, "--max-new-tokens", "6", "--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["prompts"], row["count"]) for row in results] == [("copy-heavy", 1), ("ordinary", 2), ("random", 2)]


def recipe_options(places, folder):
    """Return options for two steps, and the samples they name: texts of the tiny target's tokens."""
    samples, prompts = folder / "samples.jsonl", folder / "prompts.json"
    rows = [
        {"input_ids": [4 + (start * step) % 18 for step in range(20)], "prompt_length": 4} for start in range(1, 7)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text(json.dumps([{"kind": "chat", "prompt": "fghc"}, {"kind": "code", "prompt": "kjih"}]))
    argv = [*options(places, "--target", "--drafter"), "--samples", str(samples), "--prompts", str(prompts)]
    argv += [
        "--work",
        str(folder / "work"),
        "--json",
        str(folder / "out.json"),
        "--batch-size",
        "2",
        "--held-out",
        "1",
    ]
    return [*argv, "--anchors", "3", "--rank", "4", "--eval-tokens", "6"]


def test_recipes_train_side_by_side_and_go_on(places, tmp_path):
    recipes, argv = script("benchmarks/recipes.py"), recipe_options(places, tmp_path)
    result = recipes.main([*argv, "--steps", "2", "--rates", "0.001", "0.01"])
    assert list(result["heads"])[:5] == ["paper", "own drafts", "reach by slot", "reach by block", "second order"]
    assert all(arm[size]["tau"] >= 1 for arm in result["heads"].values() for size in ("B16", "B64"))
    assert result["heads"]["paper"]["B16"]["percent above paper, 95 % interval"] == [0, 0, 0]
    kept = result["samples kept from training, the paper's loss and a chain's tokens per pass"]
    assert len(kept) == 11 and all(own["chain"] >= 1 for own in kept.values())
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(result))
    again = recipes.main([*argv, "--steps", "2", "--rates", "0.001", "0.01"])  # trains and counts nothing anew
    assert again["heads"] == result["heads"] and again["training"] == result["training"]


def test_a_recipe_changes_what_it_says_and_no_more(places, tmp_path):
    recipes = script("benchmarks/recipes.py")
    args = recipes.parse([*recipe_options(places, tmp_path), "--rates", "0.001"])
    target, _, drafter = recipes.load_pair(args.target, args.drafter)
    compared = recipes.Comparison(target, drafter, args)
    samples = recipes.load_samples(args.samples[0])
    batch = recipes.AnchorCollator(0, args.anchors)(samples)
    own, reach = sys.modules["recipe_losses"], {}
    done = own.frozen_pass(drafter, target, batch)
    scores = compared.scores(done, compared.heads)
    for name in ("paper", "reach by slot", "reach by block"):
        reach[name] = own.by_block(compared.weights(name, done, scores[f"{name} @ 0.001"]), done.rows)
        assert (reach[name][:, 0] == done.rows[:, 0]).all()  # the first slot is always reached
        both = done.rows[:, 1:]
        assert (reach[name][:, 1:] <= reach[name][:, :-1])[both].all()
    assert set(reach["reach by block"].flatten().tolist()) <= {0.0, 1.0}
    fed = compared.with_own_drafts(compared.heads["own drafts @ 0.001"], done)
    assert (fed[1::2] == done.ids[1::2]).all() and (fed[:, 0] == done.ids[:, 0]).all() and (fed != done.ids).any()


def test_a_second_order_head_that_reads_nothing_older_drafts_as_the_default_head(places, tmp_path):
    recipes = script("benchmarks/recipes.py")
    args = recipes.parse([*recipe_options(places, tmp_path), "--rates", "0.001"])
    target, _, drafter = recipes.load_pair(args.target, args.drafter)
    compared = recipes.Comparison(target, drafter, args)
    second = compared.heads["second order @ 0.001"].requires_grad_(False)  # starts from the drafter's head
    knobs = {"tree_budget": 12, "num_candidates": 3, "branching": 4}
    prompts = [[5, 9, 12, 7], [4, 4, 8, 11]]
    taken = [
        recipes.counts(target, recipes.with_knobs(recipes.drafter_with(drafter, head), **knobs), prompts, 16)
        for head in (drafter.ar_head, second)
    ]
    assert taken[0] == taken[1]
    second.mix.weight.normal_(std=3.0)
    view = recipes.with_knobs(recipes.drafter_with(drafter, second), **knobs)
    assert recipes.counts(target, view, prompts, 16) != taken[0]
