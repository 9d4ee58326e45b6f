"""What the README shows runs as it is printed."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_treeflash
from hf_treeflash.knobs import KNOB_DEFAULTS
from tests.helpers.pair_on_disk import CHAT_TEMPLATE, save_pair

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), CHAT_TEMPLATE)


def test_the_snippet_of_a_published_pair_prints_a_text(places, capsys):
    (code,) = (snippet for snippet in SNIPPETS if "Qwen/Qwen3-4B" in snippet)
    for name, place in (("Qwen/Qwen3-4B", "--target"), ("peerrh/treeflash-qwen3-4b", "--drafter")):
        assert f'"{name}"' in code
        code = code.replace(name, places[place])
    names: dict = {"hf_treeflash": hf_treeflash, "AutoTokenizer": AutoTokenizer}
    names["AutoModelForCausalLM"] = AutoModelForCausalLM
    exec(code.replace("512", "24"), names)
    assert len(capsys.readouterr().out.strip()) > 10
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 24


def test_the_knobs_snippet_shows_the_defaults():
    (shown,) = (snippet for snippet in SNIPPETS if "tree_budget" in snippet)
    values = dict(re.findall(r"generation_config\.(\w+) = (\S+)", shown))
    assert values == {name: str(value) for name, value in KNOB_DEFAULTS.items()}
