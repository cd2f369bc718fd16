"""What is refused, and what is not: a table of its own, compared with the page that lists it."""

import re
from contextlib import nullcontext
from functools import reduce
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import support_table
from rank_group import CASES
from vllm.config import CompilationMode
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.quantization import QuantizationMethods
from vllm.model_executor.model_loader import LoadFormats

from vllm_shift import limits

SUPPORT = support_table.PAGE.read_text()


def everything_unsupported(name):
    """A config whose every attribute asks for something; ``name`` says for which table."""
    model = SimpleNamespace(
        is_multimodal_model=True, multimodal_config=SimpleNamespace(language_model_only=False, mm_encoder_only=True),
        model_class_overrides={"LlamaForCausalLM": "mine:Llama"},
        is_encoder_decoder=True, runner_type="pooling", is_attention_free=True,
        using_transformers_backend=lambda: True, quantization="gguf", model_impl="terratorch", is_moe=True,
        hf_text_config=SimpleNamespace(
            rope_parameters={"full_attention": {"rope_type": "longrope"}}, param_sink_number=128
        ),
        architecture="Qwen3NextForCausalLM", is_deepseek_mla=True, use_mla=False,
    )  # fmt: skip
    speculative = SimpleNamespace(method="medusa", uses_dynamic_speculative_decoding=lambda: True)
    sizes = ("pipeline", "data", "prefill_context", "decode_context")
    engine = SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{f"{size}_parallel_size": 2 for size in sizes}, enable_eplb=True, use_ubatching=True,
            distributed_executor_backend="uni", nnodes=2,
        ),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(enable_sp=True, fuse_attn_quant=True), mode=1,
            dynamic_shapes_config=SimpleNamespace(type="unbacked"),
        ),
        lora_config=SimpleNamespace(fully_sharded_loras=True), speculative_config=speculative,
        weight_transfer_config=SimpleNamespace(backend="sparse_nccl"),
        ec_transfer_config=SimpleNamespace(ec_connector="ECExampleConnector"),
        cache_config=SimpleNamespace(
            cache_dtype="fp8_e5m2", calculate_kv_scales=True, kv_sharing_fast_prefill=True
        ),
        offload_config=SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=4), prefetch=None),
        load_config=SimpleNamespace(load_format="gguf"),
        device_config=SimpleNamespace(device_type="xpu"),
        model_config=SimpleNamespace(
            runner_type="pooling", is_moe=True, quantization="fp8", architecture="Olmo2ForCausalLM",
            enable_return_routed_experts=True, enforce_eager=False,
        ),
        observability_config=SimpleNamespace(enable_layerwise_nvtx_tracing=True),
        quant_config=SimpleNamespace(activation_scheme="dynamic", weight_block_size=None),
        additional_config={"shift_parallel": {"tensor_parallel_size": 2, "self_check": True}},
    )  # fmt: skip
    return {"model": model, "engine": engine}[name]


def test_what_was_tried_on_the_cpu_only_is_refused_on_cuda():
    config = everything_unsupported("engine")
    tried = [limit for limit in limits.ENGINE_LIMITS if limit.name.endswith("on CUDA")]
    assert len(tried) == 1
    for limit in tried:
        config.device_config.device_type = "cuda"
        assert limit.found(config)
        config.device_config.device_type = "cpu"
        assert not limit.found(config)


@pytest.mark.parametrize(
    ("executor", "engines", "named"),
    [("mp", "mp", None), ("ray", "mp", "ray"), ("mp", "ray", "ray"), ("uni", "mp", "uni")],
)
def test_data_parallelism_is_of_processes(executor, engines, named):
    parallel = SimpleNamespace(
        data_parallel_size=2, distributed_executor_backend=executor, data_parallel_backend=engines
    )
    table = tuple(limit for limit in limits.ENGINE_LIMITS if limit.name.startswith("data parallelism with executors"))
    with pytest.raises(ValueError, match=rf"multiprocessing \({named}\)") if named else nullcontext():
        limits.check(table, SimpleNamespace(parallel_config=parallel))


