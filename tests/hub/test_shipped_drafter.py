"""The drafter in `drafters/`: whole, small enough, exact on its target, and described by its own evaluation."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench import models
from hf_treeflash.bench.pairs import encode_prompt
from hf_treeflash.hub.evaluation import read_evaluation

FOLDER = Path(__file__).parents[2] / "drafters" / "smollm2-135m-instruct-treeflash"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the drafter comes with a checkout alone")
MISSING = [name for name in ("gguf", models.WHEEL) if importlib.util.find_spec(name) is None]


def test_files():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 40e6
    with safe_open(weights, "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert dtypes <= {"BF16", "I64"}
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["draft_vocab_size"] == 8192 and config["num_target_layers"] == 30
    record = json.loads((FOLDER / "training_record.json").read_text())
    assert record["steps"] > 1000 and record["log"][-1]["loss"] < record["log"][0]["loss"]


def test_the_card_says_what_the_evaluation_found():
    evaluation, card = read_evaluation(FOLDER / "evaluation.json"), (FOLDER / "README.md").read_text("utf-8")
    for result in evaluation["results"]:
        assert all(arm["identical"] for arm in result["arms"] if arm["promises_text"])
        tree = next(arm for arm in result["arms"] if arm["name"] == "TreeFlash tree B16 M8")
        assert f"{tree['tau']:.2f}" in card


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_texts():
    folder = models.smollm2()
    target, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    drafter = TreeFlashDraftModel.from_pretrained(FOLDER, dtype=torch.float32)
    ids = encode_prompt(tokenizer, "Write a Python function that reverses a string, and explain it.")
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 0}):
        texts = []
        for assistant in (None, drafter):
            torch.manual_seed(5)
            output = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=assistant,
                max_new_tokens=32,
                return_dict_in_generate=True,
                **sampling,
            )
            texts.append(output.sequences)
        assert torch.equal(*texts) and output.block_efficiency > 1.5
