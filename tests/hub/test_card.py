"""What a card prints: nothing but text, and only of an evaluation of this very pair."""

import copy
import json

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_treeflash.hub import export_drafter, export_speculators
from tests.helpers.evaluations import make_evaluation
from tests.helpers.tiny import tiny_drafter


def export(folder, evaluation=None, **fields) -> str:
    export_drafter(tiny_drafter(), folder, evaluation=evaluation, **{"target_id": "acme/target", **fields})
    return (folder / "README.md").read_text()


EVIL = "a\n# Heading\n---\n<script>alert(1)</script> ![x](https://evil.example) `code` | cell \x1b[31m\r\u2028\u202e"


@pytest.mark.parametrize("field", ["name", "target_id", "target_revision", "license", "datasets"])
def test_names_bring_no_lines_tags_links_or_code_along(tmp_path, field):
    plain = export(tmp_path / "plain", **{field: ["acme-x"] if field == "datasets" else "acme-x"})
    evil = export(tmp_path / "evil", **{field: [EVIL] if field == "datasets" else EVIL})
    check_only_text(plain, evil)


@pytest.mark.parametrize("place", ["task", "arm", "device", "attention", "hash"])
def test_an_evaluation_brings_no_markup_along(tmp_path, place):
    evaluation = make_evaluation()
    (result,) = evaluation["results"]
    if place == "task":
        result["task"] = EVIL + " $x^$"
    elif place == "arm":
        result["arms"][1]["name"] = EVIL + " $x^$"
    elif place == "hash":
        evaluation["chat_template_sha256"] = EVIL
    else:
        result["environment"][place] = EVIL
    harmless = {**evaluation, "results": make_evaluation()["results"]}
    harmless["chat_template_sha256"] = "abc" if place == "hash" else None
    check_only_text(export(tmp_path / "plain", harmless), export(tmp_path / "evil", evaluation))


def check_only_text(plain: str, evil: str) -> None:
    """Compare a card of odd names with one of common names: as many lines, headings, cells, code and links."""
    front, body = evil.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["library_name"] == "transformers"
    plain = plain.split("\n---\n", 1)[1]
    for sign in ("\n", "\n#", "|", "`", "](", "![", "<"):
        assert body.count(sign) == plain.count(sign), repr(sign)
    assert all(sign.isprintable() or sign == "\n" for sign in evil)


def test_an_automatic_budget_is_called_so(tmp_path):
    drafter = tiny_drafter()
    drafter.generation_config.tree_budget = "auto"
    export_drafter(drafter, tmp_path, target_id="acme/target")
    card = (tmp_path / "README.md").read_text()
    assert "| `tree_budget` | auto | nodes checked per target pass, root included; as many as pay" in card
    assert "| `tree_budget` | auto" not in export(tmp_path / "fixed")


def test_a_command_stays_in_its_fence(tmp_path):
    command = tmp_path / "command.txt"
    command.write_text("python train.py\n```\n<script>\n````\n# Heading\n")
    text = export(tmp_path / "out", command=command)
    assert "\n`````\npython train.py\n```\n<script>\n````\n# Heading\n`````\n" in text


def test_the_card_of_the_speculators_form_is_only_text_too(tmp_path):
    export_speculators(tiny_drafter(), tmp_path / "plain", "acme/target")
    export_speculators(tiny_drafter(), tmp_path / "evil", EVIL)
    plain, evil = ((tmp_path / name / "README.md").read_text() for name in ("plain", "evil"))
    body, plain = (text.split("\n---\n", 1)[1] for text in (evil, plain))
    assert all(body.count(sign) == plain.count(sign) for sign in ("\n", "`", "](", "<"))


OF_ANOTHER = {
    "target": (make_evaluation(id="acme/other"), "'acme/other', the card would say 'acme/target'"),
    "owner": (make_evaluation(id="someone/target"), "'someone/target'"),
    "folder": (make_evaluation(id="get"), "'get'"),
    "revision": (make_evaluation(revision="b" * 40), "revision b{40} .* would say a{40}"),
    "drafter": ({**make_evaluation(), "drafter": {"parameters": 7}}, "a drafter of 7 parameters"),
}


@pytest.mark.parametrize(("evaluation", "message"), OF_ANOTHER.values(), ids=OF_ANOTHER)
def test_an_evaluation_of_another_pair_is_refused(tmp_path, evaluation, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "out", evaluation, target_revision="a" * 40)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["acme/target", "Acme/Target", "target", "acme-target", "acme--target", "a" * 40])
def test_a_target_may_have_been_read_from_a_folder(tmp_path, name):
    assert "### letters" in export(tmp_path / "out", make_evaluation(id=name), target_revision="a" * 40)


def without(record: dict, *path) -> dict:
    """Return a copy without one entry."""
    record = copy.deepcopy(record)
    *outer, last = path
    entry = record
    for key in outer:
        entry = entry[key]
    del entry[last]
    return record


def replaced(record: dict, value, *path) -> dict:
    """Return a copy with another value at a place."""
    record = copy.deepcopy(record)
    *outer, last = path
    entry = record
    for key in outer:
        entry = entry[key]
    entry[last] = value
    return record


GOOD = make_evaluation()
MALFORMED = {
    "no target": (without(GOOD, "target"), "no fit `target`"),
    "no id": (without(GOOD, "target", "id"), "no fit `id`"),
    "no results": (without(GOOD, "results"), "no fit `results`"),
    "results of numbers": (replaced(GOOD, [1], "results"), r"`results\[0\]` .* no object"),
    "no arms": (replaced(GOOD, [], "results", 0, "arms"), "`arms` are empty"),
    "arm without a rate": (without(GOOD, "results", 0, "arms", 1, "tau"), "no fit `tau`"),
    "rate of words": (replaced(GOOD, "<b>", "results", 0, "arms", 1, "tau"), "no fit `tau`"),
    "spread of words": (replaced(GOOD, "x", "results", 0, "arms", 1, "speedup", "median"), "no fit `median`"),
    "rates of words": (replaced(GOOD, ["x"], "results", 0, "arms", 1, "acceptance_rates"), "`acceptance_rates`"),
    "settings of words": (replaced(GOOD, "x", "results", 0, "settings", "seed"), "no fit `seed`"),
}


@pytest.mark.parametrize(("evaluation", "message"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_evaluation_is_refused_by_name(tmp_path, evaluation, message):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(evaluation))
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "out", file)


def test_what_is_no_json_is_refused_by_name(tmp_path):
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is no JSON"):
        export(tmp_path / "out", tmp_path / "evaluation.json")


def test_an_evaluation_without_timed_repeats_or_trees_makes_a_card(tmp_path):
    untimed, treeless = make_evaluation(), make_evaluation()
    for entry in untimed["results"][0]["arms"]:
        entry["speedup"] = entry["tokens_per_second"] = None
    treeless["results"][0]["arms"].pop()
    assert ModelCard(export(tmp_path / "untimed", untimed)).data.eval_results[0].metric_value == 2.5
    assert ModelCard(export(tmp_path / "treeless", treeless)).data.eval_results is None