@pytest.mark.parametrize(("version", "refused"), [("0", True), ("1", False)])
def test_rays_older_executor_is_refused(version, refused, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", version)
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend="ray"))
    table = tuple(limit for limit in limits.ENGINE_LIMITS if limit.name.startswith("executors other than"))
    with pytest.raises(ValueError, match="ray with VLLM_USE_RAY_V2") if refused else nullcontext():
        limits.check(table, config)


@pytest.mark.parametrize(
    ("table", "name"),
    [(limits.MODEL_LIMITS, "model"), (limits.UNCHECKED_LIMITS, "model"), (limits.ENGINE_LIMITS, "engine")],
    ids=["model", "unchecked", "engine"],
)
def test_every_row_of_the_table_refuses(table, name, monkeypatch):
    for variable in (
        "BATCH_INVARIANT", "LORA_ENABLE_DUAL_STREAM", "TUNED_CONFIG_FOLDER", "MOE_SKIP_PADDING", "USE_NCCL_SYMM_MEM",
        "ALLREDUCE_USE_FLASHINFER", "USE_BREAKABLE_CUDAGRAPH", "MOE_ROUTING_SIMULATION_STRATEGY",
    ):  # fmt: skip
        monkeypatch.setenv(f"VLLM_{variable}", "1")
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    config = everything_unsupported(name)
    for limit in table:
        if name == "engine":
            config.device_config.device_type = "cuda" if limit.name.endswith("on CUDA") else "xpu"
        with pytest.raises(ValueError, match=re.escape(limit.name)) as error:
            limits.check((limit,), config)
        assert limit.instead in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "method", "refused"),
    [
        ({"activation_scheme": "dynamic", "weight_block_size": None}, "fp8", True),
        ({"activation_scheme": "static", "weight_block_size": None}, "fp8", False),
        ({"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8", False),
        ({}, "fp8_per_tensor", True),
        ({}, "compressed-tensors", False),
        ({}, "modelopt", False),
    ],
)
def test_experts_with_one_scale_for_all_tokens_are_refused(quantization, method, refused):
    config = everything_unsupported("engine")
    config.quant_config, config.model_config.quantization = SimpleNamespace(**quantization), method
    for config.model_config.is_moe in (True, False):
        found = [limit.name for limit in limits.ENGINE_LIMITS if limit.found(config)]
        assert any("one FP8 scale" in name for name in found) == (refused and config.model_config.is_moe)


def test_an_all_reduce_that_knows_one_group_only_is_refused_where_there_is_a_second(monkeypatch):
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "1")
    config = everything_unsupported("engine")
    for degree in (1, 2):
        config.additional_config["shift_parallel"]["tensor_parallel_size"] = degree
        found = [limit.name for limit in limits.ENGINE_LIMITS if limit.found(config)]
        assert ("FlashInfer's all-reduce with a tensor parallel size above 1" in found) == (degree == 2)


def test_everything_that_is_refused_is_named_at_once():
    config = everything_unsupported("engine")
    with pytest.raises(ValueError, match="nor ") as error:
        limits.check(limits.ENGINE_LIMITS, config)
    named = [limit for limit in limits.ENGINE_LIMITS if limit.name in str(error.value)]
    assert named == [limit for limit in limits.ENGINE_LIMITS if limit.found(config)]
    assert len(named) > 10


def test_the_page_repeats_the_table():
    lists = SUPPORT.split("\nOf the model:\n")[1].split("\n## ")[0]
    # Refused before there is a config to look at.
    listed = set(re.findall("^- (.*)$", lists, re.MULTILINE)) - {
        "a server for each data-parallel replica from one command (`--data-parallel-multi-port-external-lb`)"
    }
    assert listed == {limit.name for limit in (*limits.MODEL_LIMITS, *limits.UNCHECKED_LIMITS, *limits.ENGINE_LIMITS)}


def test_the_page_has_the_support_table_of_the_tests():
    assert support_table.replaced(SUPPORT) == SUPPORT
    tested = {support_table.architecture(case.name) for case in CASES}
    assert tested == set(limits.ARCHITECTURES + limits.ARCHITECTURES_OF_TRANSFORMERS)


def test_what_is_allowed_is_known_to_vllm():
    assert set(limits.CACHE_DTYPES) <= set(get_args(CacheDType))
    assert set(limits.LOAD_FORMATS) <= set(get_args(LoadFormats))
    assert set(limits.QUANTIZATIONS) <= set(get_args(QuantizationMethods))


