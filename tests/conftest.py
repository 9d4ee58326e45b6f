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


@pytest.fixture(scope="session")
def golden():
    """The small real pair with reference outputs: a folder beside the checkout, not part of it."""
    if not (GOLDEN / "golden.json").exists():
        pytest.skip(f"no reference pair at {GOLDEN} (set HF_TREEFLASH_GOLDEN)")
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_target(golden):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "target", dtype=torch.float32)


@pytest.fixture(scope="session")
def golden_drafters(golden):
    """The official (with head) and the DFlash (without) drafter, by layout."""
    return {
        name: hf_treeflash.TreeFlashDraftModel.from_pretrained(GOLDEN / f"drafter-{name}", dtype=torch.float32)
        for name in ("official", "dflash")
    }
