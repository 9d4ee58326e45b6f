"""Sixty things a user may get wrong: one sentence on standard error, no traceback, exit code 2."""

import json
import re
import shlex

import pytest

from tests.helpers.pair_on_disk import CHAT_TEMPLATE, save_pair
from tests.helpers.tiny import tiny_drafter

testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from hf_treeflash.cli import app  # noqa: E402

PAIR = "--target {target} --drafter {drafter}"
# A command line, with names of the places below in braces, and what the sentence says.
MISTAKES = [
    ("nope", "No such command 'nope'"),
    ("--nope", "No such option: --nope"),
    ("generate abc --nope", "No such option: --nope"),
    ("generate abc def", "unexpected extra argument"),
    (f"generate {PAIR} ''", "The prompt is empty"),
    ("generate abc --target {target}", "Give both --target and --drafter, or neither"),
    ("generate abc --drafter {drafter}", "Give both --target and --drafter, or neither"),
    ("generate abc --target ./nowhere --drafter {drafter}", "'--target': There is no folder ./nowhere"),
    ("generate abc --target {target} --drafter /nowhere/at/all", "'--drafter': There is no folder /nowhere/at/all"),
    ("generate abc --target {empty} --drafter {drafter}", "holds no config.json, so no model"),
    ("generate abc --target {text} --drafter {drafter}", "is a file; name the folder it lies in"),
    ("generate abc --target 'no name' --drafter {drafter}", "neither a folder nor the name of a repository"),
    ("generate abc --target a/b/c --drafter {drafter}", "There is no folder a/b/c"),
    ("generate abc --target {target} --drafter acme/model.safetensors", "neither a folder nor the name"),
    ("generate abc --target acme/nothing --drafter {drafter}", "acme/nothing"),
    ("generate abc --target {target} --drafter acme/nothing", "acme/nothing"),
    ("generate abc --target {target} --drafter {target}", "no known drafter layout"),
    ("generate abc --target {target} --drafter {wide}", "does not fit this target: its `hidden_size` is 64"),
    ("generate abc --target {target} --drafter {broken}", "no sound JSON"),
    ("generate abc --target {target} --drafter {hollow}", "has no model.safetensors"),
    (f"generate abc {PAIR} --max-new-tokens 0", "'--max-new-tokens'"),
    (f"generate abc {PAIR} --max-new-tokens many", "'--max-new-tokens'"),
    (f"generate abc {PAIR} --max-new-tokens 600", "more than the 512 that the target knows positions for"),
    (f"generate abc {PAIR} --tree-budget 1", "'1' is neither a number from 2 to 4096 nor 'auto'"),
    (f"generate abc {PAIR} --tree-budget all", "'all' is neither a number from 2 to 4096 nor 'auto'"),
    (f"generate abc {PAIR} --num-candidates 0", "'--num-candidates'"),
    (f"generate abc {PAIR} --branching 2000", "'--branching'"),
    (f"generate abc {PAIR} --draft-temperature 0", "'--draft-temperature'"),
    (f"generate abc {PAIR} --temperature -1", "'--temperature'"),
    (f"generate abc {PAIR} --temperature hot", "'--temperature'"),
    (f"generate abc {PAIR} --top-k 5", "--top-k changes nothing at temperature 0"),
    (f"generate abc {PAIR} --top-p 0.9", "--top-p changes nothing at temperature 0"),
    (f"generate abc {PAIR} --temperature 1 --top-p 1.5", "'--top-p'"),
    (f"generate abc {PAIR} --seed -1", "'--seed'"),
    (f"generate abc {PAIR} --device nowhere", "'nowhere' is no device of this machine"),
    (f"generate abc {PAIR} --dtype int4", "'--dtype': .*'int4' is not one of"),
    ("generate abc --target {bare} --drafter {drafter} --system Be.", "no chat template"),
    ("chat --target {bare} --drafter {drafter} --system Be.", "no place for a system message"),
    (f"chat {PAIR} --min-p 0.1", "--min-p changes nothing at temperature 0"),
    ("bench --target {target}", "Give a file of prompts for this target"),
    (f"bench {{folder}}/none.jsonl {PAIR}", "(?i)file '.*none.jsonl' does not exist"),
    (f"bench {{folder}} {PAIR}", "is a directory"),
    (f"bench {{lines}} {PAIR}", r"bad\.jsonl has 3 rows that are no prompts\. line 2: not JSON .*; line 3: expected"),
    (f"bench {{disguised}} {PAIR}", r"holds JSON lines: rename it to end in \.jsonl"),
    (f"bench {{no_json}} {PAIR}", r"is no JSON: .* A file of JSON lines is called \.jsonl"),
    (f"bench {{object}} {PAIR}", "expected a list of prompts, found"),
    (f"bench {{nothing}} {PAIR}", "holds no prompt"),
    (f"bench {{latin}} {PAIR}", "line 2: not UTF-8 text"),
    (f"bench {{prompts}} {PAIR} --repeats 0", "'--repeats'"),
    (f"bench {{prompts}} {PAIR} --limit 0", "'--limit'"),
    (f"bench {{prompts}} {PAIR} --json {{folder}}/no/such/place.json", "cannot be written: no such file"),
    (f"bench {{prompts}} {PAIR} --json {{folder}}", "cannot be written: is a directory"),
    (f"eval {{prompts}} {PAIR} --tree-budget 8 --tree-budget x", "'x' is neither a number from 2 to 4096"),
    ("check --target {target}", "Give both --target and --drafter"),
    ("demo --target {target}", "Give --target, --drafter and --prompts together"),
    ("inspect", "(?i)missing argument .?drafter"),
    ("inspect {empty}", "holds no config.json"),
    ("inspect acme/nothing", "acme/nothing has no config.json, or cannot be reached"),
    (f"train {PAIR}", "Missing option --samples"),
    (f"train {PAIR} --samples {{folder}}/none.jsonl", "There is no .*none.jsonl, and no --chats to make it from"),
    (f"train {PAIR} --samples {{text}}", "must end in .jsonl or .parquet"),
    (f"train {PAIR} --samples s.jsonl --chats {{folder}}/none.jsonl", "There is no file .*none.jsonl"),
    (f"train {PAIR} --samples {{lines}} --max_steps few", "Training arguments: argument --max_steps"),
    (f"train {PAIR} --samples {{lines}} --output_dir o --nope 1", "--nope"),
    (f"train {PAIR} --samples {{lines}} --output_dir o --stage tail", "`stage` must be one of"),
    ("export {drafter} {folder} --target acme/t", "which no export wrote"),
    ("export {drafter} {folder}/new --target acme/t --evaluation {text}", "is no JSON"),
    ("export {drafter} {folder}/new --target acme/t --record {text}", "is no JSON"),
    ("export {drafter} {folder}/new --target acme/t --record {drafter}/missing.json", "does not exist"),
    ("export {drafter} {folder}/new", "Missing option '--target'"),
    ("push {folder}/none acme/drafter", "(?i)dir.* '.*none' does not exist"),
    ("push {folder} acme/drafter", "is no exported folder"),
    ("push {folder} 'no name'", "is no name of a repository"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files, most of them wrong in one way."""
    folder = tmp_path_factory.mktemp("mistakes")
    pair = save_pair(folder, CHAT_TEMPLATE)
    (folder / "plain").mkdir()
    bare = save_pair(folder / "plain")
    tiny_drafter(hidden_size=64).save_pretrained(folder / "wide")
    files = {
        "text": ("notes.txt", "abc\n"),
        "lines": ("bad.jsonl", '{"prompt": "abc"}\n{"prompt": \n{"text": "abc"}\n{"messages": [{"role": "user"}]}\n'),
        "disguised": ("lines.txt", '{"prompt": "abc"}\n{"prompt": "def"}\n'),
        "no_json": ("lines.json", '{"prompt": "abc"}\n{"prompt": "def"}\n'),
        "object": ("object.json", '{"prompt": "abc"}'),
        "nothing": ("nothing.txt", "\n\n"),
    }
    for name, text in files.values():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("abc\nd\xe9f\n".encode("latin-1"))
    for name, config in (
        ("broken", "{"),
        ("hollow", (folder / "drafter" / "config.json").read_text()),
        ("empty", None),
    ):
        (folder / name).mkdir()
        if config is not None:
            (folder / name / "config.json").write_text(config)
    return {
        **{name.removeprefix("--"): place for name, place in pair.items()},
        "folder": folder,
        "bare": bare["--target"],
        "latin": folder / "latin.txt",
        **{name: folder / file for name, (file, _) in files.items()},
        **{name: folder / name for name in ("wide", "broken", "hollow", "empty")},
    }


def words(line: str, places: dict) -> list[str]:
    """Split a command line as a shell would."""
    return [word.format(**places) for word in shlex.split(line)]


@pytest.mark.parametrize(("line", "sentence"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_a_sentence(line, sentence, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = testing.CliRunner().invoke(app, words(line, places))
    assert result.exit_code == 2, result.output
    said = [text for text in result.stderr.splitlines() if not text.startswith("no --target and")]
    assert len(said) == 1 and re.search(sentence, said[0]), result.stderr
    assert "Traceback" not in result.output and "\x1b" not in result.output
    assert not list(tmp_path.iterdir()), "something was written"


def test_there_are_sixty():
    assert len({line for line, _ in MISTAKES}) >= 60


def test_debug_shows_the_traceback(places):
    for line in ("--debug inspect {empty}", "inspect {empty} --debug"):
        result = testing.CliRunner().invoke(app, words(line, places))
        assert result.exception is not None and not isinstance(result.exception, SystemExit)
    # Behind a `--` it is the user's own word.
    output = testing.CliRunner().invoke(app, words("inspect -- --debug", places)).output
    assert "--debug" in output


def test_knob_ranges_are_those_of_the_knobs():
    from typing import get_args

    from hf_treeflash.cli import options
    from hf_treeflash.knobs import INTEGERS, TEMPERATURES

    told = {
        "num_candidates": options.Candidates,
        "branching": options.Branching,
        "draft_window": options.DraftWindow,
    }
    for name, option in told.items():
        _, details = get_args(option)
        assert (details.min, details.max) == INTEGERS[name]
    _, details = get_args(options.DraftTemperature)
    assert (details.min, details.max) == TEMPERATURES
    assert options.tree_budget("2") == INTEGERS["tree_budget"][0]
    assert options.tree_budget("4096") == INTEGERS["tree_budget"][1]


def test_a_result_file_is_left_alone_until_there_is_a_result(places, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("precious")
    line = "bench {prompts} --target {target} --drafter {broken} --json " + str(kept)
    assert testing.CliRunner().invoke(app, words(line, places)).exit_code == 2
    assert kept.read_text() == "precious"
    new = tmp_path / "new.json"
    line = "bench {prompts} --target {target} --drafter {broken} --json " + str(new)
    assert testing.CliRunner().invoke(app, words(line, places)).exit_code == 2
    assert not new.exists()


def test_json_of_results_is_json(places):
    line = f"generate abc {PAIR} --max-new-tokens 5 --json"
    result = testing.CliRunner().invoke(app, words(line, places))
    assert json.loads(result.stdout)["settings"]["max_new_tokens"] == 5