def nothing_unsupported():
    """A config that asks for nothing special, of a model whose experts, if it has any, have scales of a checkpoint."""
    model = SimpleNamespace(
        is_multimodal_model=False, is_deepseek_mla=True, use_mla=True, model_class_overrides={},
        multimodal_config=SimpleNamespace(language_model_only=False, mm_encoder_only=False),
        is_encoder_decoder=False, runner_type="generate", is_attention_free=False,
        using_transformers_backend=lambda: False, quantization=None, model_impl="auto", is_moe=False,
        hf_text_config=SimpleNamespace(), architecture="LlamaForCausalLM", enable_return_routed_experts=False,
        enforce_eager=False,
    )  # fmt: skip
    sizes = ("pipeline", "data", "prefill_context", "decode_context")
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{f"{size}_parallel_size": 1 for size in sizes}, enable_eplb=False, use_ubatching=False,
            distributed_executor_backend="mp", data_parallel_backend="mp", nnodes=1,
        ),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(enable_sp=False, fuse_attn_quant=False), mode=CompilationMode.VLLM_COMPILE,
            dynamic_shapes_config=SimpleNamespace(type="backed"),
        ),
        observability_config=SimpleNamespace(enable_layerwise_nvtx_tracing=False),
        lora_config=None, speculative_config=None, weight_transfer_config=None, ec_transfer_config=None,
        quant_config=SimpleNamespace(activation_scheme="static"),
        cache_config=SimpleNamespace(cache_dtype="auto", calculate_kv_scales=False, kv_sharing_fast_prefill=False),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        load_config=SimpleNamespace(load_format="auto"), device_config=SimpleNamespace(device_type="cuda"),
        model_config=model, additional_config={"shift_parallel": {"tensor_parallel_size": 1, "self_check": True}},
    )  # fmt: skip


