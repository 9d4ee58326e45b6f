"""Whatever stands in a file, reading it ends soon: in the right text, or in an error that names file and field."""

import copy
import json
import random
import time

import pytest
import torch

from hf_treeflash.knobs import KNOB_DEFAULTS
from tests.helpers.tiny import prompt
from tests.layouts.published import FULL, READ, SLIDING
from tests.layouts.rounds import load, make_target, write

CASES, SEED, LONGEST = 520, 17, 5.0  # seconds
VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 10**9, 10**18, 2**63, -(2**63), 0.5, -0.5, 1e-300, 1e308]
VALUES += [
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "float8",
    "auto",
    "bfloat16",
    [],
    [0],
    [-1],
    [0, 2, 4],
    [10**9] * 3,
]
VALUES += [["x"], [FULL, SLIDING], [SLIDING] * 2, [None], [[1]], {}, {"a": 1}, {"rope_type": "yarn"}, {"rope_type": 3}]
VALUES += [{"rope_type": "dynamic", "factor": 0}, {"rope_type": "llama3", "factor": 2.0}, {FULL: {"rope_theta": 1}}]
MORE = [
    "sliding_window",
    "swa_window_size",
    "use_swa",
    "is_causal",
    "causal",
    "sample_from_anchor",
    "max_window_layers",
]
MORE += ["output_multiplier", "final_logit_softcapping", "input_embedding_scale", "partial_rotary_factor", "dtype"]
MORE += ["draft_vocab_size", "rope_parameters", "rope_scaling", "target_layer_ids", "aux_hidden_state_layer_ids"]
MORE += [
    "architectures",
    "model_type",
    "speculators_model_type",
    "quantization_config",
    "dflash_config",
    "torch_dtype",
]


def mutated(rng: random.Random):
    """Return a published checkpoint with a field or two turned into something else, and drafting knobs."""
    published = rng.choice([one for one in READ if one.target == "qwen3"])
    config, knobs = copy.deepcopy(published.config), dict(KNOB_DEFAULTS, tree_budget=8)
    for _ in range(rng.choice([1, 1, 2])):
        places = [config, *(value for value in config.values() if isinstance(value, dict))]
        place = rng.choice([*places, knobs])
        names = list(KNOB_DEFAULTS) if place is knobs else [*place, *(MORE if place is config else ())]
        place[rng.choice(names or MORE)] = copy.deepcopy(rng.choice(VALUES))
    return published, config, knobs


def outcome(published, config, knobs, target, plain, folder) -> str:
    """Read and run a checkpoint; return the error's text, or nothing where the text was right."""
    changed = type(published)(published.name, config, published.tensors)
    write(changed, folder)
    (folder / "generation_config.json").write_text(json.dumps(knobs))
    try:
        drafter = load(changed, folder)
        text = target.generate(
            prompt(9), assistant_model=drafter, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    except (OSError, ValueError) as error:
        return str(error)
    assert torch.equal(text, plain)
    return ""


def test_mutated_files_end_in_the_right_text_or_a_named_error(tmp_path):
    rng, target = random.Random(SEED), make_target("qwen3")
    plain = target.generate(prompt(9), max_new_tokens=6, do_sample=False, eos_token_id=None)
    right = 0
    for number in range(CASES):
        published, config, knobs = mutated(rng)
        started = time.perf_counter()
        try:
            message = outcome(published, config, knobs, target, plain, tmp_path / "d")
        except Exception as error:
            raise AssertionError(f"case {number} of {published.name}: {config} {knobs}") from error
        assert time.perf_counter() - started < LONGEST, (number, config, knobs)
        right += not message
        named = ("config.json" in message or "model.safetensors" in message) and "`" in message
        assert not message or named or "model.safetensors: " in message, (number, message)
    assert 0.2 * CASES < right < 0.8 * CASES  # both ends are met


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "{", '"a"', "\x00", '{"model_type": "treeflash"}'])
def test_files_that_are_no_config(text, tmp_path):
    folder = write(READ[1], tmp_path / "d")
    (folder / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError), match=r"config\.json|model\.safetensors"):
        load_folder(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "5", "{"])
def test_files_that_are_no_generation_config(text, tmp_path):
    folder = write(READ[1], tmp_path / "d")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises((OSError, ValueError), match=r"generation_config\.json"):
        load_folder(folder)


def test_a_broken_tensor_file_is_named(tmp_path):
    folder = write(READ[1], tmp_path / "d")
    content = (folder / "model.safetensors").read_bytes()
    for broken in (b"", content[:100], b"\xff" * 64, content[:-8]):
        (folder / "model.safetensors").write_bytes(broken)
        with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
            load_folder(folder)


def load_folder(folder):
    from hf_treeflash import TreeFlashDraftModel

    return TreeFlashDraftModel.from_pretrained(folder, dtype=torch.float32)
