"""Targets in several places: split over two processes by tensor parallelism, or dispatched over devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.batches import padded
from tests.helpers.tiny import tiny_drafter, tiny_target, with_knobs
from tests.parallel.worker import CALLS

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]
REFUSED = {"eight bits": "`draft_lm_head`"}
FAMILIES = ["llama", "qwen3"]


def launch(folder: Path, output: Path, processes: int) -> list[dict]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    launcher = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    output.mkdir()
    done = subprocess.run(
        [*launcher, str(WORKER), str(folder), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module", params=FAMILIES)
def results(request, tmp_path_factory):
    """What one process saw, and what two saw that ran the target together."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_target(request.param).save_pretrained(folder / "target")
    (alone,) = launch(folder / "target", folder / "one", 1)
    return alone, launch(folder / "target", folder / "two", 2)


@pytest.mark.parametrize("drafters", ["drafted", "drafters apart"])
@pytest.mark.parametrize("call", CALLS)
def test_all_processes_write_the_text_of_one(results, drafters, call):
    alone, together = results
    for rank in together:
        text = rank[drafters][call]
        if call in REFUSED:
            assert REFUSED[call] in text and "tensor parallelism" in text
        else:
            assert torch.equal(text, alone["plain"][call]) and torch.equal(rank["plain"][call], text)


# The last layers elsewhere than the first; "disk" keeps weights away from the layer between passes.
MAPS = {
    "the last layers": {"model.layers.2": "disk", "model.layers.3": "disk", "model.norm": "disk"},
    "the output layer": {"lm_head": "disk"},
    "the embedding": {"model.embed_tokens": "disk"},
    "the layers that are tapped": {"model.layers.0": "disk", "model.layers.2": "disk"},
}


def device_map(elsewhere: dict) -> dict:
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    return dict.fromkeys([*parts, *(f"model.layers.{layer}" for layer in range(4))], "cpu") | elsewhere


@pytest.mark.parametrize("elsewhere", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_target_dispatched_over_devices(elsewhere, batch, tmp_path):
    pytest.importorskip("accelerate")
    whole = tiny_target()
    whole.save_pretrained(tmp_path / "target")
    settings = {**padded(batch), "do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 2}
    plain = whole.generate(**settings)
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", device_map=device_map(elsewhere), offload_folder=tmp_path / "away", dtype=torch.float32
    )
    for taps in ([0, 2], [1, 3]):
        drafter = with_knobs(tiny_drafter(target_layer_ids=taps), tree_budget=12)
        for static in ({}, {"cache_implementation": "static"}):
            assert torch.equal(plain, spread.generate(**settings, assistant_model=drafter, **static))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("last", ["cpu", 0])
def test_a_target_on_two_devices(last, tmp_path):
    whole = tiny_target()
    whole.save_pretrained(tmp_path / "target")
    first = 0 if last == "cpu" else "cpu"
    places = dict.fromkeys(device_map({}), first) | dict.fromkeys(["model.layers.3", "model.norm", "lm_head"], last)
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "target", device_map=places, dtype=torch.float32)
    settings = {**padded(3), "do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 2}
    plain = whole.generate(**settings)
    for device in ("cpu", "cuda"):
        drafter = with_knobs(tiny_drafter(), tree_budget=12).to(device)
        assert torch.equal(plain, spread.generate(**settings, assistant_model=drafter).cpu())
