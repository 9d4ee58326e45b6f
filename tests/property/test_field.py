"""Whole situations, as users make them: everything that can be seen of a call is plain `generate`'s.

Target, rotary embedding, batch, what the caller brings, stops, outputs and turns are drawn together. Each case has a
seed of its own, which a failure prints: `HF_TREEFLASH_SEED=that HF_TREEFLASH_CASES=1` runs it alone.
`HF_TREEFLASH_CASES=1000` runs that many, from `HF_TREEFLASH_SEED` on.
"""

import collections
import os
import traceback
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging

from hf_treeflash.compat import CACHE
from tests.families.checks import assert_same_cache
from tests.helpers.quoting import knows
from tests.helpers.ties import TIE, gap_at_first_difference
from tests.property.callers import made, state_of
from tests.property.situations import Situation, draw

CASES = int(os.environ.get("HF_TREEFLASH_CASES", 150))
SEED = int(os.environ.get("HF_TREEFLASH_SEED", 0))
CLOSE = {"atol": 2e-3, "rtol": 1e-3}


@dataclass
class Seen:
    """What can be seen of a call, or of two turns: outputs, the caller's objects, the generator."""

    outputs: list
    calls: list
    arguments: dict
    generator: torch.Tensor
    mask: torch.Tensor  # of the last turn's ids


