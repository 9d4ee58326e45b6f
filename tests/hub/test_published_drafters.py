"""The page of published drafters says what the tests of layouts show."""

import importlib.util
import json
from pathlib import Path

from tests.layouts.published import READ, REFUSED

FOLDER = Path(__file__).parents[2] / "hub_cards"
DRAFTERS = json.loads((FOLDER / "drafters.json").read_text("utf-8"))


def rendering():
    spec = importlib.util.spec_from_file_location("render_published_drafters", FOLDER / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_pages_are_the_rendered_ones():
    module = rendering()
    assert (FOLDER / "README.md").read_text("utf-8") == module.render(), "run `python hub_cards/render.py`"
    assert module.PAGE.read_text("utf-8") == module.render(module.ADDRESS), "run `python hub_cards/render.py`"


def test_every_card_has_a_row_and_every_row_a_reason():
    names = [drafter["drafter"] for drafter in DRAFTERS]
    assert len(names) == len(set(names))
    cards = {drafter["card"] for drafter in DRAFTERS if "card" in drafter}
    assert cards == {path.name for path in FOLDER.glob("*.md")} - {"README.md"}
    read, refused = ({published.name for published in some} for some in (READ, REFUSED))
    for drafter in DRAFTERS:
        known = {"drafter", "is_id", "layout", "target", "fixture", "arguments", "why", "card"}
        assert set(drafter) <= known
        assert drafter["fixture"] in read or "why" in drafter, drafter["drafter"]
        if "card" in drafter:
            assert drafter["fixture"] in read and drafter["target"] in (FOLDER / drafter["card"]).read_text("utf-8")
    assert {"TreeFlash", "DFlash", "JetSpec", "DeepSpec DFlash"} <= read and {"MiMo", "Laguna", "P-EAGLE"} <= refused
