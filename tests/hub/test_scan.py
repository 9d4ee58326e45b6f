"""Credentials and machine paths are found wherever they stand in a file; what only looks like one is let through."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_treeflash.hub.scan import check_file, check_text, without_paths

TOKENS = {
    "Hugging Face": "hf_" + "a1B2" * 9,
    "Hugging Face, of an organisation": "api_org_" + "a1B2" * 9,
    "AWS": "AKIA" + "A1B2" * 4,
    "AWS, for a session": "ASIA" + "A1B2" * 4,
    "Google": "AIza" + "a1-_B" * 7,
    "OpenAI": "sk-proj-" + "a1B2" * 9,
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitHub, fine-grained": "github_pat_" + "a1B2" * 9,
    "GitLab": "glpat-" + "a1B2" * 5,
    "PyPI": "pypi-" + "a1B2" * 12,
    "npm": "npm_" + "a1B2" * 9,
    "Slack": "xoxb-" + "1234-" * 4,
    "JWT": "eyJ" + "a1B2" * 4 + ".eyJ" + "a1B2" * 4 + ".a1B2",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}
NAMED = {
    "environment": "WANDB_API_KEY=0123456789abcdef0123",
    "JSON": '{"password": "a-long-passw0rd-of-mine"}',
    "option": "python train.py --hub_token abcd1234abcd1234abcd",
    "URL": "https://someone:hunter2@example.org/simple",
}
PATHS = {
    "POSIX": "model = '/home/someone/model'",
    "POSIX, any root": "see /srv/models/target for it",
    "after an option's letter": "gcc -L/home/someone/lib",
    "after a colon": "cache:/mnt/disk/cache",
    "with a blank": '"/data/Jane Doe/model"',
    "of another alphabet": "/домой/кто-то/модель",
    "with percent signs": "/data/run%201/out",
    "file URL": "file:///home/someone/model",
    "file URL, short": "file:/home/someone/model",
    "Windows": r"C:\Users\someone\model",
    "Windows in JSON": r'"C:\\Users\\someone"',
    "Windows with slashes": "D:/models/target",
    "Windows share": r"\\server\share\models",
    "beside a URL": "https://hf.co/a/b /data/run/x",
}
HARMLESS = {
    "URL": "https://huggingface.co/home/models/a/b",
    "fractions": "yes/no/maybe, tokens/s, 1/2/3",
    "relative path": "src/hf_treeflash/tiny and ./out/run",
    "closing tags": "</b></i> and <br/>",
    "repository": "Qwen/Qwen3-4B",
    "words": "a token, the password, api_key=None, mask_token = '<mask>'",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "knobs": '{"num_assistant_tokens_schedule": "constant", "mask_token_id": 151669}',
}


@pytest.mark.parametrize("text", [*TOKENS.values(), *NAMED.values()], ids=[*TOKENS, *NAMED])
def test_credentials_are_found(tmp_path, text):
    (tmp_path / "notes.md").write_text(f"fine\n  {text}\n")
    with pytest.raises(ValueError, match=r"^notes\.md, line 2, holds (an access token|what looks like a secret)"):
        check_file(tmp_path / "notes.md", "notes.md")


@pytest.mark.parametrize("text", PATHS.values(), ids=PATHS)
def test_machine_paths_are_found(text):
    with pytest.raises(ValueError, match="line 2, holds an absolute path"):
        check_text(f"fine\n{text}\n".encode(), "notes.md")


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS)
def test_what_only_looks_like_one_is_let_through(text):
    check_text(text.encode(), "notes.md")
    assert without_paths(text) == text


@pytest.mark.parametrize("text", [*TOKENS.values(), "/home/someone/model", r"C:\Users\someone"])
def test_weights_are_looked_at_byte_for_byte(tmp_path, text):
    data = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    data[2000 : 2000 + len(text)] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file({"weight": data}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"byte \d+, holds an (access token|absolute path)"):
        check_file(tmp_path / "model.safetensors", "model.safetensors")


@pytest.mark.parametrize("start", [2**24 - 300, 2**24 - 5, 2**24 + 1])
def test_weights_are_looked_at_across_the_parts_they_are_read_in(tmp_path, start):
    text = TOKENS["Hugging Face"].encode()
    (tmp_path / "big.png").write_bytes(b"\0" * start + text + b"\0" * 5000)
    with pytest.raises(ValueError, match=f"byte {start}, holds an access token"):
        check_file(tmp_path / "big.png", "big.png")


def test_weights_by_themselves_are_no_secret(tmp_path):
    save_file({"weight": torch.randn(200_000)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_file(tmp_path / "model.safetensors", "model.safetensors")


def test_the_header_of_weights_is_a_text(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"from": "/data/someone/run"})
    with pytest.raises(ValueError, match="absolute path"):
        check_file(tmp_path / "a.safetensors", "a.safetensors")


def test_what_is_no_text_cannot_be_checked(tmp_path):
    (tmp_path / "notes.md").write_bytes("token".encode("utf-16"))
    with pytest.raises(ValueError, match="no text in UTF-8"):
        check_file(tmp_path / "notes.md", "notes.md")
    (tmp_path / "empty.md").touch()
    check_file(tmp_path / "empty.md", "empty.md")


SHORTENED = {
    "/home/someone/models/target": "target",
    "/home/someone/models/target/": "target",
    "/data/Jane Doe/my models": "my models",
    r"C:\Users\someone\model": "model",
    r"\\server\share\models": "models",
    "/home/someone": "~",
    r"C:\Users\someone": "~",
    "python /home/someone/train.py --output=/data/run 2>/data/logs/err": "python train.py --output=run 2>err",
    "python train.py --data '/data/my files/x.jsonl'": "python train.py --data 'x.jsonl'",
    r"python train.py --data /data/my\ files/x.jsonl": "python train.py --data x.jsonl",
    "file:///home/someone/model, then https://hf.co/a/b": "model, then https://hf.co/a/b",
}


@pytest.mark.parametrize(("text", "short"), SHORTENED.items())
def test_paths_are_shortened_to_their_last_part(text, short):
    assert without_paths(text) == short
    check_text(without_paths(text).encode(), "command.txt")


def test_shortening_keeps_every_field():
    record = {
        "target": {"id": "file:///home/someone/target", "revision": None},
        "compact": json.dumps({"a": "file:///x/y", "b": 2}, separators=(",", ":")),
        "tau": 3.5,
        "ways": ["/a/b/c", {"path": r"C:\a\b", "next": True}],
        "/not/a/value": 1,
    }
    short = without_paths(record)
    assert short == {
        "target": {"id": "target", "revision": None},
        "compact": '{"a":"y","b":2}',
        "tau": 3.5,
        "ways": ["c", {"path": "b", "next": True}],
        "/not/a/value": 1,
    }
