"""Writes README.md of this folder, and the same page of the documentation, from drafters.json and from what the tests
of layouts read and refuse.

Usage: `python hub_cards/render.py` in the root of the repository, after a change of either.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "models.md"
ADDRESS = "https://github.com/hf-treeflash/hf_treeflash/blob/main/hub_cards/"
sys.path.insert(0, str(FOLDER.parent))

from tests.layouts.published import READ  # noqa: E402

HEAD = """# Published drafters

What is known to be published, and what hf_treeflash does with it, from `drafters.json` by `render.py`.

**No published weights were tried.** "Read" means: a synthetic file in exactly this layout (names, shapes and fields of
the published one, random weights) is run as its makers run it, slot by slot against an independent forward; "checked
by" names it in `tests/layouts/published.py`. "Refused" means: loading ends with a sentence that says why. Which
targets can carry trees is another question, which the README answers. `hf-treeflash inspect DRAFTER --target TARGET`
answers both for the files you have, without loading their weights.

Where a name is no link, its repository's exact id was not known when this was written.

| drafter | layout | target | status | load | checked by |
|---|---|---|---|---|---|
"""
FOOT = """
Linked cards say how to load a drafter, what is known of its licence, and which knobs to start with. Numbers in them
are cited or absent; what we do not know is said to be unknown. The card of a drafter *you* export is rendered by
`hf-treeflash export` from `src/hf_treeflash/hub/card_template.md` and the JSON of an evaluation.
"""


def render(place: str = "") -> str:
    """Return the page.

    Args:
        place (`str`, *optional*, defaults to `""`):
            Where cards lie, as seen from the page.
    """
    drafters = json.loads((FOLDER / "drafters.json").read_text("utf-8"))
    read = {published.name for published in READ}
    return HEAD + "".join(f"| {' | '.join(cells(drafter, read, place))} |\n" for drafter in drafters) + FOOT


def cells(drafter: dict, read: set[str], place: str) -> list[str]:
    """Return the row of a drafter.

    Args:
        drafter (`dict`):
            Of drafters.json: `drafter`, which is a repository's id where `is_id`; `layout`; `target`; `fixture`, the
            file that stands for it in the tests; and where they are needed `arguments` of `from_pretrained`, `why` it
            is refused if it is, and its `card`.
        read (`set[str]`):
            Names of the files that are read.
        place (`str`):
            Where cards lie.
    """
    name, is_read = drafter["drafter"], drafter["fixture"] in read
    link = f"[{name}](https://huggingface.co/{name})" if drafter["is_id"] else name
    card = f" ([card]({place}{drafter['card']}))" if "card" in drafter else ""
    arguments = "".join(f", {one}" for one in [drafter.get("arguments")] if one)
    repository = f'"{name}"' if drafter["is_id"] else "..."
    load = f"`TreeFlashDraftModel.from_pretrained({repository}{arguments})`" if is_read else ""
    status = "read; weights never tried" if is_read else f"refused: {drafter['why']}"
    return [link + card, drafter["layout"], drafter["target"], status, load, drafter["fixture"]]


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(render(), encoding="utf-8")
    PAGE.write_text(render(ADDRESS), encoding="utf-8")
