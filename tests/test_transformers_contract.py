"""Every private or fragile name of transformers that the package leans on, so that a release names what moved.

Nothing here tests this package. A failure says which name changed; `grep` finds who uses it.
"""

import importlib
import inspect

import pytest
import torch
import transformers
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    Trainer,
    cache_utils,
    masking_utils,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_treeflash.compat import CACHE
from hf_treeflash.generation import tree_decoding
from tests.helpers.tiny import prompt, tiny_target


def parameters(function) -> list[str]:
    """Return the names of a function's arguments."""
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def prepared(target):
    """What `generate` hands to a decoding method: its generation config and the arguments of the model."""
    seen = {}

    def decoding(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.update(generation_config=generation_config, cache=kwargs[CACHE], kwargs=kwargs)
        return input_ids

    ids = prompt(batch=2)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    cache = DynamicCache(config=target.config)
    target.generate(ids, attention_mask=mask, max_new_tokens=2, custom_generate=decoding, **{CACHE: cache})
    assert seen["cache"] is cache
    return seen


# generate() and its decoding methods


def test_assisted_decoding_takes_what_ours_takes():
    theirs = inspect.signature(GenerationMixin._assisted_decoding).parameters
    ours = inspect.signature(tree_decoding).parameters
    assert list(theirs)[1:] == list(ours)[1:]  # the first is the model
    assert theirs["model_kwargs"].kind is ours["model_kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_generate_looks_assisted_decoding_up_on_the_class(target, monkeypatch):
    monkeypatch.setattr(type(target), "_assisted_decoding", lambda self, *args, **kwargs: "ours", raising=False)
    assert target.generate(prompt(), assistant_model=tiny_target(seed=1), max_new_tokens=2) == "ours"


def test_validate_generation_mode_takes():
    expected = ["self", "generation_mode", "generation_config", "generation_mode_kwargs"]
    assert parameters(GenerationMixin._validate_generation_mode) == expected


def test_validate_generation_mode_comes_before_any_work(target, monkeypatch):
    def stop(self, mode, generation_config, kwargs):
        assert isinstance(mode, GenerationMode) and "assistant_model" in kwargs
        raise RuntimeError("stopped")

    monkeypatch.setattr(GenerationMixin, "_validate_generation_mode", stop)
    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", None)
    with pytest.raises(RuntimeError, match="stopped"):
        target.generate(prompt(), assistant_model=tiny_target(seed=1), max_new_tokens=2)


def test_prefill_takes():
    assert parameters(GenerationMixin._prefill)[1:4] == ["input_ids", "generation_config", "model_kwargs"]


def test_all_parts_call_the_cache_by_one_name():
    from transformers.models.qwen3 import modeling_qwen3

    attention = modeling_qwen3.Qwen3Attention
    for function in (tiny_target().forward, attention.forward, GenerationMixin.prepare_inputs_for_generation):
        assert CACHE in parameters(function)


def test_prepare_inputs_for_generation_takes():
    names = parameters(GenerationMixin.prepare_inputs_for_generation)
    assert {"input_ids", CACHE, "attention_mask", "inputs_embeds", "is_first_iteration"} <= set(names)


def test_plain_decoding_takes_a_step_and_a_whole_call():
    assert {"outputs", "model_kwargs", "num_new_tokens"} <= set(
        parameters(GenerationMixin._update_model_kwargs_for_generation)
    )
    assert "next_sequence_length" in parameters(GenerationMixin.prepare_inputs_for_generation)
    names = {"input_ids", "logits_processor", "stopping_criteria", "generation_config", "streamer"}
    assert names <= set(parameters(GenerationMixin._sample))


def test_pipelines_load_assistants_by_a_function_of_their_module():
    from transformers.pipelines import base

    assert parameters(base.load_assistant_model) == ["model", "assistant_model", "assistant_tokenizer"]


def test_a_callers_cache_is_marked(prepared):
    assert prepared["cache"]._is_user_defined is True


def test_the_pad_token_is_a_tensor_beside_the_config(prepared):
    assert prepared["generation_config"]._pad_token_tensor.item() == 2


def test_decoding_methods_are_given_positions_and_a_mask(prepared):
    assert {"attention_mask", "position_ids", "use_cache", CACHE} <= set(prepared["kwargs"])


def test_generation_mode_names():
    assert {"ASSISTED_GENERATION", "GREEDY_SEARCH", "SAMPLE"} <= set(GenerationMode.__members__)


@pytest.mark.parametrize(
    "name",
    [
        *("assistant_early_exit", "speculation_type", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
        *("cache_implementation", "max_cache_len", "compile_config", "disable_compile", "use_cache"),
        *("output_scores", "output_logits", "output_hidden_states", "output_attentions"),
        *("return_dict_in_generate", "num_return_sequences", "do_sample", "temperature"),
    ],
)
def test_generation_config_has(name):
    assert name in vars(GenerationConfig())


def test_compile_config_fields():
    assert {"fullgraph", "dynamic", "backend", "mode", "options"} <= set(parameters(CompileConfig))
    assert "backend" in CompileConfig().to_dict()


def test_dictionary_output_fields():
    fields = {"sequences", "scores", "logits", "attentions", "hidden_states", "past_key_values"}
    assert fields <= set(dir(GenerateDecoderOnlyOutput(sequences=None, **({CACHE: 1}))))


# Processors and criteria


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.MaxLengthCriteria(7), "max_length"),
        (transformers.EosTokenCriteria(1), "eos_token_id"),
        (transformers.PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1), "_prefix_allowed_tokens_fn"),
        (transformers.TemperatureLogitsWarper(0.5), "temperature"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_processors_and_criteria_keep(owner, name):
    assert name in vars(owner)


# Caches


def test_cache_has():
    cache = DynamicCache()
    assert {"layers", "offloading"} <= set(vars(cache))
    assert callable(cache.activate_past_recording) and cache.get_seq_length() == 0
    assert "layers" in parameters(Cache.__init__)


@pytest.mark.parametrize("layer", [cache_utils.DynamicLayer(), cache_utils.DynamicSlidingWindowLayer(5)])
def test_layers_have(layer):
    layer.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    assert {"keys", "values", "is_initialized", "device"} <= set(vars(layer))
    assert layer.get_seq_length() == layer.keys.shape[2] == 3
    assert parameters(layer.batch_select_indices) == ["indices"]
    assert parameters(layer.update) == ["key_states", "value_states", "args", "kwargs"]


def test_only_sliding_layers_have_a_window_and_a_recorded_past():
    names = {"sliding_window", "cumulative_length", "record_past"}
    assert names <= set(vars(cache_utils.DynamicSlidingWindowLayer(5)))
    assert not names & set(dir(cache_utils.DynamicLayer()))


def test_recurrent_layers_hold_what_they_convolve_while_they_record():
    """Which layer runs is told by the very tensor that its convolution gets."""
    layer = cache_utils.LinearAttentionLayer()
    layer.update_conv_state(torch.ones(1, 2, 6), conv_kernel_size=4)
    assert layer.number_of_states == 1 and layer.conv_kernel_size[0] == 4
    assert layer.conv_states[0].shape == (1, 2, 4) and layer.recurrent_states[0] is None
    layer.activate_past_recording()
    assert layer.update_conv_state(torch.ones(1, 2, 3)) is layer.conv_states[0]
    assert layer.conv_states[0].shape == (1, 2, 7)
    assert parameters(Cache.update_recurrent_state)[1:3] == ["recurrent_states", "layer_idx"]


def test_models_with_a_state_say_so():
    assert transformers.JambaForCausalLM._is_stateful and not transformers.LlamaForCausalLM._is_stateful


WALKERS = {
    "qwen3_next": ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"],
    "kimi_linear": ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"],
    "bamba": ["mamba2_chunk_scan", "mamba2_selective_state_update"],
    "jamba": ["mamba_selective_scan", "mamba_selective_state_update"],
    "lfm2": [],
}


@pytest.mark.parametrize("family", WALKERS)
def test_recurrent_layers_look_these_up_in_their_module(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    names = {"causal_conv1d_fn", "causal_conv1d_update", *WALKERS[family]}
    layers = [value for value in vars(module).values() if inspect.isclass(value) and hasattr(value, "forward")]
    called = [set(inspect.unwrap(layer.forward).__code__.co_names) for layer in layers]
    assert any(names <= own for own in called)
    assert all(callable(getattr(module, name)) for name in names)


def test_a_sliding_layer_keeps_one_column_less_than_its_window_until_it_records():
    layer = cache_utils.DynamicSlidingWindowLayer(5)
    layer.update(torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4))
    assert (layer.keys.shape[2], layer.cumulative_length) == (4, 9)
    layer.activate_past_recording()
    assert layer.record_past is True
    layer.update(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4))
    assert (layer.keys.shape[2], layer.cumulative_length) == (10, 15)


def test_static_layers_take_a_length():
    assert parameters(cache_utils.StaticLayer)[0] == "max_cache_len"


# Models, configs, attention


def test_a_config_keeps_its_attention_under_a_private_name(target):
    config = target.config
    before = config._attn_implementation
    config._attn_implementation_internal = "eager"
    assert config._attn_implementation == "eager"
    config._attn_implementation_internal = before
    assert config._attn_implementation == before


def test_a_config_knows_its_text_part_and_where_it_came_from(target):
    assert target.config.get_text_config(decoder=True) is target.config
    assert isinstance(target.config.name_or_path, str) and isinstance(target.config._name_or_path, str)


@pytest.mark.parametrize(
    "name",
    [
        *("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"),
        *("_no_split_modules", "_skip_keys_device_placement", "_hf_peft_config_loaded", "_init_weights"),
        *("get_decoder", "get_input_embeddings", "get_output_embeddings", "supports_gradient_checkpointing"),
    ],
)
def test_models_have(name):
    assert hasattr(PreTrainedModel, name)


def test_a_decoder_keeps_layers_and_a_final_norm(target):
    decoder = target.get_decoder()
    assert len(decoder.layers) == target.config.num_hidden_layers and isinstance(decoder.norm, torch.nn.Module)


def test_dispatched_models_say_where_their_parts_are():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(tiny_target(), {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    assert set(model.hf_device_map) == {"model", "lm_head"}


def test_accelerate_marks_modules_whose_weights_are_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    module = torch.nn.Linear(2, 2)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert str(module._hf_hook.execution_device) == "cpu"


def test_attention_functions_take_and_are_looked_up_by_name():
    names = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]
    assert parameters(sdpa_attention_forward)[: len(names)] == names
    assert "position_bias" in parameters(sdpa_attention_forward)
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is sdpa_attention_forward
    assert callable(transformers.AttentionInterface.register)
    assert callable(transformers.AttentionMaskInterface.register)


def test_mask_functions_take():
    assert {"batch_size", "q_length", "kv_length", "mask_function"} <= set(parameters(masking_utils.sdpa_mask))
    for function in (
        masking_utils.create_bidirectional_mask,
        masking_utils.create_bidirectional_sliding_window_mask,
    ):
        assert {"config", "inputs_embeds", "attention_mask", CACHE} <= set(parameters(function))


def test_models_pass_ready_masks_on(target):
    ids = prompt()
    mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1]).masked_fill_(torch.ones(7, 7).triu(1).bool(), -1e9)
    with torch.no_grad():
        assert torch.allclose(target(ids, attention_mask=mask).logits, target(ids).logits, atol=1e-5)


