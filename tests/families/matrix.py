"""The support matrix of the README: what each family of targets was seen to do."""

from pathlib import Path

from tests.families.checks import (
    check_greedy,
    check_sampling,
    check_second_turn,
    drafter_for,
    ending_at,
)
from tests.families.hybrids import FIRST_TURN_ONLY, HYBRIDS, REFUSED
from tests.families.models import FAMILIES, Family
from tests.helpers.quoting import quoting_drafter

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"
HEADER = "| target | layers | greedy | batch | sampling | cache | second turn |\n" + "| --- " * 7 + "|"
# Placeholders for images are no text, so no model may write them.
SETTINGS = {"suppress_tokens": [20, 21, 22, 23]}


def check_family(family: Family, head: bool) -> None:
    """Check one family with a drafter with or without a head; greedy checks compare the caches too."""
    target = family.build()
    drafter = drafter_for(target, head)
    check_greedy(target, drafter, family.inputs(), **SETTINGS)
    batch = family.inputs(3, seed=1)
    check_greedy(target, drafter, batch, **SETTINGS)
    check_greedy(target, drafter, batch, **SETTINGS, eos_token_id=ending_at(target, batch, [2, 9]))
    check_sampling(target, drafter, family.inputs(seed=2), **SETTINGS)
    if family.vision is None:
        check_second_turn(target, drafter, family.inputs(seed=4))


def check_hybrid(family: Family) -> None:
    """Check one family with recurrent layers, with a drafter whose drafts are accepted."""
    target, drafter = family.build(), quoting_drafter()
    for inputs in (family.inputs(), family.inputs(3, seed=1)):
        output = check_greedy(target, drafter, inputs, **SETTINGS)
        assert output.block_efficiency > 2
    batch = family.inputs(3, seed=1)
    check_greedy(target, drafter, batch, eos_token_id=ending_at(target, batch, [2, 9]), **SETTINGS)
    check_sampling(target, drafter, family.inputs(seed=2), **SETTINGS)
    if family.vision is None:
        if family.name not in FIRST_TURN_ONLY:
            check_second_turn(target, drafter, family.inputs(seed=4), **SETTINGS)


def refusal(family: Family) -> str:
    """Return the message a refused family is refused with."""
    target = family.build()
    try:
        target.generate(**family.inputs(), assistant_model=drafter_for(target), max_new_tokens=4)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{family.name} was not refused")


def supported_row(family: Family) -> str:
    """Return the line of a family that passed [`check_family`] or [`check_hybrid`]."""
    turn = "not run" if family.vision else "refused" if family.name in FIRST_TURN_ONLY else "yes"
    return f"| {family.name} | {family.note} | yes | yes | same seed, same text | equal | {turn} |"


def refused_row(family: Family, reason: str) -> str:
    """Return the line of a family that is refused for a reason."""
    return f"| {family.name} | {family.note} | refused: {reason} | | | | |"


def render_matrix() -> str:
    """Run every check and return the table; raises where a family falls short."""
    rows = [HEADER]
    for family in FAMILIES:
        for head in (True, False):
            check_family(family, head)
        rows.append(supported_row(family))
    for family in HYBRIDS:
        check_hybrid(family)
        rows.append(supported_row(family))
    for family, reason in REFUSED:
        assert reason in refusal(family)
        rows.append(refused_row(family, reason))
    return "\n".join(rows)


def readme_matrix() -> str | None:
    """Return the table the README shows, or None where it shows none."""
    text = README.read_text() if README.exists() else ""
    if BEGIN not in text or END not in text:
        return None
    return text.split(BEGIN)[1].split(END)[0].strip()
