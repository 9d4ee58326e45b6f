"""The page of a trace in a browser without a screen: clicks, keys, dark mode, a long text. Nothing is loaded."""

import random
import shutil

import pytest

from hf_treeflash.tracing import render_page
from hf_treeflash.tracing.rounds import TracedRound, TracedText
from tests.helpers.pair_on_disk import letter_tokenizer

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

SETTINGS = {"target": "t", "drafter": "d", "tree_budget": 24, "temperature": 0.0, "prompt_lookup_num_tokens": 5}
SETTINGS |= {"dtype": "float32", "device": "cpu"}
LETTERS = list(range(4, 20))


def long_text(tokens: int) -> TracedText:
    """A text of rounds with random trees of 24 nodes."""
    chance = random.Random(0)
    text = TracedText(LETTERS[:5], SETTINGS, [TracedRound.of_prompt([8], 9)])
    written = 1
    while written < tokens:
        parents = [-1, *(chance.randrange(node) for node in range(1, 24))]
        path = [0]
        while (below := [node for node, parent in enumerate(parents) if parent == path[-1]]) and len(path) < 4:
            path.append(chance.choice(below))
        ids = chance.choices(LETTERS, k=24)
        emitted = [ids[node] for node in path[1:]] + [4]
        found = [False, *(chance.random() < 0.2 for _ in range(23))]
        shares = [1.0, *(chance.random() for _ in range(23))]
        times = {"draft": 1.0, "verify": 5.0, "walk": 0.2, "commit": 0.3, "rest": 0.1}
        text.rounds.append(TracedRound(ids, parents, shares, shares, found, path, emitted, [0.5] * len(path), times))
        written += len(emitted)
    return text


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    tokenizer = letter_tokenizer()
    texts = [long_text(2000), long_text(12)]
    data = {
        "version": 1,
        "texts": [text.to_dict(tokenizer) for text in texts],
        "tokens": {str(token): tokenizer.decode([token]) for token in LETTERS},
    }
    data["tokens"]["4"] = "<img src=x onerror=document.title='broken'>"  # shown as text, or the title says so
    path = tmp_path_factory.mktemp("page") / "trace.html"
    path.write_text(render_page(data), encoding="utf-8")
    return path, texts


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, file):
    page = browser.new_page(viewport={"width": 1280, "height": 760}, color_scheme="light")
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file[0].as_uri())
    page.wait_for_selector(f"#text [data-round='{len(file[1][0].rounds) - 1}']", state="attached")  # of the last
    yield page
    assert said == [] and asked == [file[0].as_uri()] and page.title() == "Trace of a generation"
    page.close()


def test_a_click_on_the_text_shows_the_rounds_tree(page, file):
    seen = file[1][0].rounds[7]
    page.click("#text [data-round='7']")
    assert page.inner_text("#title") == f"Round 7 of {len(file[1][0].rounds) - 1}"
    assert page.locator("#tree g").count() == len(seen.token_ids) + 1
    assert page.locator("#tree g.drafted, #tree g.found").count() == len(seen.path) - 1
    below = [node for node, parent in enumerate(seen.parents) if parent in seen.path and node not in seen.path]
    assert page.locator("#tree g.rejected").count() == len(below)
    assert page.locator("#tree g.own").count() == 1
    assert page.locator("#times div").count() == 5
    assert f"accepted {len(seen.path) - 1}" in page.inner_text("#story")
    page.click(f"#tree g[data-node='{seen.path[1]}']")
    assert "Accepted." in page.inner_text("#node")
    page.click(f"#tree g[data-node='{below[0]}']")
    assert "Rejected" in page.inner_text("#node")


def test_a_click_on_the_overview_goes_there(page):
    page.locator("#strip rect").nth(20).click(force=True)
    assert page.inner_text("#title").startswith("Round 20 ")
    assert page.locator("#text .round.at").get_attribute("data-round") == "20"


def test_keys_move_between_rounds_and_nodes(page, file):
    last = len(file[1][0].rounds) - 1
    for key, title in (("ArrowRight", "Round 2 "), ("End", f"Round {last} "), ("ArrowLeft", f"Round {last - 1} ")):
        page.keyboard.press(key)
        assert page.inner_text("#title").startswith(title)
    page.keyboard.press("Home")
    assert page.inner_text("#title") == "The prompt's pass"
    page.keyboard.press("ArrowLeft")  # there is nothing before it
    assert page.inner_text("#title") == "The prompt's pass"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator("#tree g.at").get_attribute("data-node") == "1"
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()


def test_dark_mode_by_system_and_by_key(page, browser, file):
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    page.keyboard.press("d")
    dark = page.evaluate(back)
    assert dark != light
    other = browser.new_page(color_scheme="dark")
    other.goto(file[0].as_uri())
    assert other.evaluate(back) == dark
    other.close()


def test_another_text_can_be_chosen(page, file):
    page.select_option("#which", "1")
    assert page.locator("#text .round").count() == len(file[1][1].rounds)


STEPS = """async () => {
    const times = []
    for (let i = 0; i < 41; i++) {
        const start = performance.now()
        document.dispatchEvent(new KeyboardEvent("keydown", {key: i % 2 ? "ArrowLeft" : "ArrowRight"}))
        document.body.getBoundingClientRect()  // layout included
        times.push(performance.now() - start)
        await new Promise(requestAnimationFrame)
    }
    return times.sort((a, b) => a - b)[20]
}"""


def test_a_step_costs_the_same_in_a_long_text(page):
    """Nearly, that is: laying the whole text out again would take some twenty times as long."""
    assert page.locator("#text .round").count() > 400
    long = page.evaluate(STEPS)
    page.select_option("#which", "1")
    short = page.evaluate(STEPS)
    assert long < 8 * short + 10, f"{long:.1f} ms per round, {short:.1f} ms in a short text"


def test_a_picture_of_it_is_not_blank(page, tmp_path):
    page.click("#text [data-round='3']")
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