def test_parts_of_qwen3_that_a_drafter_is_made_of():
    from transformers.models.qwen3 import modeling_qwen3

    assert parameters(modeling_qwen3.Qwen3RotaryEmbedding.forward)[1:3] == ["x", "position_ids"]
    assert parameters(modeling_qwen3.Qwen3MLP) == ["config"]
    assert parameters(modeling_qwen3.Qwen3RMSNorm)[:2] == ["hidden_size", "eps"]
    assert parameters(modeling_qwen3.eager_attention_forward)[:5] == [
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
    ]


def test_weights_are_initialised_through_transformers():
    from transformers import initialization

    assert callable(initialization.zeros_)
    assert "save_original_format" in parameters(PreTrainedModel.save_pretrained)


def test_an_embedding_may_hold_a_norm():
    from transformers.models.muse_glimmer import modeling_muse_glimmer

    assert "embed_norm" in inspect.getsource(modeling_muse_glimmer)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("Gemma2Config", ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "layer_types"]),
        ("GraniteConfig", ["logits_scaling"]),
        ("CohereConfig", ["logit_scale"]),
        ("FalconH1Config", ["lm_head_multiplier"]),
        ("Llama4TextConfig", ["attn_temperature_tuning", "attention_chunk_size"]),
        ("LlamaConfig", ["rope_parameters"]),
    ],
)
def test_configs_of_families_name(config, names):
    assert set(names) <= set(dir(getattr(transformers, config)()))


