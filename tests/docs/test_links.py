"""Links of README, documentation and policies lead somewhere, as far as can be told without a network."""

import re
import unicodedata
from pathlib import Path

import pytest

from tests.docs.blocks import FENCE, ROOT

REPOSITORY = "https://github.com/hf-treeflash/hf_treeflash"
DOCS = ROOT / "docs"
RAW = "https://raw.githubusercontent.com/hf-treeflash/hf_treeflash/main/"
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
PAGES = sorted(page for folder in (".", "docs", "hub_cards", "tests") for page in (ROOT / folder).glob("*.md"))


def links_of(page: Path) -> list[str]:
    return LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    plain = [unicodedata.normalize("NFKD", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head)) for head in headings]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in plain}


def in_checkout(link: str, page: Path) -> Path | None:
    """Return the file or folder of the checkout that a link means; None if it leads elsewhere."""
    path = link.split("#")[0]
    if path.startswith(RAW):
        return ROOT / path.removeprefix(RAW)
    if match := re.match(re.escape(REPOSITORY) + r"/(?:blob|tree|raw)/main/(.+)", path):
        return ROOT / match[1]
    if re.match(r"https?://|mailto:", path):
        return None
    return page.parent / path if path else page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links_of(page):
        place = in_checkout(link, page)
        if place is None:
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?|mailto:\S+", link), f"{page.name}: {link}"
            continue
        assert place.exists(), f"{page.name}: {link}"
        if page.is_relative_to(DOCS) and "://" not in link:  # a site has its own pages alone
            assert place.resolve().is_relative_to(DOCS), f"{page.name}: {link} is not on the site; give its address"
        _, _, anchor = link.partition("#")
        if anchor:
            assert anchor in anchors_of(place), f"{page.name}: {link}"


def test_the_readme_reads_on_a_registrys_page():
    """A registry shows it alone: its links are absolute."""
    assert all(link.startswith(("https://", "#")) for link in links_of(ROOT / "README.md"))


def test_every_page_is_in_the_navigation():
    told = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    there = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert there <= set(told) and len(told) == len(set(told))
