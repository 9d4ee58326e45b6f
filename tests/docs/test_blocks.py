"""Every Python and shell block of README and documentation runs, or says what it needs."""

import dataclasses
import re
import runpy
import subprocess

import pytest

from tests.docs.blocks import PAGES, ROOT, blocks_of

pytest.importorskip("typer", reason="the command line is an extra")
RUN = [page for page in PAGES if any(b.language == "python" and b.needs is None for b in blocks_of(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # an empty directory
    names: dict = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.is_output:
            assert capsys.readouterr().out.strip() == block.code.strip(), f"{page.name}:{block.line}"
        elif block.language == "python" and block.needs is None:
            capsys.readouterr()
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_that_do_not_run_here_say_what_they_need(page):
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        assert block.language in {"python", "bash", "text", "bibtex"}, f"{where}: a block without a language"
        if block.language == "python":
            compile(block.code, where, "exec")
        elif block.language == "bash":
            assert block.needs, f"{where}: a shell block has no mark that says what it needs"
            subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)


def shell_lines() -> list[tuple[str, str]]:
    """Return where commands stand in shell blocks, and the commands, lines joined."""
    found = []
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "bash":
                lines = block.code.replace("\\\n", " ").splitlines()
                found += [(f"{page.name}:{block.line}", line.split("  #")[0].strip()) for line in lines]
    return found


def test_commands_of_shell_blocks_exist():
    import typer

    from hf_treeflash.cli import app

    commands = typer.main.get_command(app)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for where, line in shell_lines():
        words = line.split()
        if words[:1] == ["make"]:
            assert words[1] in targets, f"{where}: {line}"
        elif words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{where}: {line}"
        elif words[:1] == ["hf-treeflash"]:
            command = commands.commands[words[1]]  # type: ignore[attr-defined]
            known = {name for option in command.params for name in [*option.opts, *option.secondary_opts]}
            given = {word for word in words[2:] if word.startswith("--")} - {"--help"}
            if words[1] != "train":  # training arguments follow
                assert given <= known, f"{where}: {line}"


def test_options_of_example_scripts_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # one imports another
    asked: dict[str, set[str]] = {}
    for _, line in shell_lines():
        words = line.split()
        if words[:1] == ["python"] and words[1].startswith("examples/"):
            asked.setdefault(words[1], set()).update(word for word in words[2:] if word.startswith("--"))
    for script, options in asked.items():
        source = (ROOT / script).read_text(encoding="utf-8")
        names = runpy.run_path(str(ROOT / script)).values()
        classes = [value for value in names if isinstance(value, type) and dataclasses.is_dataclass(value)]
        known = {f"--{field.name}" for each in classes for field in dataclasses.fields(each)} | {"--help"}
        missing = {option for option in options - known if f'"{option}"' not in source}
        assert not missing, f"{script}: {missing}"
