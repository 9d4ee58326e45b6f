"""`hf-treeflash trace`."""

import json

import pytest

typer_testing = pytest.importorskip("typer.testing", reason="the command line is an extra")

from hf_treeflash.cli import app  # noqa: E402
from tests.helpers.pair_on_disk import save_pair  # noqa: E402


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    places = save_pair(tmp_path_factory.mktemp("pair"))
    return ["--target", places["--target"], "--drafter", places["--drafter"], "--max-new-tokens", "12"]


def test_it_writes_a_page_data_and_a_picture(pair, tmp_path):
    folder = tmp_path / "out"
    result = typer_testing.CliRunner().invoke(app, ["trace", "abcde", *pair, "-o", str(folder), "--picture", "1"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {"trace.html", "trace.json", "round.svg"}
    (text,) = json.loads((folder / "trace.json").read_text())["texts"]
    assert text["prompt"] == "abcde" and sum(len(round["emitted"]) for round in text["rounds"]) == 12


def test_a_folder_that_cannot_be_made_is_told_before_anything_loads(pair, tmp_path):
    (tmp_path / "file").write_text("")
    result = typer_testing.CliRunner().invoke(app, ["trace", "abcde", *pair, "-o", str(tmp_path / "file" / "in")])
    assert result.exit_code == 2