# What may be asked of an engine. Alone all of it works on CUDA, but for what is in REFUSED.
ASKED: dict[str, dict[str, Any]] = {
    "cpu": {"device_config.device_type": "cpu"},
    "eager": {"model_config.enforce_eager": True},
    "traced": {"observability_config.enable_layerwise_nvtx_tracing": True},
    "once": {"compilation_config.mode": CompilationMode.DYNAMO_TRACE_ONCE},
    "stages": {
        "parallel_config.pipeline_parallel_size": 2,
        "parallel_config.distributed_executor_backend": "external_launcher",
    },
    "replicas": {"parallel_config.data_parallel_size": 2},
    "nodes": {"parallel_config.nnodes": 2},
    "tp": {"additional_config": {"shift_parallel": {"tensor_parallel_size": 2, "self_check": True}}},
    "moe": {"model_config.is_moe": True},
    "fp8": {"model_config.quantization": "fp8"},
    "mxfp4": {"model_config.quantization": "gpt_oss_mxfp4"},
    "mxfp4-of-others": {"model_config.quantization": "mxfp4"},
    "lora": {"lora_config": SimpleNamespace(fully_sharded_loras=False)},
    "weights": {"weight_transfer_config": SimpleNamespace(backend="nccl")},
    "new": {"model_config.architecture": "NewForCausalLM"},
    "olmo": {"model_config.architecture": "Olmo2ForCausalLM"},
    "qwen": {"model_config.architecture": "Qwen2_5_VLForConditionalGeneration"},
    "images": {"model_config.is_multimodal_model": True},
    "text": {"model_config.multimodal_config.language_model_only": True},
    "pooling": {"model_config.runner_type": "pooling"},
    "drafts": {
        "speculative_config": SimpleNamespace(method="ngram", uses_dynamic_speculative_decoding=lambda: False),
    },
    "offload": {"offload_config.prefetch.offload_group_size": 4},
    "transformers": {"model_config.using_transformers_backend": lambda: True},
    "longrope": {"model_config.hf_text_config.rope_parameters": {"rope_type": "longrope"}},
    "unchecked": {"additional_config": {"shift_parallel": {"tensor_parallel_size": 1, "self_check": False}}},
    "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": {},
    "VLLM_MARLIN_INPUT_DTYPE=int8": {},
    "VLLM_MOE_SKIP_PADDING": {},
    "VLLM_TUNED_CONFIG_FOLDER": {},
    "VLLM_LORA_ENABLE_DUAL_STREAM": {},
}
REFUSED = {
    "once": "torch.compile without vLLM's own pipeline",
    "stages": "pipeline parallelism on CUDA",
    "images": "images and the like, of architectures not tested with them",
    "traced": "layerwise NVTX tracing of compiled models",
    "offload": "weight offloading",
    "pooling new": "pooling models of architectures not tested",
    "cpu stages drafts": "pipeline parallelism together with speculative decoding",
    "replicas nodes": "data parallelism together with --nnodes",
    "moe replicas": "data parallelism of mixture-of-experts models",
    "moe VLLM_MOE_SKIP_PADDING": "experts that skip padding",
    "moe VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "simulated routing to experts, with the self-check on",
    "fp8 VLLM_MARLIN_INPUT_DTYPE=int8": "quantized inputs of Marlin's kernels",
    "mxfp4-of-others": (
        "quantization methods other than FP8, ModelOpt's FP8, compressed-tensors, AWQ, GPTQ and MXFP4 of gpt-oss"
    ),
    "lora moe": "LoRA of mixture-of-experts or quantized models",
    "lora fp8": "LoRA of mixture-of-experts or quantized models",
    "lora new": "LoRA of architectures not tested",
    "lora VLLM_TUNED_CONFIG_FOLDER": "LoRA with tuned kernels",
    "lora VLLM_LORA_ENABLE_DUAL_STREAM": "LoRA on a second stream",
    "weights fp8": "weight transfer to a quantized model",
    "olmo tp": "OLMo 2 with a tensor parallel size above 1",
    "transformers moe": "mixture-of-experts, multimodal or quantized models of transformers",
    "transformers images text": "mixture-of-experts, multimodal or quantized models of transformers",
    "transformers fp8": "mixture-of-experts, multimodal or quantized models of transformers",
    "transformers longrope": "rotary embeddings of transformers that depend on the batch",
}
ALLOWED = [
    "",
    *(name for name in ASKED if name not in REFUSED),
    "cpu once",
    "cpu stages",
    "traced eager",
    "images qwen",
    "images text",
    "moe mxfp4",
    "moe unchecked VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
]


@pytest.mark.parametrize("asked", [*ALLOWED, *REFUSED])
def test_nothing_else_is_refused(asked, monkeypatch):
    config = nothing_unsupported()
    for name in asked.split():
        if name.startswith("VLLM_"):
            variable, _, value = name.partition("=")
            monkeypatch.setenv(variable, value or "1")
        for path, value in ASKED[name].items():
            *parents, last = path.split(".")
            setattr(reduce(getattr, parents, config), last, value)
    tables = ((limits.MODEL_LIMITS, config.model_config), (limits.ENGINE_LIMITS, config))
    found = [limit.name for table, of in tables for limit in table if limit.found(of)]
    assert found == ([REFUSED[asked]] if asked in REFUSED else [])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "vocabulary", "intermediate", "works"),
    [
        (16, 2, 700, 48, [2, 4, 8, 16]),  # vLLM pads the vocabulary to 704
        (16, 2, 700, [48, 24], [2, 4, 8]),
        (16, 2, 640, None, [2, 4, 8, 16]),
        (12, 6, 768, 48, [2, 3, 6, 12]),
        (12, 4, 704, 48, [2, 4]),
    ],
)
def test_a_number_of_ranks_that_does_not_divide_the_model_is_refused(heads, kv_heads, vocabulary, intermediate, works):
    text = SimpleNamespace(num_attention_heads=heads, vocab_size=vocabulary, intermediate_size=intermediate)
    model = SimpleNamespace(hf_text_config=text, get_total_num_kv_heads=lambda: kv_heads)
    for ranks in range(2, heads + 1):
        refused = pytest.raises(ValueError, match=f"{ranks} ranks do not .*KV heads {kv_heads}.*that work: ")
        with nullcontext() if ranks in works else refused as error:
            limits.check_model_shape(model, ranks)
        assert ranks in works or str(error.value).endswith(f": {works}")
