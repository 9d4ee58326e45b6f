"""The training examples, on a tiny pair."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.hub import push

from .conftest import make_drafter, make_target


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    loaded = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - loaded:
        if name.startswith("train_") or name in ("finetune_lora", "export_trained"):
            del sys.modules[name]


@pytest.fixture
def pair(tmp_path):
    """Arguments that name a tiny target with a tokenizer, a drafter and a text."""
    words = {"<end>": 0, "<mask>": 1, **{f"w{i}": i for i in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make_target().save_pretrained(tmp_path / "target")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(
        tmp_path / "target"
    )
    make_drafter(trained=True).save_pretrained(tmp_path / "drafter")
    (tmp_path / "text.txt").write_text(" ".join(f"w{2 + i * 7 % 62}" for i in range(400)))
    options = {"target": "target", "drafter": "drafter", "text": "text.txt", "output_dir": "out"}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(tmp_path / value))]
    numbers = {"prompt_length": 8, "eval_prompts": 2, "max_new_tokens": 12, "eval_max_new_tokens": 6, "max_steps": 2}
    numbers |= {"num_anchors": 3, "tree_budget": 8, "per_device_train_batch_size": 2}
    arguments += [part for key, value in numbers.items() for part in (f"--{key}", str(value))]
    return [*arguments, "--report_to", "none", "--use_cpu"]


@pytest.mark.parametrize("head", ["markov", "selector"])
def test_train_a_head_of_token_vectors(example, pair, tmp_path, head):
    headless = make_drafter(head=False)
    headless.save_pretrained(tmp_path / "drafter")
    example("train_drafter").main([*pair, "--stage", "head", "--ar_head", head, "--head_rank", "4"])
    trained = TreeFlashDraftModel.from_pretrained(tmp_path / "out")
    assert (trained.config.ar_head, trained.config.head_rank) == (head, 4)
    assert trained.ar_head.following.weight.any()
    # One that has a head keeps it.
    example("train_drafter").main([*pair, "--stage", "head", "--drafter", str(tmp_path / "out")])
    assert TreeFlashDraftModel.from_pretrained(tmp_path / "out").config.ar_head == head


@pytest.mark.parametrize("stage", ["head", "backbone"])
def test_train_drafter(example, pair, tmp_path, stage, capsys):
    if stage == "backbone":  # from scratch
        at = pair.index("--drafter")
        pair = [*pair[:at], *pair[at + 2 :], "--mask_token_id", "1", "--layers", "2", "--block_size", "4"]
    figures = example("train_drafter").main([*pair, "--stage", stage])
    assert figures["before"] >= 1.0 and figures["after"] >= 1.0
    assert "block efficiency at tree budget 8, 2 held-out prompts" in capsys.readouterr().out
    trained = TreeFlashDraftModel.from_pretrained(tmp_path / "out")
    assert (trained.ar_head is None) == (stage == "backbone")
    assert (tmp_path / "out" / "responses.jsonl.provenance.json").exists()


def test_train_drafter_from_nothing_and_from_samples(example, pair, tokenizer, tmp_path, capsys):
    """A chat target writes its own prompts; a second run reads what the first one made."""
    tokenizer.save_pretrained(tmp_path / "target")
    at = pair.index("--text")
    pair = [*pair[:at], *pair[at + 2 :], "--loss_vocabulary", "20", "--target_states", str(tmp_path / "states")]
    module = example("train_drafter")
    module.main([*pair, "--self_prompts", "6", "--generate_batch_size", "4"])
    prompts, responses = (tmp_path / "out" / f"{name}.jsonl" for name in ("prompts", "responses"))
    assert len(responses.read_text().splitlines()) == 8 <= len(prompts.read_text().splitlines())
    module.main([*pair, "--samples", str(responses), str(responses), "--output_dir", str(tmp_path / "again")])
    assert not (tmp_path / "again" / "responses.jsonl").exists()
    assert capsys.readouterr().out.count("2 held-out prompts") == 2
    samples = [{"input_ids": [i % 3, 5, i], "prompt_length": 2} for i in range(9)]
    training, evaluation, held_out = module.split(samples, 2)
    assert held_out == [[0, 5], [1, 5]] and evaluation == samples[:2] and training == samples[2::3]
    with pytest.raises(ValueError, match="Name the data"):
        module.main([*pair, "--output_dir", str(tmp_path / "none")])


def test_a_checkpoint_is_exported_with_its_record(example, pair, tmp_path):
    example("train_drafter").main([*pair, "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"])
    folder, options = tmp_path / "shipped", ["--target", "acme/target", "--tree_budget", "8", "--license", "mit"]
    arguments = [str(tmp_path / "out" / "checkpoint-2"), str(folder), *options]
    files = example("export_trained").main(arguments)
    assert example("export_trained").main(arguments) == files  # in its own place
    assert {"README.md", "model.safetensors", "training_record.json"} <= set(files)
    assert push(folder, "acme/treeflash-target", dry_run=True) == files
    record = json.loads((folder / "training_record.json").read_text())
    assert record["steps"] == 2 and [entry["step"] for entry in record["log"]] == [1, 2]
    shipped = TreeFlashDraftModel.from_pretrained(folder, dtype="auto")
    assert shipped.dtype == torch.bfloat16 and shipped.generation_config.tree_budget == 8


def test_train_smollm2_in_a_given_time(example, pair, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "target")
    options = {"target": tmp_path / "target", "output_dir": tmp_path / "smollm2", "data_minutes": 0.01}
    options |= {"train_minutes": 0.03, "generate_batch_size": 4, "max_new_tokens": 12, "eval_max_new_tokens": 6}
    options |= {"eval_prompts": 2, "layers": 2, "block_size": 4, "target_layer_ids": 2, "mask_token_id": 1}
    options |= {"loss_vocabulary": 20, "draft_vocabulary": 24, "warmup_steps": 1, "logging_steps": 1, "num_anchors": 3}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert example("train_smollm2").main([*arguments, "--use_cpu"]) >= 1.0
    made = sorted(path.name for path in (tmp_path / "smollm2" / "data").glob("*.jsonl"))
    assert {"greedy_0.jsonl", "prompts.jsonl", "sampled_0.jsonl"} <= set(made)
    log = json.loads((tmp_path / "smollm2" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert len(rates) > 1 and rates == sorted(rates, reverse=True) and rates[-1] < 0.7 * rates[0]
    config = TreeFlashDraftModel.from_pretrained(tmp_path / "smollm2").config
    assert config.target_layer_ids == [2] and config.draft_vocab_size == 24
    options = {**options, "train_minutes": 0, "output_dir": tmp_path / "data", "seed": 5}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert example("train_smollm2").main([*arguments, "--use_cpu"]) == 0.0  # data alone
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"data"}
    texts = [(tmp_path / name / "data" / "prompts.jsonl").read_text() for name in ("data", "smollm2")]
    assert texts[0] != texts[1]


def test_finetune_lora(example, pair, tmp_path):
    figures = example("finetune_lora").main([*pair, "--rank", "4", "--base_id", str(tmp_path / "drafter")])
    assert figures["before"] >= 1.0
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is TreeFlashDraftModel


def test_train_tiny_pair(example, tmp_path, monkeypatch, capsys):
    target, pair = example("train_tiny_target"), example("train_tiny_pair")
    training, held_out = target.standard_library()
    assert not set(training) & set(held_out) and len(training) > 10 * len(held_out) > 0
    for module in (target, pair):
        monkeypatch.setattr(module, "standard_library", lambda: (training[:12], held_out[:3]))
    monkeypatch.setattr(pair, "KNOBS", [(8, 4)])
    numbers = {"vocab-size": 300, "target-steps": 2, "batch-tokens": 512, "unlikelihood-steps": 1, "greedy": 2}
    numbers |= {"sampled": 1, "text": 4, "new-tokens": 4, "shared-steps": 2, "last-steps": 1, "batch-size": 2}
    numbers |= {"anchors": 2, "eval-prompts": 1, "eval-tokens": 3}
    arguments = [part for key, value in numbers.items() for part in (f"--{key}", str(value))]
    arguments += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "tiny")]
    record = pair.main(arguments)
    assert set(record["stages"]) == {"shared", "marginal", "treeflash"}
    assert record["held_out"]["knobs"][0]["identical"]
    loaded = AutoModel.from_pretrained(tmp_path / "tiny" / "drafter")
    assert loaded.ar_head is not None and loaded.generation_config.num_candidates == 4
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == {
        "target", "drafter", "training_record.json", "prompts.json"
    }  # fmt: skip
    assert pair.main(arguments)["stages"] == record["stages"]  # everything is resumed from disk


def test_repetition_is_counted_by_4_grams(example):
    target = example("train_tiny_target")
    assert target.ends_repeated_gram([1, 2, 3, 4, 1, 2, 3, 4, 5]) == [False] * 7 + [True, False]
    assert target.distinct_fraction([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2]]) == 2 / 5
