"""An exported folder: complete, clean, and alive where this package is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import hf_treeflash
from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench.arms import standard_arms
from hf_treeflash.bench.compare import compare
from hf_treeflash.bench.pairs import describe_pair
from hf_treeflash.draft_vocabulary import kept_tokens
from hf_treeflash.hub import export_drafter, export_speculators, push
from hf_treeflash.hub.scan import check_file
from tests.helpers.pair_on_disk import letter_tokenizer
from tests.helpers.tiny import VOCAB, keeping, prompt, tiny_drafter, tiny_target

MODEL = ["config.json", "generation_config.json", "model.safetensors"]
PACKAGE = Path(hf_treeflash.__file__).parent
# What the package's root holds beside its front door and its command line.
MODULES = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}

WITHOUT_PACKAGE = """
import json, sys
sys.modules["hf_treeflash"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM
target = AutoModelForCausalLM.from_pretrained(sys.argv[1])
drafter = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
out = target.generate(
    torch.tensor([json.loads(sys.argv[3])]),
    assistant_model=drafter,
    custom_generate=sys.argv[2],
    trust_remote_code=True,
    max_new_tokens=20,
    do_sample=False,
    return_dict_in_generate=True,
)
print(json.dumps([type(drafter).__module__, out.sequences[0].tolist(), out.acceptance_lengths]))
"""


@pytest.fixture(scope="module")
def evaluation():
    target, drafter = tiny_target(), tiny_drafter()
    target.config.name_or_path = "/home/someone/models/acme-target"
    results = [
        compare(target, standard_arms(drafter), [prompt()], task="letters", max_new_tokens=8, repeats=1, **sampling)
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7})
    ]
    return {**describe_pair(target, letter_tokenizer(), drafter), "results": results}


def test_file_list_is_exact(tmp_path):
    files = set(export_drafter(tiny_drafter(), tmp_path / "out", target_id="acme/target"))
    generate = {name for name in files if name.startswith("custom_generate/")}
    code = {name for name in files - generate if name.endswith(".py")}
    assert files - generate - code == {"README.md", *MODEL}
    assert {name.rpartition("/")[2] for name in code | generate} == MODULES | {"generate.py"}
    assert "modeling_treeflash.py" in code and "custom_generate/generation.py" in generate
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_treeflash.TreeFlashDraftModel"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["tree_budget"] == 64


def test_same_tokens_in_a_process_without_the_package(tmp_path):
    target, drafter = tiny_target(), tiny_drafter()
    target.generation_config.eos_token_id = None
    target.save_pretrained(tmp_path / "target")
    drafter.generation_config.tree_budget = 9
    export_drafter(drafter, tmp_path / "drafter", target_id="acme/target")
    ids = prompt()
    here = target.generate(
        ids, assistant_model=drafter, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    there = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_PACKAGE,
            tmp_path / "target",
            tmp_path / "drafter",
            json.dumps(ids[0].tolist()),
        ],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert there.returncode == 0, there.stderr
    module, sequence, lengths = json.loads(there.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    assert sequence == here.sequences[0].tolist()
    assert lengths == here.acceptance_lengths


def test_card_takes_every_number_from_the_evaluation(tmp_path, evaluation):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(evaluation))
    command = tmp_path / "command.txt"
    command.write_text("python /home/someone/train.py --output /data/run\n")
    files = export_drafter(
        tiny_drafter(),
        tmp_path / "out",
        target_id="acme/target",
        target_revision="abc123",
        name="acme/treeflash-target",
        license="apache-2.0",
        datasets=["acme/chats"],
        evaluation=file,
        command=command,
        record={"steps": 3, "data": "/home/someone/samples.jsonl"},
    )
    assert {"command.txt", "evaluation.json", "training_record.json"} < set(files)
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())
    assert record == {"steps": 3, "data": "samples.jsonl"}
    assert push(tmp_path / "out", "acme/treeflash-target", dry_run=True) == files
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "acme/target",
        "transformers",
        "text-generation",
    )
    assert data.license == "apache-2.0" and data.datasets == ["acme/chats"] and "treeflash" in data.tags
    assert [result.metric_type for result in data.eval_results] == ["block_efficiency"] * 2
    for result in evaluation["results"]:
        for arm in result["arms"]:
            assert f"| {arm['name']} | {arm['tau']:.2f} | {arm['tokens_per_second']['median']:.0f} |" in text
    assert "sampled, temperature 0.7" in text and "`abc123`" in text
    assert text.count("rank tokens by the noise the seed draws with") == 1, "of the sampled table alone"
    assert "python train.py --output run" in text
    assert "someone" not in text + (tmp_path / "out" / "evaluation.json").read_text()


def test_plot_needs_matplotlib_and_the_rest_does_not(tmp_path, evaluation, monkeypatch):
    arguments = {"target_id": "acme/target", "evaluation": evaluation}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "hf_treeflash.bench.plots", raising=False)
    assert "acceptance.png" not in export_drafter(tiny_drafter(), tmp_path / "bare", **arguments)
    assert "acceptance.png" not in (tmp_path / "bare" / "README.md").read_text()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert "acceptance.png" in export_drafter(tiny_drafter(), tmp_path / "drawn", **arguments)
    assert "(acceptance.png)" in (tmp_path / "drawn" / "README.md").read_text()


def test_card_without_evaluation_says_that_nothing_is_known(tmp_path):
    export_drafter(tiny_drafter(head=False), tmp_path, target_id="acme/target")
    text = (tmp_path / "README.md").read_text()
    assert "efficiency is unknown" in text and "not recorded" in text and "Not stated" in text
    assert "treeflash" not in ModelCard(text).data.tags


def test_the_card_names_the_head(tmp_path):
    drafter = tiny_drafter(ar_head="markov", head_rank=6)
    export_drafter(drafter, tmp_path / "out", target_id="acme/target")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| head | DSpark's Markov head |" in text and "with DSpark's Markov head, on a" in text
    again = TreeFlashDraftModel.from_pretrained(tmp_path / "out")
    assert torch.equal(again.ar_head.following.weight, drafter.ar_head.following.weight)


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"first_slot": 0},
        {"ar_head": "markov", "head_rank": 6, "head_gated": True},
        {**SLIDING, "window_rule": "anchor"},
        {**SLIDING, "window_rule": "anchor", "causal_layers": "sliding"},
    ],
    ids=str,
)
def test_speculators_form_reads_back_as_the_same_backbone(tmp_path, options):
    drafter = tiny_drafter(**options)
    files = export_speculators(drafter, tmp_path, "acme/target", "Qwen3ForCausalLM")
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert "**dropped**" in (tmp_path / "README.md").read_text()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["aux_hidden_state_layer_ids"] == [1, 3]
    assert stored["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == drafter.config.num_drafted
    again = TreeFlashDraftModel.from_pretrained(tmp_path)
    assert again.ar_head is None
    backbone = {key: value for key, value in drafter.state_dict().items() if not key.startswith("ar_head.")}
    assert again.state_dict().keys() == backbone.keys()
    assert all(torch.equal(value, backbone[key]) for key, value in again.state_dict().items())
    for field in (
        "target_layer_ids",
        "block_size",
        "mask_token_id",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "first_slot",
        "causal_layers",
    ):
        assert getattr(again.config, field) == getattr(drafter.config, field)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({**SLIDING}, "window_rule"),
        ({"causal_layers": "all"}, "causal_layers"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"output_multiplier": 0.5}, "output_multiplier"),
        ({"conv_kernel_size": 2}, "conv_kernel_size"),
    ],
    ids=str,
)
def test_what_speculators_form_cannot_say_is_refused(tmp_path, options, field):
    with pytest.raises(ValueError, match=f"cannot say how this drafter is run: its `{field}` is"):
        export_speculators(tiny_drafter(**options), tmp_path / "out", "acme/target")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_draft_vocabulary_goes_along(tmp_path, own):
    kept, lm_head = [3, 5, 6, 20], torch.nn.Linear(32, VOCAB, bias=False)
    drafter = tiny_drafter(**({"draft_vocab_size": 4} if own else {}))
    if own:
        drafter.d2t.copy_(torch.tensor(kept) - torch.arange(4))
    else:
        drafter = keeping(drafter, *kept)
    export_speculators(drafter, tmp_path / "out", "acme/target", lm_head=None if own else lm_head)
    again = TreeFlashDraftModel.from_pretrained(tmp_path / "out")
    assert kept_tokens(again.d2t).tolist() == kept and not again.config.tie_draft_head
    assert torch.equal(again.draft_lm_head.weight, drafter.draft_lm_head.weight if own else lm_head.weight[kept])
    t2d = load_file(tmp_path / "out" / "model.safetensors")["t2d"]
    assert t2d.nonzero()[:, 0].tolist() == kept and t2d.shape == (VOCAB,)
    assert drafter.config.draft_vocab_size == 4  # the export has a config of its own


def test_without_rows_the_export_drafts_all_tokens(tmp_path):
    drafter = keeping(tiny_drafter(), 3, 5)
    export_speculators(drafter, tmp_path / "out", "acme/target")
    assert TreeFlashDraftModel.from_pretrained(tmp_path / "out").config.draft_vocab_size is None
    assert drafter.config.tie_draft_head


def test_adapters_are_merged_into_a_copy(tmp_path):
    peft = pytest.importorskip("peft")
    drafter = tiny_drafter()
    adapted = peft.get_peft_model(drafter, peft.LoraConfig(target_modules=["fc"], init_lora_weights=False))
    export_drafter(adapted, tmp_path / "out", target_id="acme/target")
    expected = drafter.fc.base_layer.weight + drafter.fc.get_delta_weight("default")
    exported = TreeFlashDraftModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported.fc.weight, expected)


def test_attached_adapters_are_refused(tmp_path, attaching_peft):
    attached = tiny_drafter()
    attached.add_adapter(attaching_peft.LoraConfig(target_modules=["fc"]))
    with pytest.raises(ValueError, match="merged"):
        export_drafter(attached, tmp_path / "attached", target_id="acme/target")
    assert not (tmp_path / "attached").exists()


def test_a_target_is_no_drafter(tmp_path):
    for export in (export_drafter, export_speculators):
        with pytest.raises(ValueError, match="'qwen3' is no TreeFlash drafter"):
            export(tiny_target(), tmp_path / "out", target_id="acme/target")
    assert not (tmp_path / "out").exists()


def test_published_cards_hold_nothing_that_must_not_be_published():
    cards = sorted((Path(__file__).parents[2] / "hub_cards").glob("*.md"))
    assert len(cards) >= 8
    for card in cards:
        check_file(card, card.name)
