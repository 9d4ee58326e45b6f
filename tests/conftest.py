"""Seeded tests on tiny models built from configs; nothing is downloaded."""

import json
import os
from pathlib import Path

import pytest
import torch
from packaging.version import parse
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_treeflash

logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
GOLDEN_SMALL = Path(__file__).parent / "golden_small"
GOLDEN = Path(os.environ.get("HF_TREEFLASH_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def attaching_peft():
    """PEFT, if it is new enough for `model.add_adapter`: transformers says what it wants."""
    peft = pytest.importorskip("peft")
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if parse(peft.__version__) < parse(MIN_PEFT_VERSION):
        pytest.skip(f"attaching adapters needs peft {MIN_PEFT_VERSION} here, this is {peft.__version__}")
    return peft


@pytest.fixture(scope="session", params=["small", "trained on code"])
def golden_folder(request):
    """Each pair with reference outputs: the small one here, and a larger one beside the checkout; see the README."""
    folder = GOLDEN_SMALL if request.param == "small" else GOLDEN
    if not (folder / "golden.json").exists():
        pytest.skip(f"no reference pair at {folder} (set HF_TREEFLASH_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def golden(golden_folder):
    return json.loads((golden_folder / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_target(golden_folder):
    return AutoModelForCausalLM.from_pretrained(golden_folder / "target", dtype=torch.float32)


@pytest.fixture(scope="session")
def golden_drafters(golden_folder):
    """The official (with head) and the DFlash (without) drafter, by layout."""
    return {
        name: hf_treeflash.TreeFlashDraftModel.from_pretrained(golden_folder / f"drafter-{name}", dtype=torch.float32)
        for name in ("official", "dflash")
    }
