"""Answers of a server that runs the target; the server is a real `transformers serve` on this machine."""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_treeflash.training import ask_endpoint, chat_prompts, regenerate, text_prompts
from hf_treeflash.training.endpoint import sample_of

from .conftest import SHAPE

MISSING = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if importlib.util.find_spec(name) is None]
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"`transformers serve` needs {', '.join(MISSING)}")


@pytest.fixture
def chats(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 7} w{2 * i}"}) + "\n" for i in range(5, 12)))
    return chat_prompts(tokenizer, file, enable_thinking=False)


@pytest.fixture
def llama():
    """A target of a family whose answers `transformers serve` does not parse."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, initializer_range=0.3, eos_token_id=0, pad_token_id=0, **SHAPE)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def server(llama, tokenizer, tmp_path):
    """Serve the target; gives the address and what the server calls it."""
    llama.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    name, address = str(tmp_path / "target"), f"http://localhost:{port}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name, "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32"]
    with open(tmp_path / "server.log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for(f"{address}/health", process)
            yield f"{address}/v1", name
        finally:
            process.terminate()


def wait_for(address: str, process, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not start")


@needs_server
def test_a_server_answers_as_the_target_does(server, llama, tokenizer, chats, tmp_path):
    url, model = server
    options = {"model": model, "enable_thinking": False, "batch_size": 3, "max_tokens": 12, "temperature": 0.0}
    answers = ask_endpoint(url, tokenizer, chats, tmp_path / "asked.jsonl", **options)
    expected = regenerate(llama, tokenizer, chats, tmp_path / "own.jsonl", batch_size=1, max_new_tokens=12)
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    shown = [{**row, "input_ids": without(row, special)} for row in expected]  # which servers leave out of the text
    assert answers == shown and any(len(row["input_ids"]) > row["prompt_length"] + 4 for row in answers)
    with pytest.raises(RuntimeError, match=r"refused: 4\d\d"):
        ask_endpoint(url, tokenizer, chats, tmp_path / "other.jsonl", **options, no_such_field=1)


def without(row: dict, special: set[int]) -> list[int]:
    start = row["prompt_length"]
    return row["input_ids"][:start] + [token for token in row["input_ids"][start:] if token not in special]


def test_what_no_server_can_answer_is_named(tokenizer, chats, tmp_path):
    options = {"model": "model", "enable_thinking": False}
    with pytest.raises(RuntimeError, match=r"cannot be reached.*Is the server running"):
        ask_endpoint("http://localhost:1/v1", tokenizer, chats, tmp_path / "a.jsonl", **options)
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8")
    text = text_prompts(tokenizer, [tmp_path / "text.txt"], length=2, stride=2)
    with pytest.raises(ValueError, match="plain text"):
        ask_endpoint("http://localhost:1/v1", tokenizer, text, tmp_path / "b.jsonl", **options)
    choice = {"message": {"content": "w5", "reasoning_content": "w6"}, "finish_reason": "stop"}
    with pytest.raises(RuntimeError, match="reasoning parser"):
        sample_of(tokenizer, chats[0], choice)
    cut, whole = (
        sample_of(tokenizer, chats[0], {"message": {"content": "w5 w6"}, "finish_reason": reason})["input_ids"]
        for reason in ("length", "stop")
    )
    assert whole == [*cut, tokenizer.eos_token_id] and cut[-2:] == [5, 6]
