"""`inspect`: what a drafter is, on every published layout, without loading a weight."""

import json
import re

import pytest
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_treeflash.hub import inspection
from hf_treeflash.hub.inspection import inspect_drafter
from tests.helpers.tiny import tiny_drafter, tiny_target
from tests.layouts.published import READ, REFUSED
from tests.layouts.rounds import make_target, write

testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from hf_treeflash.cli import app  # noqa: E402


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Weights cannot be loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


def run(*words):
    return testing.CliRunner().invoke(app, ["inspect", *map(str, words)])


@pytest.mark.parametrize("published", READ, ids=lambda published: published.name)
def test_layouts_that_are_read(published, tmp_path):
    folder = write(published, tmp_path / "d")
    make_target(published.target).config.save_pretrained(tmp_path / "target")
    found = inspect_drafter(str(folder), str(tmp_path / "target"))
    assert (
        found["read"]
        and found["refusal"] is None
        and found["fits"]
        == {
            "target": str(tmp_path / "target"),
            "fits": True,
            "reason": None,
        }
    )
    assert re.search("drafter", found["layout"])
    assert found["forward"]["block_size"] and found["sizes"]["parameters"] > 0
    assert set(found["knobs"]) >= {"tree_budget", "branching"}
    json.dumps(found)


@pytest.mark.parametrize("published", REFUSED, ids=lambda published: published.name)
def test_layouts_that_are_refused(published, tmp_path):
    folder = write(published, tmp_path / "d")
    result = run(folder)
    assert result.exit_code == 1, result.output
    assert re.search(published.refusal, " ".join(result.stdout.split()), re.S)
    found = json.loads(run(folder, "--json").stdout)
    assert found["read"] is False and re.search(published.refusal, found["refusal"], re.S)
    assert found["sizes"]["parameters"] > 0


def test_what_is_shown_of_a_reduced_vocabulary_and_of_windows(tmp_path):
    by_name = {published.name: published for published in READ}
    found = inspect_drafter(str(write(by_name["speculators, reduced vocabulary"], tmp_path / "a")))
    assert found["forward"]["draft_vocab_size"] == 16 and found["about"]["made for"] == "a/target"
    assert "vocabulary of 16 tokens" in found["layout"]
    found = inspect_drafter(str(write(by_name["ModelOpt SWA"], tmp_path / "b")))
    assert found["forward"]["window_rule"] == "context" and found["forward"]["sliding_window"] == 4
    found = inspect_drafter(str(write(by_name["Nemotron DFlash"], tmp_path / "c")))
    assert found["sizes"]["carried, not read"] == 2 * 24 * 32


def test_unknown_fields_are_part_of_the_report(tmp_path):
    published = next(one for one in READ if one.name == "DFlash").changed(surprise=3)
    found = inspect_drafter(str(write(published, tmp_path / "d")))
    assert found["read"] and len(found["warnings"]) == 1 and "`surprise`" in found["warnings"][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 64}, "its `hidden_size` is 32, the target's is 64"),
        ({"vocab_size": 2000}, "its `vocab_size` is 24"),
        ({"num_hidden_layers": 2}, "reads target layer 2"),
        ({"num_hidden_layers": 6}, "made for a target of 4 layers"),
    ],
)
def test_a_target_that_it_does_not_fit(changes, reason, tmp_path):
    tiny_drafter().save_pretrained(tmp_path / "d")
    tiny_target(**changes).config.save_pretrained(tmp_path / "t")
    result = run(tmp_path / "d", "--target", tmp_path / "t")
    assert result.exit_code == 1 and "does not fit" in result.stdout and reason in " ".join(result.stdout.split())


def test_our_own_layout_its_card_and_its_licence(tmp_path):
    drafter = tiny_drafter()
    drafter.generation_config.tree_budget = 12
    drafter.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: acme/target\n---\n# A drafter\n")
    (tmp_path / "LICENSE.txt").write_text("...")
    found = inspect_drafter(str(tmp_path))
    assert found["layout"] == "a hf_treeflash drafter" and found["knobs"]["tree_budget"] == 12
    assert found["about"] | {} == {
        "architectures": ["TreeFlashDraftModel"],
        "made for": "acme/target",
        "licence by its card": "apache-2.0",
        "licence file": ["LICENSE.txt"],
    }
    assert found["sizes"]["parameters"] == drafter.num_parameters()
    assert found["forward"]["ar_head"] == "swiglu" and found["forward"]["tokens drafted per pass"] == 7
    shown = run(tmp_path)
    assert shown.exit_code == 0 and "apache-2.0" in shown.stdout and "0, 2" in shown.stdout


def test_of_a_repository_only_headers_are_fetched(tmp_path, monkeypatch):
    tiny_drafter().save_pretrained(tmp_path)
    fetched = []

    class Headers:
        """What `get_safetensors_metadata` gives, from a file that is here."""

        def __init__(self, repository, revision=None):
            fetched.append((repository, revision))
            with safe_open(tmp_path / "model.safetensors", "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                self.tensors = {name: Header(one.get_shape(), one.get_dtype()) for name, one in slices.items()}
            self.files_metadata = {"model.safetensors": self}

    class Header:
        def __init__(self, shape, dtype):
            self.shape, self.dtype = shape, dtype

    def find(name, filename, hub):
        path = tmp_path / filename
        return str(path) if path.exists() and not filename.endswith(".safetensors") else None

    monkeypatch.setattr(inspection, "get_safetensors_metadata", Headers)
    monkeypatch.setattr(inspection, "find_file", find)
    monkeypatch.setattr("hf_treeflash.checkpoints.find_file", find)
    found = inspect_drafter("acme/drafter", revision="main")
    assert found["read"], found["refusal"]
    assert fetched == [("acme/drafter", "main")]


def test_every_layout_of_the_golden_pair(golden_folder):
    for layout, what in (("official", "an official TreeFlash drafter"), ("dflash", "a DFlash drafter")):
        result = run(golden_folder / f"drafter-{layout}", "--target", golden_folder / "target")
        assert result.exit_code == 0, result.output
        assert what in result.stdout and "fits" in result.stdout
        found = json.loads(run(golden_folder / f"drafter-{layout}", "--json").stdout)
        assert found["read"] and (found["forward"]["ar_head"] == "swiglu") is (layout == "official")


def test_the_embedded_pair():
    from hf_treeflash.cli.pair import EMBEDDED

    result = run(EMBEDDED / "drafter", "--target", EMBEDDED / "target")
    assert result.exit_code == 0, result.output