def test_layers_are_listed_under_these_names():
    assert "self.layers" in inspect.getsource(transformers.LlamaModel)
    assert "self.h " in inspect.getsource(transformers.GPT2Model)


# Files


def test_what_reads_and_writes_repositories():
    from transformers.dynamic_module_utils import get_relative_import_files
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    assert parameters(get_relative_import_files) == ["module_file"]
    assert parameters(cached_file)[:2] == ["path_or_repo_id", "filename"]
    assert parameters(get_checkpoint_shard_files)[:2] == ["pretrained_model_name_or_path", "index_filename"]


# The trainer


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("evaluation_loop", ["dataloader", "description"]),
        ("prediction_step", ["model", "inputs", "prediction_loss_only", "ignore_keys"]),
        ("create_optimizer", ["model"]),
        ("get_optimizer_cls_and_kwargs", ["args", "model"]),
        ("get_decay_parameter_names", ["model"]),
        ("log", ["logs", "start_time"]),
        ("_save", ["output_dir", "state_dict"]),
        ("_prepare_inputs", ["inputs"]),
        ("get_eval_dataloader", ["eval_dataset"]),
    ],
)
def test_trainer_methods_take(method, names):
    found = [name for name in parameters(getattr(Trainer, method)) if name != "self"]
    assert found[: len(names)] == names


def test_the_trainer_divides_the_loss_of_a_model_that_does_not():
    assert "model_accepts_loss_kwargs" in inspect.getsource(Trainer.training_step)


# PEFT


def test_names_of_adapted_models():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_target(), peft.LoraConfig(target_modules=["q_proj"]))
    assert callable(model.merge_and_unload) and callable(model.get_base_model) and model.peft_config
    layer = model.get_base_model().get_decoder().layers[0].self_attn.q_proj
    names = {"adapter_layer_names", "active_adapters", "disable_adapters", "merged_adapters", "base_layer", "lora_A"}
    assert names <= set(dir(layer))
