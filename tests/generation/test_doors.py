"""The ordinary doors of the ecosystem are open: pipelines, names, wrappers, training, several dtypes and devices."""

import functools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)
from transformers.pipelines import base as pipelines

import hf_treeflash
from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench.demo import EMBEDDED
from hf_treeflash.memory import recall
from tests.helpers.batches import padded
from tests.helpers.distribution import check_distribution, text_distribution
from tests.helpers.tiny import VOCAB, keeping, prompt, tiny_drafter, tiny_target, with_knobs
from tests.layouts.published import READ
from tests.layouts.rounds import make_target, write

GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture
def target():
    return tiny_target()


def drafter(**knobs):
    return with_knobs(tiny_drafter(), **{"tree_budget": 16, **knobs})


def check(target, assistant, batch: int = 1, **settings) -> None:
    """Compare texts."""
    settings = {**GREEDY, **padded(batch), **settings}
    plain = target.generate(**settings)
    assert torch.equal(plain, target.generate(**settings, assistant_model=assistant))


# Pipelines


@pytest.fixture(scope="module")
def embedded():
    """The pair of the package: special tokens of the two configs differ."""
    target = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32)
    pair = target, TreeFlashDraftModel.from_pretrained(EMBEDDED / "drafter", dtype=torch.float32)
    assert pair[0].config.eos_token_id != pair[1].config.eos_token_id
    return *pair, AutoTokenizer.from_pretrained(EMBEDDED / "target")


TEXTS = ["def parse(path):\n", "import os\n\nclass Reader", "    return self"]
SETTINGS = GenerationConfig(max_new_tokens=20, do_sample=False)


def text_of(pipe, text, **settings):
    return pipe(text, generation_config=SETTINGS, **settings)


@pytest.mark.parametrize("how", ["object", "name", "object and tokenizer", "wrapped for training"])
def test_a_pipeline_is_built_with_the_drafter(embedded, how):
    target, assistant, tokenizer = embedded
    given = {"assistant_model": str(EMBEDDED / "drafter") if how == "name" else assistant}
    if how == "object and tokenizer":  # what transformers' error used to ask for
        given["assistant_tokenizer"] = tokenizer
    if how == "wrapped for training":
        given["assistant_model"] = nn.DataParallel(assistant)
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    drafted = pipeline("text-generation", model=target, tokenizer=tokenizer, **given)
    passes = []
    handle = target.register_forward_pre_hook(lambda *_: passes.append(1))
    assert text_of(plain, TEXTS[0]) == text_of(drafted, TEXTS[0])
    handle.remove()
    assert len(passes) < 2 * 20  # the drafter was used
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    assert text_of(plain, TEXTS, batch_size=3) == text_of(drafted, TEXTS, batch_size=3)


def test_pipelines_of_other_assistants_are_transformers_own(embedded):
    target, _, tokenizer = embedded
    other = GPT2LMHeadModel(GPT2Config(vocab_size=target.config.vocab_size, n_embd=16, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="should pass the assistant tokenizer"):
        pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=other)
    built = pipeline(
        "text-generation", model=target, tokenizer=tokenizer, assistant_model=other, assistant_tokenizer=tokenizer
    )
    assert built.assistant_model is other and built.assistant_tokenizer is tokenizer
    assert pipeline("text-generation", model=target, tokenizer=tokenizer).assistant_model is None


def test_the_hook_into_pipelines_can_be_removed():
    hooked = pipelines.load_assistant_model
    hf_treeflash.remove_hook()
    try:
        assert pipelines.load_assistant_model is hooked._before_treeflash
    finally:
        hf_treeflash.install_hook()
    assert hasattr(pipelines.load_assistant_model, "_before_treeflash")


# Names


@pytest.mark.parametrize("published", READ, ids=lambda published: published.name)
def test_a_name_is_loaded_by_our_loader_in_any_layout(published, tmp_path):
    target, folder = make_target(published.target), write(published, tmp_path / "d")
    plain = target.generate(prompt(), **GREEDY)
    for name in (str(folder), folder):
        assert torch.equal(plain, target.generate(prompt(), **GREEDY, assistant_model=name))


