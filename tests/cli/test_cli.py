"""Every command, once, on a tiny pair."""

import json
import subprocess
import sys

import pytest
import torch

from tests.helpers.pair_on_disk import CHAT_TEMPLATE, save_pair
from tests.helpers.tiny import tiny_drafter

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from hf_treeflash.bench import demo  # noqa: E402
from hf_treeflash.cli import app  # noqa: E402
from hf_treeflash.cli.train import load_drafter  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), CHAT_TEMPLATE)


def pair_options(places):
    return ["--target", places["--target"], "--drafter", places["--drafter"]]


def run(*arguments):
    result = typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code != 0:
        raise AssertionError(result.output) from result.exception
    return result.output


def test_generate(places):
    output = run("generate", *pair_options(places), "abc", "--max-new-tokens", 9, "--tree-budget", 4)
    assert "9 tokens, τ " in output


def test_bench_then_export_then_push(places, tmp_path):
    evaluation = tmp_path / "evaluation.json"
    output = run(
        *("bench", *pair_options(places), places["--prompts"], "--task", "letters", "--temperature", 0.8),
        *("--repeats", 1, "--max-new-tokens", 6, "--json", evaluation),
    )
    assert "TreeFlash tree B8 M16" in output
    assert json.loads(evaluation.read_text())["results"][0]["task"] == "letters"
    folder = tmp_path / "out"
    assert "custom_generate/generate.py" in run(
        "export", places["--drafter"], folder, "--target", "acme/target", "--evaluation", evaluation
    )
    assert "enable_thinking=False" in (folder / "README.md").read_text()
    output = run("push", folder, "acme/drafter", "--private", "--dry-run")
    assert "would upload" in output and "model.safetensors" in output


def test_vocabulary(places, tmp_path):
    samples = tmp_path / "samples.jsonl"
    texts = [[3, 3, 9, 7, 9, 9, 8, 8], [4, 3, 9, 9, 8, 6]]
    samples.write_text("".join(json.dumps({"input_ids": text, "prompt_length": 2}) + "\n" for text in texts))
    output = run("vocabulary", places["--drafter"], samples, tmp_path / "out", "--size", 2)
    assert "drafts 2 tokens, the most frequent ones of 10" in output and "hold 75.0% of the other" in output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["draft_vocab_size"] == 2
    assert "draft_vocab_size" in run("inspect", tmp_path / "out")
    assert "9 tokens, τ " in run(
        *("generate", "--target", places["--target"], "--drafter", tmp_path / "out"), "abc", "--max-new-tokens", 9
    )


def test_export_for_speculators(places, tmp_path):
    output = run("export", places["--drafter"], tmp_path, "--target", "acme/target", "--speculators")
    assert output.split() == ["README.md", "config.json", "model.safetensors"]


def test_demo_shows_stream_tree_and_table(places):
    output = run(
        "demo", *pair_options(places), "--prompts", places["--prompts"], "--max-new-tokens", 12, "--repeats", 1
    )
    assert "The target continues letters" in output and "the target's own" in output
    assert "The tree of one round" in output and "TreeFlash tree" in output and "yes" in output


def test_demo_shows_the_chat_model_where_its_drafter_is(places, monkeypatch, tmp_path):
    (tmp_path / demo.CHAT_DRAFTER).symlink_to(places["--drafter"])
    kinds = [{"kind": kind, "source": f"a {kind}", "prompt": "abcd"} for kind in ("chat", "chat", "code")]
    (tmp_path / demo.CHAT_PROMPTS).write_text(json.dumps(kinds))
    monkeypatch.setattr(demo, "CHAT", tmp_path)
    monkeypatch.setattr(demo, "smollm2", lambda: places["--target"])
    short = ("--max-new-tokens", 8, "--repeats", 1)
    output = run("demo", *short)
    assert output.count("The target continues a chat") == output.count("The target continues a code") == 1
    assert "a chat" not in run("demo", "--tiny", *short)

    def nowhere():
        raise RuntimeError("neither here nor there")

    monkeypatch.setattr(demo, "smollm2", nowhere)
    output = run("demo", *short)
    assert "Showing the embedded pair: neither here nor there" in output and "a chat" not in output


def test_demo_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "EMBEDDED", tmp_path / "none")
    result = typer_testing.CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2 and "no embedded pair" in result.output


def test_train(places, tmp_path):
    chats, samples = tmp_path / "chats.jsonl", tmp_path / "samples.jsonl"
    chats.write_text("\n".join(json.dumps({"prompt": text}) for text in ("abcd", "efgh", "ijkl")))
    run(
        *("train", *pair_options(places), "--chats", chats, "--samples", samples, "--max-new-tokens", 24),
        *("--eval-prompts", places["--prompts"], "--output_dir", tmp_path / "run", "--stage", "head"),
        *("--max_steps", 1, "--per_device_train_batch_size", 2, "--num_anchors", 4, "--report_to", "none"),
        *("--use_cpu", "--save_strategy", "no"),
    )
    assert len(samples.read_text().splitlines()) == 3
    assert {"model.safetensors", "command.txt"} < {path.name for path in (tmp_path / "run").iterdir()}


def test_train_gives_a_head_to_a_drafter_without(places, tmp_path):
    tiny_drafter(head=False).save_pretrained(tmp_path)
    head = {"ar_head": "markov", "head_rank": 4}
    config = load_drafter(str(tmp_path), torch.float32, head).config
    assert config.ar_head == "markov" and config.head_rank == 4
    assert load_drafter(str(tmp_path), torch.float32, {}).config.ar_head is None
    assert load_drafter(places["--drafter"], torch.float32, head).config.ar_head == "swiglu"


def test_the_package_alone_imports_no_extra():
    code = "import sys, hf_treeflash; print({'typer', 'rich', 'matplotlib', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
