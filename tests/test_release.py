"""What is released: names, metadata, and the files of wheel and sdist."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import hf_treeflash

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def test_the_package_shows_its_public_names_only():
    shown = {name for name in dir(hf_treeflash) if not name.startswith("__")}
    assert shown == set(hf_treeflash.__all__)
    assert all(getattr(hf_treeflash, name).__doc__ for name in shown)


def test_the_version_is_the_same_wherever_it_is_written():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.M) == [hf_treeflash.__version__]


def test_constraints_pin_one_version_a_line():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+(; .+)?", line) for line in lines)
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_the_workflow_runs_what_ci_runs():
    local = re.findall(r"^make (\S+)", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    hosted = re.search(r"target: \[(.+)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert hosted is not None and hosted[1].split(", ") == local


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist of the tracked files."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or newer")
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            os.makedirs((source / name).parent, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    for kind in ("build_sdist", "build_wheel"):
        subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, check=True)
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    package = ROOT / "src" / "hf_treeflash"
    modules = {f"hf_treeflash/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    assert modules <= names
    data = ("py.typed", "tiny/target/tokenizer.json", "tiny/prompts.json")
    assert {f"hf_treeflash/{name}" for name in data} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_treeflash"}
    assert f"Version: {hf_treeflash.__version__}" in metadata
    assert "Author: hf_treeflash developers" in metadata and "License-Expression: Apache-2.0" in metadata


def test_the_sdist_can_be_tested_and_measured(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    drafters = "drafters/smollm2-"  # 40 MB, from the repository or the Hub
    kept_back = {name for name in tracked.splitlines() if name.startswith((".git", drafters))}
    assert set(tracked.splitlines()) - kept_back <= names and not any(name.startswith(drafters) for name in names)