def test_a_named_drafter_is_loaded_once_in_the_targets_dtype(tmp_path):
    target = tiny_target().to(torch.bfloat16)
    drafter(tree_budget=5).save_pretrained(tmp_path)
    target.generate(prompt(), **GREEDY, assistant_model=str(tmp_path))
    loaded = recall(f"drafter {tmp_path}", target)
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.tree_budget == 5
    target.generate(prompt(), **GREEDY, assistant_model=str(tmp_path))
    assert recall(f"drafter {tmp_path}", target) is loaded


def test_a_named_adapter(target, tmp_path):
    peft = pytest.importorskip("peft")
    drafter().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    check(target, str(tmp_path / "adapter"))


@pytest.mark.parametrize("what", ["a target's folder", "nothing", "an empty folder", "broken json"])
def test_names_that_lead_to_no_drafter(target, tmp_path, what):
    if what == "a target's folder":
        target.save_pretrained(tmp_path)
    if what == "broken json":
        (tmp_path / "config.json").write_text("{")
    name = str(tmp_path / "missing") if what == "nothing" else str(tmp_path)
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        target.generate(prompt(), **GREEDY, assistant_model=name)


# Classes that are not ours


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("name", ["TreeFlash", "DFlash", "JetSpec"])
@pytest.mark.parametrize("speculation", [None, "dflash"])
def test_a_drafter_in_another_class_is_told_its_loader(target, tmp_path, loader, name, speculation):
    published = next(published for published in READ if published.name == name)
    folder = write(published, tmp_path / "d")
    foreign = loader.from_pretrained(folder)
    message = rf"in the class {type(foreign).__name__}.*TreeFlashDraftModel.from_pretrained\('{folder}'\)"
    with pytest.raises(ValueError, match=message):
        target.generate(prompt(), **GREEDY, assistant_model=foreign, speculation_type=speculation)


# Wrappers


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, "ddp", torch.compile], ids=["DataParallel", "DistributedDataParallel", "compiled"]
)
def test_wrapped_drafters(target, wrap, tmp_path):
    if wrap != "ddp":
        check(target, wrap(drafter()))
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check(target, nn.parallel.DistributedDataParallel(drafter()), batch=3)
    finally:
        torch.distributed.destroy_process_group()


