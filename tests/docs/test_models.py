"""The page of published drafters says what their cards say."""

import runpy

from tests.docs.blocks import ROOT


def test_the_page_is_made_from_the_cards():
    made = runpy.run_path(str(ROOT / "hub_cards" / "table.py"))["page"]()
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == made, "run hub_cards/table.py > docs/models.md"
