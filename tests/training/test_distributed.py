"""Two gloo processes train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_treeflash import TreeFlashDraftModel

WORKER = Path(__file__).parent / "distributed_worker.py"
ROOT = Path(__file__).parents[2]


def launch(output: Path, processes: int, *modes: str) -> dict[str, dict]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(output), *modes], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {mode: torch.load(output / mode / "result.pt", weights_only=False) for mode in modes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one_process(folder):
    return launch(folder / "one", 1, "plain", "lora")


@pytest.fixture(scope="module")
def two_processes(folder):
    return launch(folder / "two", 2, "plain", "lora", "sharded")


@pytest.mark.parametrize("mode", ["plain", "lora", "sharded"])
def test_two_processes_equal_one(one_process, two_processes, mode):
    alone, together = one_process["plain" if mode == "sharded" else mode], two_processes[mode]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name], value, atol=1e-5, rtol=1e-4, msg=name)
    for name in ("accuracy", "candidate_recall", "eval_accuracy_slot_2", "eval_block_efficiency"):
        assert together["metrics"][name] == pytest.approx(alone["metrics"][name])


def test_the_first_process_saves_a_whole_drafter(two_processes, folder):
    checkpoint = folder / "two" / "plain" / "checkpoint-3"
    saved = TreeFlashDraftModel.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in two_processes["plain"]["weights"].items())
    assert (checkpoint / "command.txt").exists()
