"""What commands print and write, beyond that they run (`test_cli.py`)."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench import compare as comparing
from hf_treeflash.bench.answering import answer
from hf_treeflash.bench.arms import Arm
from tests.helpers.pair_on_disk import CHAT_TEMPLATE, save_pair
from tests.helpers.tiny import prompt

testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from rich.console import Console  # noqa: E402

from hf_treeflash.bench import progress as bars  # noqa: E402
from hf_treeflash.cli import app  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def models(places):
    target = AutoModelForCausalLM.from_pretrained(places["--target"], dtype=torch.float32)
    drafter = TreeFlashDraftModel.from_pretrained(places["--drafter"], dtype=torch.float32)
    return target, AutoTokenizer.from_pretrained(places["--target"]), drafter


def run(places, command, *words, code=0, **kwargs):
    pair = ["--target", places["--target"], "--drafter", places["--drafter"]]
    result = testing.CliRunner().invoke(app, [command, *pair, *map(str, words)], **kwargs)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ((), {}),
        (("--tree-budget", "auto"), {}),
        (("--tree-budget", "4", "--num-candidates", 2, "--branching", 3, "--draft-temperature", 2), {}),
        (("--draft-window", 4, "--lookup", 3), {}),
        (("--static",), {}),
        (("--plain",), {}),
        (("--show-draft",), {}),
        (
            ("--repetition-penalty", 1.3, "--no-repeat-ngram-size", 2),
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        ),
        (
            ("--temperature", 0.7, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--typical-p", 0.95, "--seed", 4),
            {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
        ),
    ],
)
def test_generate_writes_what_plain_generate_writes(words, settings, places, models):
    target, tokenizer, _ = models
    ids = tokenizer("abcde", return_tensors="pt").input_ids
    torch.manual_seed(4 if settings.get("do_sample") else 0)
    plain = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, **{"do_sample": False, **settings}
    )
    tokens = plain[0, ids.shape[1] :].tolist()
    printed = json.loads(run(places, "generate", "abcde", "--max-new-tokens", 14, "--json", *words).stdout)
    assert printed["token_ids"] == tokens
    assert printed["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert sum(printed["acceptance_lengths"]) == 13
    shown = run(places, "generate", "abcde", "--max-new-tokens", 14, *words).stdout
    assert shown.splitlines()[-1] == printed["text"]


def test_generate_reads_standard_input_and_stops_at_strings(places):
    whole = run(places, "generate", "--max-new-tokens", 14, input="abcde").stdout.strip()
    assert run(places, "generate", "-", "--max-new-tokens", 14, input="abcde").stdout.strip() == whole
    assert whole == run(places, "generate", "abcde", "--max-new-tokens", 14).stdout.strip()
    stop = next(sign for sign in re.sub("<.*?>", "", whole)[1:] if sign not in f"{whole[0]}bosepadmk")
    stopped = run(places, "generate", "abcde", "--max-new-tokens", 14, "--stop", stop).stdout.strip()
    assert stopped == whole[: whole.index(stop) + 1]


def test_generate_with_a_system_message_and_thinking(places, models):
    target, tokenizer, _ = models
    words = ("generate", "cd", "--system", "ab", "--thinking", "--max-new-tokens", 8)
    ids = tokenizer("abcdt", return_tensors="pt").input_ids
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert run(places, *words).stdout.strip() == tokenizer.decode(plain[0, 5:], skip_special_tokens=True)


def test_an_answer_is_timed_and_counted(models):
    target, _, drafter = models
    rounds = []
    result = answer(
        target, drafter, prompt(), on_round=lambda *told: rounds.append(told), max_new_tokens=15, do_sample=False
    )
    assert [token for tokens, _, _ in rounds for token in tokens] == result.token_ids
    assert [len(tokens) for tokens, _, _ in rounds[1:]] == result.acceptance_lengths
    assert rounds[-1][1] == pytest.approx(result.block_efficiency) and rounds[0][1] is None
    assert result.tokens_per_second > 0 and result.prompt_seconds > 0
    one = answer(target, None, prompt(), max_new_tokens=1, do_sample=False)
    assert one.block_efficiency is None and one.tokens_per_second is None and len(one.token_ids) == 1


def test_eval_reports_every_budget_and_its_exactness(places, tmp_path):
    record = tmp_path / "record.json"
    words = ("--tree-budget", 4, "--tree-budget", "auto", "--max-new-tokens", 8, "--limit", 1, "--json", record)
    shown = run(places, "eval", places["--prompts"], *words).stdout
    assert "tree B4" in shown and "tree Bauto" in shown and "n/a" in shown and "not timed" in shown
    (result,) = json.loads(record.read_text())["results"]
    assert [arm["name"] for arm in result["arms"]] == ["plain", "tree B4", "tree Bauto"]
    assert all(arm["identical"] and arm["speedup"] is None for arm in result["arms"])
    folder = tmp_path / "out"  # and a card takes it
    exported = testing.CliRunner().invoke(
        app, ["export", places["--drafter"], str(folder), "--target", "acme/target", "--evaluation", str(record)]
    )
    assert exported.exit_code == 0, exported.output
    assert "tree B4" in (folder / "README.md").read_text()


def interrupt_after(monkeypatch, count):
    """Raise KeyboardInterrupt in the call of `generate` after so many."""
    calls = []
    synchronize = comparing.synchronize

    def counted(*args):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        synchronize(*args)

    monkeypatch.setattr(comparing, "synchronize", counted)


def test_an_interrupted_bench_keeps_what_was_measured(places, tmp_path, monkeypatch):
    record = tmp_path / "record.json"
    words = ("--max-new-tokens", 6, "--repeats", 3, "--limit", 1, "--json", record, "--arms", "our chain")
    interrupt_after(monkeypatch, 2 * 2 + 3)  # two calls around each of two arms: in the second repeat
    result = run(places, "bench", places["--prompts"], *words, code=130)
    assert "interrupted: this is what had been measured" in result.stderr
    (kept,) = json.loads(record.read_text())["results"]
    assert kept["settings"]["repeats"] == 1 and kept["settings"]["interrupted"]
    assert [len(arm["speedup"]["all"]) for arm in kept["arms"]] == [1, 1]


def test_interrupted_before_the_second_arm_it_keeps_the_first(models):
    target, _, drafter = models

    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    arms = [Arm("plain"), Arm("tree", drafter)]
    settings = {"max_new_tokens": 6, "repeats": 1, "do_sample": False}
    kept = comparing.compare(target, arms, [prompt(), prompt(5)], progress=interrupt, **settings)
    assert [arm["name"] for arm in kept["arms"]] == ["plain"] and kept["settings"]["repeats"] == 0
    with pytest.raises(KeyboardInterrupt):
        comparing.compare(target, arms, [prompt()] * 4, progress=interrupt, **settings)


def test_check_prints_the_report(places):
    shown = run(places, "check", "--max-new-tokens", 8).stdout
    assert "same text" in shown and "3 of 3 greedy texts" in shown
    rows = json.loads(run(places, "check", "--max-new-tokens", 8, "--json").stdout)
    assert {"what", "found", "verdict"} == set(rows[0])


def test_check_says_no_with_exit_code_1(places, tmp_path):
    drafter = TreeFlashDraftModel.from_pretrained(places["--drafter"])
    drafter.config.target_layer_ids = [0, 9]
    drafter.config.num_target_layers = None
    drafter.save_pretrained(tmp_path)
    shown = run({**places, "--drafter": str(tmp_path)}, "check", code=1).stdout
    assert re.search(r"drafter fits target\s+no\s+The drafter reads target layer 9", shown)


def test_env_says_what_falls_back():
    result = testing.CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0 and "transformers" in result.stdout
    facts = {fact["what"]: fact for fact in json.loads(testing.CliRunner().invoke(app, ["env", "--json"]).stdout)}
    assert facts["torch"]["found"] == torch.__version__
    if not torch.cuda.is_available():
        assert facts["Triton kernels"]["found"] == "no" and "plain torch" in facts["Triton kernels"]["meaning"]


def test_a_reader_that_has_seen_enough_is_no_fault():
    code = "from hf_treeflash.__main__ import main; import sys; sys.argv = ['hf-treeflash', 'env', '--json']; main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_an_interrupted_text_ends_without_a_traceback(places, monkeypatch):
    from hf_treeflash.bench import answering

    def interrupted(*args, on_round, **kwargs):
        on_round([4, 5], None, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "answer", interrupted)
    assert run(places, "generate", "abc", code=130).stdout == "ab\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch, capsys, terminal):
    monkeypatch.setattr(bars, "SECONDS", 0)
    monkeypatch.setattr(bars, "Console", lambda stderr: Console(stderr=stderr, force_terminal=terminal))
    with bars.progress("texts") as tell:
        tell(3, 7)
    shown = capsys.readouterr().err
    assert ("3/7" in shown) == terminal and bool(shown.strip()) == terminal
