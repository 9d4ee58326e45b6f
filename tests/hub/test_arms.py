"""Arms, batches, differences, tables and pictures of a comparison."""

import csv
import io

import pytest

from hf_treeflash.bench.arms import Arm, all_arms, our_chain, plain_compiled, standard_arms
from hf_treeflash.bench.compare import compare
from hf_treeflash.bench.differences import is_exact
from hf_treeflash.bench.tables import conditions, csv_rows, markdown_table, remarks, text_table
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target

LENGTHS = (7, 4, 9)


@pytest.fixture(scope="module")
def pair():
    target = tiny_target()
    target.generation_config.eos_token_id = None
    return target, tiny_drafter()


def prompts():
    return [prompt(length=length, seed=length) for length in LENGTHS]


def test_every_way_to_decode_gives_plain_decodings_text(pair):
    target, drafter = pair
    told = []
    arms = all_arms(drafter, [4, 8, "auto"], [2])
    result = compare(
        target, arms, prompts(), max_new_tokens=12, repeats=1, do_sample=False, progress=lambda *at: told.append(at)
    )
    names = [arm["name"] for arm in result["arms"]]
    assert names[:4] == ["plain", "prompt lookup", "chain", "our chain"] and len(names) == 10
    assert is_exact(result) and all(arm["identical"] and not arm["differences"] for arm in result["arms"])
    assert told == [(done, 60) for done in range(1, 61)]  # ten arms, three prompts, once for the texts and once timed
    assert {arm["method"] for arm in result["arms"][4:]} == {"marginal tree", "TreeFlash tree M2"}
    best = max(arm["tau"] for arm in result["arms"] if arm["knobs"])
    assert bool(remarks(result)) == (best < 1.2)


def test_plain_decoding_comes_compiled(pair):
    arms = all_arms(pair[1], [4, "auto"], [2], compiled=True)
    assert [arm.name for arm in arms if arm.is_static] == [
        "plain, compiled",
        "marginal tree B4, compiled",
        "TreeFlash tree B4 M2, compiled",
    ]
    assert arms[1].is_plain and plain_compiled().options["compile_config"]._compile_all_devices


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}])
def test_batches_leave_out_what_decodes_single_texts(pair, sampling):
    target, drafter = pair
    arms = [*standard_arms(drafter, tree_budget=8), our_chain(drafter)]
    result = compare(target, arms, prompts(), max_new_tokens=10, repeats=1, batch_size=2, **sampling)
    assert [arm["name"] for arm in result["arms"]] == [
        "plain",
        "marginal tree B8",
        "TreeFlash tree B8 M16",
        "our chain",
    ]
    assert result["settings"]["batch_size"] == 2 and is_exact(result)
    assert all(arm["tokens"] == 30 for arm in result["arms"]) and result["arms"][0]["tau"] == 1
    assert "batch 2" in conditions(result)


def test_a_text_ends_where_it_ends(pair):
    target, drafter = pair
    (text,) = target.generate(prompts()[0], max_new_tokens=12, do_sample=False)[:, 7:].tolist()
    end = text[4]
    arms = standard_arms(drafter, tree_budget=8)
    result = compare(
        target, arms, prompts()[:2], max_new_tokens=12, repeats=0, batch_size=2, do_sample=False, eos_token_id=end
    )
    assert is_exact(result) and result["arms"][0]["tokens"] <= text.index(end) + 1 + 12


def test_a_planted_difference_is_found_and_told(pair, monkeypatch):
    target, drafter = pair
    working = target.generate

    def corrupted(input_ids, assistant_model=None, **kwargs):
        output = working(input_ids, assistant_model=assistant_model, **kwargs)
        if assistant_model is not None and input_ids.shape[1] == LENGTHS[1]:
            output.sequences[0, LENGTHS[1] + 5] += 1 if output.sequences[0, LENGTHS[1] + 5] < 20 else -1
        return output

    monkeypatch.setattr(target, "generate", corrupted, raising=False)
    arms = [Arm("plain"), our_chain(drafter)]
    result = compare(target, arms, prompts(), max_new_tokens=10, repeats=0, do_sample=False)
    assert not is_exact(result) and not result["arms"][1]["identical"]
    ((number, token, gap),) = (one.values() for one in result["arms"][1]["differences"])
    assert (number, token) == (1, 5) and gap > 0
    (said,) = [line for line in remarks(result) if "our chain" in line]
    assert "1 of 3 texts are not plain decoding's. The first differs at token 5" in said


def test_draws_of_transformers_own_chain_are_others(pair):
    target, drafter = pair
    result = compare(target, standard_arms(drafter)[:2], prompts(), max_new_tokens=12, repeats=0, do_sample=True)
    plain, chain = result["arms"]
    assert plain["promises_text"] and not chain["promises_text"] and is_exact(result)
    assert "other draws" in text_table(result) or chain["identical"]


def test_tables_and_pictures(pair, tmp_path):
    target, drafter = pair
    arms = all_arms(drafter, [4, 8], [2])
    results = [
        compare(target, arms, prompts()[:1], max_new_tokens=8, repeats=1, **sampling)
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7})
    ]
    assert markdown_table(results[0]).count("\n") == len(arms) + 1
    rows = csv_rows(results)
    assert len(rows) == 2 * len(arms) and {row["temperature"] for row in rows} == {0.0, 0.7}
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    pytest.importorskip("matplotlib")
    from hf_treeflash.bench.plots import plot_acceptance, plot_budgets, plot_stages

    plot_budgets(results, tmp_path / "budgets.png")
    plot_acceptance(results, tmp_path / "acceptance.svg")
    plot_stages({"B8": {"target forward": 3.0, "walk": 0.2}, "plain": {"target forward": 2.0}}, tmp_path / "s.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_rates_of_a_batch_are_of_its_rows(pair):
    target, drafter = pair
    arms, settings = [Arm("plain"), our_chain(drafter)], {"max_new_tokens": 10, "repeats": 0, "do_sample": False}
    one, three = (compare(target, arms, prompts(), batch_size=size, **settings)["arms"][1] for size in (1, 3))
    assert one["tau"] == pytest.approx(three["tau"])
    assert one["acceptance_rates"] == pytest.approx(three["acceptance_rates"])
