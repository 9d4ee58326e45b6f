"""A push uploads what an export wrote and nothing else; an odd folder is refused before anything leaves."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hf_treeflash.hub import export_drafter, export_speculators, push
from hf_treeflash.hub.folder import MANIFEST
from tests.helpers.evaluations import make_evaluation
from tests.helpers.tiny import tiny_drafter, tiny_target

SECRET = "hf_" + "a1B2" * 9


@pytest.fixture
def hub(monkeypatch):
    """What reached the Hub: the repositories made, and the files of each upload with their bytes."""
    calls = {"made": [], "files": [], "deleted": []}

    def upload(self, *, repo_id, folder_path, allow_patterns, delete_patterns):
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        calls["files"].append({path.relative_to(folder_path).as_posix(): path.read_bytes() for path in paths})
        calls["deleted"] += delete_patterns
        assert sorted(calls["files"][-1]) == sorted(allow_patterns)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **kwargs: calls["made"].append((repo, kwargs)))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "out"
    export_drafter(tiny_drafter(), folder, target_id="acme/target")
    return folder


def test_a_push_uploads_the_bytes_that_were_written_and_a_dry_run_none(exported, hub):
    listed = push(exported, "acme/x", dry_run=True)
    assert hub["made"] == hub["files"] == []
    assert push(exported, "acme/x", private=True) == listed
    assert hub["made"] == [("acme/x", {"private": True, "exist_ok": True})]
    (uploaded,) = hub["files"]
    assert uploaded == {name: (exported / name).read_bytes() for name in listed}
    assert MANIFEST not in listed and {"evaluation.json", "acceptance.png"} <= set(hub["deleted"])


def test_the_card_may_be_edited_and_is_looked_at_again(exported, hub):
    card = exported / "README.md"
    card.write_text(card.read_text() + "\nMade with care.\n")
    push(exported, "acme/x")
    assert hub["files"][0]["README.md"].endswith(b"with care.\n")
    card.write_text(card.read_text() + f"\nMy token: {SECRET}\n")
    with pytest.raises(ValueError, match=r"README\.md, line \d+, holds an access token"):
        push(exported, "acme/x")
    assert len(hub["files"]) == 1


def spoil(exported: Path, name: str, content: bytes = SECRET.encode()) -> None:
    (exported / name).parent.mkdir(parents=True, exist_ok=True)
    (exported / name).write_bytes(content)


def link(exported: Path, name: str, target: Path) -> None:
    (exported / name).unlink(missing_ok=True)
    (exported / name).symlink_to(target)


ODD = {
    "environment file": (lambda out: spoil(out, ".env"), r"\.env, which the export did not write"),
    "settings": (lambda out: spoil(out, "run.yaml"), r"run\.yaml, which"),
    "log": (lambda out: spoil(out, "train.log"), r"train\.log, which"),
    "optimizer": (lambda out: spoil(out, "optimizer.pt"), r"optimizer\.pt, which"),
    "harmless text": (lambda out: spoil(out, "notes.md", b"fine"), r"notes\.md, which"),
    "hidden folder": (lambda out: spoil(out, ".git/config"), r"\.git/config, which"),
    "cache folder": (lambda out: spoil(out, ".cache/huggingface/token"), r"\.cache/huggingface/token, which"),
    "checkpoint": (lambda out: spoil(out, "checkpoint-5/model.safetensors"), r"checkpoint-5/model\.safetensors"),
    "compiled code": (lambda out: spoil(out, "custom_generate/__pycache__/generate.pyc"), r"generate\.pyc, which"),
    "stale evaluation": (lambda out: spoil(out, "evaluation.json", b"{}"), r"evaluation\.json, which"),
    "a second shard": (lambda out: spoil(out, "model-00002-of-00002.safetensors"), "model-00002-of-00002"),
    "changed weights": (lambda out: spoil(out, "model.safetensors"), r"access token|was changed"),
    "changed config": (lambda out: spoil(out, "config.json", b"{}"), r"config\.json was changed"),
    "changed code": (
        lambda out: spoil(out, "modeling_treeflash.py", b"print()"),
        r"modeling_treeflash\.py was changed",
    ),
    "lost file": (lambda out: (out / "config.json").unlink(), r"lacks config\.json"),
    "linked file": (lambda out: link(out, "README.md", out.parent / "secret"), r"README\.md is a link"),
    "linked folder": (lambda out: link(out, "more", out.parent), "more is a link"),
    "dangling link": (lambda out: link(out, "config.json", out.parent / "nowhere"), r"config\.json is a link"),
    "pipe": (lambda out: os.mkfifo(out / "pipe"), "pipe is a link or no plain file"),
    "no list": (lambda out: (out / MANIFEST).unlink(), "no exported folder"),
    "broken list": (lambda out: spoil(out, MANIFEST, b"["), "cannot be read"),
    "empty list": (lambda out: spoil(out, MANIFEST, b'{"files": {}}'), "which the export did not write"),
    "list of a list": (lambda out: spoil(out, MANIFEST, b'{"files": ["README.md"]}'), "cannot be read"),
    "list that leads out": (
        lambda out: spoil(out, MANIFEST, json.dumps({"files": {"../secret": ""}}).encode()),
        "which the export did not write",
    ),
}


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("parent", ["plain", ".cache"])
def test_an_odd_folder_is_refused_before_anything_leaves(tmp_path, hub, change, message, parent):
    folder = tmp_path / parent / "out"
    export_drafter(tiny_drafter(), folder, target_id="acme/target")
    (folder.parent / "secret").write_text(SECRET)
    change(folder)
    with pytest.raises(ValueError, match=message):
        push(folder, "acme/x")
    assert hub["made"] == hub["files"] == []


def test_a_missing_folder_a_file_and_a_targets_folder_are_refused(tmp_path, hub):
    with pytest.raises(ValueError, match="There is no folder"):
        push(tmp_path / "missing", "acme/x")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="There is no folder"):
        push(tmp_path / "file", "acme/x")
    tiny_target().save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="no exported folder"):
        push(tmp_path / "target", "acme/x")
    assert hub["made"] == []


def test_a_link_to_a_folder_is_refused(exported, tmp_path, hub):
    (tmp_path / "link").symlink_to(exported)
    with pytest.raises(ValueError, match="is a link"):
        push(tmp_path / "link", "acme/x")
    with pytest.raises(ValueError, match="is a link"):
        export_drafter(tiny_drafter(), tmp_path / "link", target_id="acme/target")


def test_what_is_uploaded_is_what_was_checked(exported, hub, monkeypatch):
    """A file that changes between the check and the upload does not get through."""

    def create_repo(self, repo, **kwargs):
        (exported / "README.md").write_text(SECRET)
        spoil(exported, ".env")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    push(exported, "acme/x")
    (uploaded,) = hub["files"]
    assert not any(SECRET.encode() in content for content in uploaded.values()) and ".env" not in uploaded


def test_a_second_export_leaves_nothing_of_the_first(tmp_path):
    evaluation = make_evaluation()
    command = tmp_path / "command.txt"
    command.write_text("python train.py")
    arguments = {"target_id": "acme/target", "evaluation": evaluation, "command": command}
    first = export_drafter(tiny_drafter(), tmp_path / "out", **arguments)
    assert {"evaluation.json", "command.txt"} < set(first)
    second = export_drafter(tiny_drafter(), tmp_path / "out", target_id="acme/target")
    assert not {"evaluation.json", "command.txt", "acceptance.png"} & set(second)
    assert push(tmp_path / "out", "acme/x", dry_run=True) == second
    third = export_speculators(tiny_drafter(), tmp_path / "out", "acme/target")
    assert push(tmp_path / "out", "acme/x", dry_run=True) == third == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["notes.md", "model.safetensors", ".env", "checkpoint-5/optimizer.pt"])
def test_an_export_goes_to_no_folder_that_holds_anything_else(tmp_path, name):
    spoil(tmp_path / "out", name, b"mine")
    with pytest.raises(ValueError, match=f"{name}, which no export wrote"):
        export_drafter(tiny_drafter(), tmp_path / "out", target_id="acme/target")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(name).name]
    assert (tmp_path / "out" / name).read_bytes() == b"mine"


def test_an_export_writes_through_no_link(exported, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for make in (Path.symlink_to, Path.hardlink_to):
        (exported / "README.md").unlink()
        make(exported / "README.md", tmp_path / "mine")
        try:
            export_drafter(tiny_drafter(), exported, target_id="acme/target")
        except ValueError as error:
            assert "is a link" in str(error)
        assert (tmp_path / "mine").read_text() == "mine"


def test_an_export_that_is_refused_leaves_the_earlier_one_as_it_was(exported, tmp_path):
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    command = tmp_path / "command.txt"
    command.write_text(f"python train.py --hub_token {SECRET}")
    with pytest.raises(ValueError, match=r"holds an access token"):
        export_drafter(tiny_drafter(), exported, target_id="acme/target", command=command)
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command.txt", "out"]


@pytest.mark.parametrize("where", ["config", "generation_config", "evaluation", "license"])
def test_credentials_and_paths_in_what_an_export_is_made_from_are_found(tmp_path, where):
    drafter, fields = tiny_drafter(), {"target_id": "acme/target"}
    if where == "config":
        drafter.config.note = SECRET
    elif where == "generation_config":
        drafter.generation_config._from = "/home/someone/run"
    elif where == "evaluation":
        fields["evaluation"] = {**make_evaluation(), "/home/someone/run": 1}
    else:
        fields["license"] = SECRET
    with pytest.raises(ValueError, match="must not be published"):
        export_drafter(drafter, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()