def passing_on(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def wrapped_properly(model):
    forward = model.forward

    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    model.forward = call
    return model


def subclassed(model):
    def forward(self, *args, **kwargs):
        return type(self).__mro__[1].forward(self, *args, **kwargs)

    model.__class__ = type("PassesOn", (type(model),), {"forward": forward})
    return model


def partially(model):
    model.forward = functools.partial(model.forward)
    return model


@pytest.mark.parametrize("wrap", [passing_on, wrapped_properly, subclassed, partially])
@pytest.mark.parametrize("batch", [1, 3])
def test_forwards_that_pass_on_what_they_are_given(wrap, batch):
    check(wrap(tiny_target()), drafter(), batch)


def test_a_forward_that_hides_its_arguments_in_a_conversation():
    texts = []
    for assistant in ({}, {"assistant_model": drafter()}):
        target = passing_on(tiny_target("mistral"))
        ids = prompt(9)
        for _ in range(3):
            ids = torch.cat([target.generate(ids, **GREEDY, **assistant), prompt(2, seed=3)], dim=1)
        texts.append(ids)
    assert torch.equal(*texts)


# Training


@pytest.mark.parametrize("family", ["qwen3", "mistral", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_target_in_training(family, checkpointing, batch):
    target = tiny_target(family).train()
    if checkpointing:
        target.gradient_checkpointing_enable()
    check(target, drafter().train(), batch)
    output = target.generate(prompt(), assistant_model=drafter(), return_dict_in_generate=True, **GREEDY)
    assert output.block_efficiency >= 1 and target.training


def test_dropout_stops_nothing(target):
    target = tiny_target(attention_dropout=0.3).train()
    assert target.generate(prompt(), assistant_model=drafter(), **GREEDY).shape == (1, 7 + 16)


def test_in_the_middle_of_a_training_step(target):
    """Gradients that are under way are not touched."""
    target.train()
    loss = target(prompt(), labels=prompt()).loss
    check(target.eval(), drafter())
    loss.backward()
    assert all(weight.grad is not None for weight in target.parameters())


# Dtypes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_embedding_of_another_dtype(attention, static, batch):
    target = tiny_target()
    target.set_attn_implementation(attention)
    target.get_input_embeddings().to(torch.bfloat16)
    plain = target.generate(**padded(batch), **GREEDY)
    assert torch.equal(plain, target.generate(**padded(batch), assistant_model=drafter(), **GREEDY, **static))


@pytest.mark.parametrize("where", ["norm", "lm_head", "embeddings of a drafter in half precision"])
def test_other_parts_of_another_dtype(where):
    target = tiny_target()
    if where == "norm":  # kept in single precision, as some models do with theirs
        target = target.to(torch.bfloat16)
        target.model.norm.to(torch.float32)
        target.lm_head.to(torch.float32)
    elif where == "lm_head":
        target.lm_head.to(torch.float64)
        head = target.lm_head.forward
        target.lm_head.forward = lambda states: head(states.double())
    else:
        target.get_input_embeddings().to(torch.float16)
    target.generate(**padded(3), **GREEDY, assistant_model=drafter())
    if where != "norm":  # in half precision near-ties may fall either way
        check(target, drafter(), batch=3)


def test_under_autocast(target):
    with torch.autocast("cpu", torch.bfloat16):
        target.generate(**padded(3), **GREEDY, assistant_model=drafter())


# Vocabularies


@pytest.mark.parametrize("size", [25, 32, 64, 128])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_vocabulary_with_more_rows(size, batch):
    target = tiny_target()
    target.resize_token_embeddings(size)
    torch.nn.init.normal_(target.get_output_embeddings().weight.data[VOCAB:], std=0.3)
    check(target, drafter(), batch)
    check(target, drafter(), batch, prefix_allowed_tokens_fn=lambda row, ids: [size - 1, 5, 6, 7])
    check(target, keeping(drafter(), 4, 9, 11, 23), batch, suppress_tokens=[5, 6])
    check(target, drafter(), batch, cache_implementation="static")


def test_a_vocabulary_with_a_row_less(target):
    target.resize_token_embeddings(VOCAB - 1)
    check(target, drafter(), input_ids=prompt(14).clamp(max=VOCAB - 2))


@pytest.mark.parametrize("size", [12, VOCAB + 256, 1000])
def test_another_vocabulary_is_still_refused(target, size):
    target.resize_token_embeddings(size)
    with pytest.raises(ValueError, match=f"`vocab_size` is {VOCAB}, the target's is {size}"):
        target.generate(prompt(), assistant_model=drafter(), **GREEDY)


# Several sequences of a prompt


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("static", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_several_sequences_of_a_prompt(target, batch, static):
    settings = {**GREEDY, **padded(batch), "do_sample": True, "num_return_sequences": 4, "top_k": 1}
    plain = target.generate(**settings)
    tree = target.generate(**settings, **static, assistant_model=drafter())
    assert torch.equal(plain, tree) and len(tree) == 4 * batch  # one likely token: as greedy, rows repeated


def test_several_sequences_are_drawn_independently(target):
    torch.manual_seed(1)
    settings = {**GREEDY, "do_sample": True, "num_return_sequences": 8, "return_dict_in_generate": True}
    output = target.generate(prompt(), assistant_model=drafter(), **settings)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 8
    assert len(output.acceptance_lengths) == 8


def test_several_sequences_follow_the_targets_distribution():
    target, ids = tiny_target(vocab_size=8, initializer_range=0.1), torch.tensor([[4, 5, 6]])
    assistant = with_knobs(tiny_drafter(vocab_size=8), tree_budget=8)
    settings = {"do_sample": True, "max_new_tokens": 2, "eos_token_id": None, "num_return_sequences": 500}
    texts = [row for _ in range(4) for row in target.generate(ids, assistant_model=assistant, **settings).tolist()]
    check_distribution(text_distribution(target, ids, 2), [text[3:] for text in texts])


def test_greedy_sequences_are_refused_as_by_transformers(target):
    settings = {**GREEDY, "num_return_sequences": 2}
    errors = []
    for assistant in ({}, {"assistant_model": drafter()}):
        with pytest.raises(ValueError) as caught:
            target.generate(prompt(), **settings, **assistant)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