def sequences(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


def run(case: Situation, target, drafting: dict) -> Seen:
    """Generate, with new objects of the caller's, one turn or two."""
    calls: list = []
    arguments = made(case.objects, calls, case.rows, case.seed)
    inputs, outputs, cache = case.inputs(target), [], {}
    torch.manual_seed(case.seed)
    for turn in range(case.turns):
        settings = {**case.settings, **arguments, **({} if turn == case.mixed else drafting), **cache}
        if turn and "streamer" in settings and len(case.lengths) > 1:
            settings.pop("streamer")
        outputs.append(target.generate(**inputs, **settings))
        if turn + 1 < case.turns:
            inputs, cache = next_turn(case, inputs, outputs[-1]), {CACHE: outputs[-1][CACHE]}
    return Seen(outputs, calls, arguments, torch.get_rng_state(), inputs["attention_mask"])


def next_turn(case: Situation, inputs: dict, output) -> dict[str, torch.Tensor]:
    """Return a longer text, as the user goes on; padding behind a row's end is masked."""
    ids, mask = output.sequences, inputs["attention_mask"]
    user = torch.randint(4, 20, (len(ids), 3), generator=torch.Generator().manual_seed(case.seed))
    new = torch.ones_like(ids[:, mask.shape[1] :])
    ends = case.settings["eos_token_id"]
    for row, written in enumerate(ids[:, mask.shape[1] :].tolist()):
        stops = [i for i, token in enumerate(written) if token in ([ends] if isinstance(ends, int) else ends or [])]
        if stops and case.seed % 2:
            new[row, stops[0] + 1 :] = 0
    return {
        "input_ids": torch.cat([ids, user], dim=1),
        "attention_mask": torch.cat([mask, new, torch.ones_like(user)], dim=1),
    }


def wrapped(case: Situation, drafter, folder) -> Any:
    if case.wrap == "its name":
        drafter.save_pretrained(folder / str(case.seed))
        return str(folder / str(case.seed))
    return {"DataParallel": nn.DataParallel, "DDP": nn.parallel.DistributedDataParallel}.get(case.wrap, lambda d: d)(
        drafter
    )


def is_refusal(error: Exception) -> bool:
    """Whether the package refused by name: a `ValueError` that it raised itself."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return type(error) is ValueError and "hf_treeflash" in frame.filename


def is_tie(plain, tree) -> bool:
    """Whether greedy texts part where two tokens are equally good to plain decoding; it tells by its scores."""
    return getattr(plain, "scores", None) is not None and gap_at_first_difference(plain, sequences(tree)) < TIE


def compare(case: Situation, plain: Seen, tree: Seen) -> None:
    """Compare everything that can be seen of the two ways."""
    for expected, output in zip(plain.outputs, tree.outputs, strict=True):
        assert torch.equal(sequences(output), sequences(expected)), "texts"
        if not isinstance(expected, torch.Tensor):
            compare_outputs(case, expected, output, plain.mask)
    assert tree.calls == plain.calls, "what the caller's objects were asked"
    assert state_of(tree.arguments) == state_of(plain.arguments), "what they hold afterwards"
    assert torch.equal(tree.generator, plain.generator), "the generator"


def compare_outputs(case: Situation, expected, output, mask: torch.Tensor) -> None:
    """Compare what is recorded of each row as long as it was written, and the cache."""
    if not hasattr(output, "acceptance_lengths"):  # a turn that was written without the drafter
        return
    written = [1 + sum(lengths) for lengths in output.acceptance_lengths]
    for name in ("scores", "logits"):
        if (records := getattr(expected, name)) is not None:
            assert len(getattr(output, name)) == len(records), name
            for step, (own, other) in enumerate(zip(getattr(output, name), records, strict=True)):
                rows = [row for row, count in enumerate(written) if step < count]
                assert own.shape == other.shape and own.dtype == other.dtype
                torch.testing.assert_close(own[rows], other[rows], **CLOSE)
    for step, (own, other) in enumerate(zip(output.hidden_states or (), expected.hidden_states or (), strict=True)):
        rows = [row for row, count in enumerate(written) if step < count]
        for mine, theirs in zip(own, other, strict=True):
            assert mine.shape == theirs.shape
            if step:  # before that there is the padding of the prompts
                torch.testing.assert_close(mine[rows], theirs[rows], **CLOSE)
    if output[CACHE] is not None and "cache_implementation" not in case.settings:
        assert_same_cache(output[CACHE], expected[CACHE], mask.repeat_interleave(case.rows // len(case.lengths), 0))


def outcome(case: Situation, folder) -> str:
    """Return what came of a case: equal, a tie, refused, or that plain `generate` fails."""
    told = case.settings
    if case.settings.get("return_dict_in_generate") and not case.settings["do_sample"]:
        case.settings = told | {"output_scores": True}  # ties are told by them
    try:
        plain = run(case, case.target(), {})
    except Exception as error:
        return f"plain `generate` fails: {type(error).__name__}"
    drafter = case.drafter()
    if case.quotes and not case.embeds:
        ids = sequences(plain.outputs[-1])
        mask = plain.mask.repeat_interleave(case.rows // len(case.lengths), dim=0)
        knows(drafter, ids, mask)
    drafting = {"assistant_model": wrapped(case, drafter, folder), **case.drafting}
    if case.knobs_in_call:
        drafting["generation_config"] = GenerationConfig(**case.knobs)
    try:
        tree = run(case, case.target(), drafting)
    except ValueError as error:
        if is_refusal(error):
            return f"refused: {str(error)[:60]}"
        raise
    try:
        compare(case, plain, tree)
    except AssertionError:
        if not any(map(is_tie, plain.outputs, tree.outputs)):
            raise
        return "a tie"
    return "equal"


@pytest.fixture
def group(tmp_path):
    """A group of one process, as a training script of one process has it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_situations(group, tmp_path):
    logging.set_verbosity_error()
    counts: collections.Counter = collections.Counter()
    differences = []
    for seed in range(SEED, SEED + CASES):
        case = draw(seed)
        try:
            counts[outcome(case, tmp_path)] += 1
        except Exception as error:
            counts["DIFFERENT"] += 1
            differences.append((case, error))
            print(f"{case}\n{traceback.format_exc()}", flush=True)
    print(f"seeds {SEED} to {SEED + CASES - 1}:")
    for what, count in counts.most_common():
        print(f"{count:6} {what}")
    logging.set_verbosity_warning()
    assert not differences, f"{len(differences)} of {CASES}; the first: {differences[0]}"
    assert counts["equal"] > 0.8 * CASES
    assert sum(count for what, count in counts.items() if what.startswith("refused")) < 0.05 * CASES
    assert counts["a tie"] <= 0.01 * CASES
