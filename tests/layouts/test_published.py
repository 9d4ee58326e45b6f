"""Every published layout is run as its makers run it, or refused in words that say what it is."""

import re

import pytest
import torch

from hf_treeflash import TreeFlashDraftModel
from tests.layouts.published import READ, REFUSED
from tests.layouts.reference import Reference
from tests.layouts.rounds import drafted_rounds, largest_difference, load, make_target

every_layout = pytest.mark.parametrize("published", READ, ids=lambda published: published.name)


def check_rounds(published, folder, **settings):
    """Compare every slot of every round with the reference."""
    target = make_target(published.target)
    drafter = load(published, folder)
    texts, rounds = drafted_rounds(target, drafter, **settings)
    assert largest_difference(rounds, texts, Reference(published.config, published.tensors, target)) < 1e-5


@every_layout
def test_every_slot_of_every_round_equals_the_reference(published, tmp_path):
    check_rounds(published, tmp_path / "d")


@every_layout
def test_so_do_ragged_batches(published, tmp_path):
    check_rounds(published, tmp_path / "d", lengths=(9, 5, 7))


@every_layout
def test_and_static_rounds(published, tmp_path, caplog):
    check_rounds(published, tmp_path / "d", lengths=(9, 6), cache_implementation="static")
    assert published.target == "muse" or "does not cover" not in caplog.text


@every_layout
def test_our_own_layout_holds_all_of_it(published, tmp_path):
    """Saved and read again, a drafter of any layout is run in the same way."""
    drafter = load(published, tmp_path / "d")
    drafter.save_pretrained(tmp_path / "ours")
    again = TreeFlashDraftModel.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert again.config.to_diff_dict() == drafter.config.to_diff_dict()
    target = make_target(published.target)
    first, second = (drafted_rounds(target, one.eval())[1] for one in (drafter, again))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("published", REFUSED, ids=lambda published: published.name)
def test_what_is_not_run_is_refused_by_name(published, tmp_path):
    with pytest.raises(ValueError, match=re.compile(published.refusal, re.S)):
        load(published, tmp_path / "d")
