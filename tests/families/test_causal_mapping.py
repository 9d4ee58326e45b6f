"""The table of all families holds: some of them, drawn anew with each seed, are tried again."""

import os
import random

import pytest
import transformers

from tests.families.causal_mapping import TABLE, lines_of, seen_of

SEED = int(os.environ.get("HF_TREEFLASH_SEED", 0))
FAMILIES = lines_of(TABLE.read_text())
RUN = sorted(family for family, seen in FAMILIES.items() if seen.startswith(("exact", "refused")))


def test_no_family_is_wrong():
    assert len(FAMILIES) > 150
    assert not [family for family, seen in FAMILIES.items() if seen.startswith(("DIFFERS", "CRASHES"))]
    assert sum(seen.startswith("exact") for seen in FAMILIES.values()) > 100


@pytest.mark.parametrize("family", random.Random(SEED).sample(RUN, 12))
def test_a_family_does_what_the_table_says(family):
    if f"transformers {transformers.__version__}:" not in TABLE.read_text():
        pytest.skip("the table was written with another release of transformers")
    assert seen_of(family) == FAMILIES[family]
