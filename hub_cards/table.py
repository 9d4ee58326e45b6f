"""The table of published drafters, read from their cards.

python hub_cards/table.py > docs/models.md
"""

import re
from pathlib import Path
from typing import NamedTuple

CARDS = "https://github.com/hf-treeflash/hf_treeflash/blob/main/hub_cards"
HUB = "https://huggingface.co"
PAGE = """# Published drafters

<!-- Made by `python hub_cards/table.py > docs/models.md`. -->

What each drafter's card says, in one table. "Tree" is what it drafts here: TreeFlash drafters have the head, DFlash
drafters draft from each place's own distribution. None of these weights was tried by us. Other drafters of the same
layouts load as well, and what is not known to run as it was trained is refused by name.

{table}

Load one by its name with `hf_treeflash.TreeFlashDraftModel.from_pretrained(...)`. Its card has the whole snippet,
where each value is known from, and what is known of its licence. For another target, [train one](training.md).
"""


class Card(NamedTuple):
    """What the table shows of a drafter."""

    file: str
    drafter: str
    target: str
    tree: str
    block: str
    layers: str
    budget: str
    licence: str


def read_card(path: Path) -> Card:
    """Read a card.

    Args:
        path (`Path`):
            Its Markdown file.
    """
    text = path.read_text(encoding="utf-8")
    fields = dict(re.findall(r"^\| `?([\w /]+?)`? \| (.+?) \|", text, flags=re.M))
    (target,) = re.findall(rf"drafter for \[`(.+?)`\]\({HUB}/\1\)", text)
    (licence,) = re.findall(r"^## Licence\n\n\*\*(.+?)\.?\*\*", text, flags=re.M)
    return Card(
        file=path.name,
        drafter=text.splitlines()[0].removeprefix("# "),
        target=target,
        tree="TreeFlash" if "head" in fields else "marginal",
        block=fields["block size"].removesuffix(" slots"),
        layers=fields["layers"],
        budget=fields["tree_budget"],
        licence=licence,
    )


def table(cards: list[Card]) -> str:
    """Lay cards out as a Markdown table."""
    rows = [
        "| drafter | target | tree | block | layers | start with `tree_budget` | licence | card |",
        "|---" * 8 + "|",
    ]
    for card in cards:
        names = [f"[{name}]({HUB}/{name})" for name in (card.drafter, card.target)]
        rest = [card.tree, card.block, card.layers, card.budget, card.licence, f"[card]({CARDS}/{card.file})"]
        rows.append(f"| {' | '.join([*names, *rest])} |")
    return "\n".join(rows)


def page() -> str:
    """Return the documentation's page of published drafters."""
    files = sorted(path for path in Path(__file__).parent.glob("*.md") if path.name != "README.md")
    return PAGE.format(table=table([read_card(path) for path in files]))


if __name__ == "__main__":
    print(page(), end="")
