"""Help and version are there at once: neither torch nor transformers is imported for them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

testing = pytest.importorskip("typer.testing")
typer_main = pytest.importorskip("typer.main")
pytest.importorskip("rich")

from hf_treeflash.cli import app  # noqa: E402

COMMANDS = (
    *("demo", "chat", "generate", "bench", "eval", "check", "inspect", "trace", "env", "train", "export", "push"),
)
SECONDS = 3.0  # of CPU for all helps in one process; a loose bound, for a slow machine

PROBE = f"""
import json, runpy, sys, time
heavy = set()
for words in [["--help"], ["--version"], *([command, "--help"] for command in {COMMANDS}), ["generate", "--nope"]]:
    sys.argv = ["hf-treeflash", *words]
    try:
        runpy.run_module("hf_treeflash", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        assert end.code == (2 if "--nope" in words else 0), (words, end.code)
print(json.dumps([sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)), time.process_time()]))
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_help_imports_neither_torch_nor_transformers():
    # As the console script starts it, whose name is what keeps the package from registering itself.
    code = f"import sys; sys.argv = ['/anywhere/bin/hf-treeflash']\n{PROBE}"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    heavy, seconds = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert seconds < SECONDS


def test_the_module_starts_it_too():
    code = (
        "import sys, atexit\natexit.register(lambda: print(sorted({'torch', 'transformers'} & set(sys.modules))))\n"
        "import runpy; sys.argv = ['-m', '--version']; runpy.run_module('hf_treeflash', run_name='__main__')"
    )
    assert run_python("-c", code).stdout.splitlines()[-1] == "[]"
    done = run_python("-X", "importtime", "-m", "hf_treeflash", "--version")
    assert done.returncode == 0 and " torch\n" not in done.stderr and " transformers\n" not in done.stderr


def test_everybody_else_gets_the_package_registered():
    code = "import hf_treeflash, transformers; print(hasattr(transformers.GenerationMixin._assisted_decoding, '{}'))"
    assert run_python("-c", code.format("_before_treeflash")).stdout.strip() == "True"


def test_names_are_at_hand_behind_the_command_line_too():
    code = (
        "import sys; sys.argv = ['hf-treeflash']; import hf_treeflash\n"
        "assert 'torch' not in sys.modules\n"
        "from hf_treeflash import TreeFlashConfig, forget\n"
        "from transformers import AutoConfig; print(type(AutoConfig.for_model('treeflash')).__name__)"
    )
    assert run_python("-c", code).stdout.strip() == "TreeFlashConfig"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command):
    result = testing.CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and f"{command} [OPTIONS]" in " ".join(result.stdout.split())
    assert "\x1b" not in result.stdout


def test_without_a_command_there_is_help():
    result = testing.CliRunner().invoke(app, [])
    assert result.exit_code == 0 and all(command in result.stdout for command in COMMANDS)


def test_the_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None; sys.argv = ['hf-treeflash']\n"
    done = run_python("-c", f"{code}from hf_treeflash.__main__ import main; main()")
    assert done.returncode == 2 and "pip install 'hf-treeflash[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_training_arguments_are_listed():
    pytest.importorskip("accelerate")
    result = testing.CliRunner().invoke(app, ["train", "--arguments"])
    assert result.exit_code == 0 and "--stage" in result.stdout and "--max_steps" in result.stdout


def test_command_lines_of_the_readme_are_accepted():
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    lines = re.findall(r"^hf-treeflash (.+?)(?: +#.*)?$", text, flags=re.M)
    commands = typer_main.get_command(app).commands
    assert len(lines) >= 10
    for line in lines:
        name, *words = shlex.split(line)
        options = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= options, line
