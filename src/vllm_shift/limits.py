"""What Shift Parallelism does not support, as one table, checked in the process that reads the flags.

docs/support.md repeats the names of this table; a test compares them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.config import CompilationMode
from vllm.utils.math_utils import round_up

from vllm_shift.config import CONFIG_KEY

# Each is tested against transformers and stock vLLM, in both modes. Others run by the self-check only.
ARCHITECTURES = (
    "CohereForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "Llama4ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

# Tested with images, too, on the CPU backend. The part that encodes them runs as in TP mode.
MULTIMODAL_ARCHITECTURES = ("Qwen2_5_VLForConditionalGeneration",)

# Tested on the CPU backend with --language-model-only: the language model alone, of checkpoints that take images.
TEXT_ONLY_ARCHITECTURES = (
    "Gemma3ForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)

# Likewise tested; vLLM has no implementation of its own and takes that of transformers.
ARCHITECTURES_OF_TRANSFORMERS = ("Olmo2ForCausalLM",)

# Qwen3-Next, in whose code Qwen3.5 runs, gathers tokens by itself where there are fewer rows than positions; HunYuan V3
# tells attention how many rows to give.
COUNT_ROWS = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "HYV3ForCausalLM",
)

TESTED = ARCHITECTURES + MULTIMODAL_ARCHITECTURES + TEXT_ONLY_ARCHITECTURES + ARCHITECTURES_OF_TRANSFORMERS

# All of them fill parameters through the weight loaders that know the slots.
LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "npcache", "mistral", "runai_streamer", "dummy")

# The layers check the details (quantized.py).
QUANTIZATIONS = (
    "auto_awq",
    "auto_gptq",
    "awq",
    "awq_marlin",
    "compressed-tensors",
    "fp8",
    "fp8_per_tensor",
    "gpt_oss_mxfp4",
    "gptq",
    "gptq_marlin",
    "modelopt",  # FP8 only: of its other formats vLLM makes modelopt_fp4, modelopt_mxfp8 and modelopt_mixed
)

CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3")

# A draft model of any of these runs in TP mode only.
SPECULATIVE_METHODS = ("ngram", "eagle", "eagle3", "draft_model")

# These reload whole weights, others may write into the parameters, which are one slot of several.
WEIGHT_TRANSFER_BACKENDS = ("nccl", "ipc")

EXECUTORS = ("mp", "ray", "external_launcher")


@dataclass(frozen=True)
class Limit:
    """One thing that is refused.

    Attributes:
        name: what it is, in the words of vLLM's documentation.
        found: given vLLM's config (of the model in the tables of models, else of the engine), the value that asks for
            it, or something false.
        instead: what would work.
    """

    name: str
    found: Callable[[Any], Any]
    instead: str


def _above_one(config: Any, name: str) -> Any:
    size = getattr(config.parallel_config, name)
    return size if size > 1 else None


def _tp_above_one(config: Any) -> bool:
    degree: int = config.additional_config[CONFIG_KEY]["tensor_parallel_size"]
    return degree > 1


def _experts_share_a_scale(config: Any) -> bool:
    """Whether experts quantize all tokens of a step with one scale, measured as they run (FP8, no blocks)."""
    model, quantization = config.model_config, config.quant_config
    blocks = getattr(quantization, "weight_block_size", None)
    dynamic = getattr(quantization, "activation_scheme", "dynamic") == "dynamic"
    return model.is_moe and model.quantization in ("fp8", "fp8_per_tensor") and dynamic and not blocks


def _not_in(value: Any, allowed: tuple[str, ...]) -> Any:
    return None if str(value) in allowed else value


def _unknown_executor(config: Any) -> Any:
    backend = config.parallel_config.distributed_executor_backend
    if backend == "ray" and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        # It calls the model runner past the worker, and steps change their CUDA stream on the way.
        return "ray with VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0"
    return _not_in(backend, EXECUTORS)


def _compiles_by_itself(config: Any) -> bool:
    mode, device = config.compilation_config.mode, config.device_config.device_type
    # DYNAMO_TRACE_ONCE is the CPU backend's default; on CUDA every step of SP mode would run uncompiled.
    once = mode == CompilationMode.DYNAMO_TRACE_ONCE and device == "cuda"
    return bool(once or mode == CompilationMode.STOCK_TORCH_COMPILE)


def _rope_of_batch(model: Any) -> Any:
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    return model.using_transformers_backend() and " and ".join(sorted({"dynamic", "longrope"} & kinds))


def _takes_more_than_text(model: Any) -> bool:
    return model.is_multimodal_model and not model.multimodal_config.language_model_only


MODEL_LIMITS = (
    Limit(
        "images and the like, of architectures not tested with them",
        lambda model: _takes_more_than_text(model) and _not_in(model.architecture, MULTIMODAL_ARCHITECTURES),
        f"set --language-model-only, or use one of {', '.join(MULTIMODAL_ARCHITECTURES)}",
    ),
    Limit(
        "encoders of images without their language model",
        lambda model: model.is_multimodal_model and model.multimodal_config.mm_encoder_only,
        "start stock vLLM for them, or leave out --mm-encoder-only",
    ),
    Limit(
        # They go by the names of architectures that were tested.
        "model classes in the place of vLLM's own",
        lambda model: ", ".join(model.model_class_overrides),
        "register the class under an architecture of its own, or leave out --model-class-overrides",
    ),
    Limit("encoder-decoder models", lambda model: model.is_encoder_decoder, "use a decoder-only model"),
    Limit(
        "pooling models of architectures not tested",
        lambda model: model.runner_type != "generate" and _not_in(model.architecture, ARCHITECTURES),
        f"use one of {', '.join(ARCHITECTURES)}",
    ),
    Limit("attention-free models", lambda model: model.is_attention_free, "use a model with attention layers"),
    Limit(
        "Qwen3-Next, Qwen3.5 and HunYuan V3 models",
        lambda model: model.architecture in COUNT_ROWS and model.architecture,
        "use stock vLLM's tensor parallelism: leave out --ulysses-sequence-parallel-size",
    ),
    Limit(
        # vLLM writes them to the first blocks of the KV cache once, and the self-check uses these blocks.
        "attention sinks that are kept in the KV cache",
        lambda model: getattr(model.hf_text_config, "param_sink_number", 0),
        "use stock vLLM's tensor parallelism: leave out --ulysses-sequence-parallel-size",
    ),
    Limit(
        # The layers that expand its latent vectors would be given those of a rank, and positions of all slots.
        "multi-head latent attention without its kernels",
        lambda model: model.is_deepseek_mla and not model.use_mla,
        "unset VLLM_MLA_DISABLE",
    ),
    Limit(
        "quantization methods other than FP8, ModelOpt's FP8, compressed-tensors, AWQ, GPTQ and MXFP4 of gpt-oss",
        lambda model: _not_in(model.quantization, QUANTIZATIONS),
        f"use one of {', '.join(QUANTIZATIONS)}, or an unquantized checkpoint",
    ),
    Limit(
        "model implementations other than vLLM's own and that of transformers",
        lambda model: _not_in(model.model_impl, ("auto", "vllm", "transformers")),
        "leave --model-impl at auto",
    ),
    Limit(
        "mixture-of-experts, multimodal or quantized models of transformers",
        lambda model: (
            model.using_transformers_backend() and (model.is_moe or model.is_multimodal_model or model.quantization)
        ),
        "use a model that vLLM implements itself, and leave --model-impl at auto",
    ),
    Limit(
        # Code of transformers decides by the largest position of the step, of which a rank has a part.
        "rotary embeddings of transformers that depend on the batch",
        _rope_of_batch,
        "use a model that vLLM implements itself, and leave --model-impl at auto",
    ),
)

# Without the self-check at start-up.
UNCHECKED_LIMITS = (
    Limit(
        "architectures not tested yet, with the self-check off",
        lambda model: _not_in(model.architecture, TESTED),
        f'leave additional_config["shift_parallel"]["self_check"] at true, or use one of {", ".join(TESTED)}',
    ),
)

ENGINE_LIMITS = (
    Limit(
        # vLLM's norms over all heads in code of transformers gather from all P ranks, those of SP mode are on T.
        "OLMo 2 with a tensor parallel size above 1",
        lambda config: config.model_config.architecture == "Olmo2ForCausalLM" and _tp_above_one(config),
        "set --tensor-parallel-size 1, and --ulysses-sequence-parallel-size to the number of ranks",
    ),
    Limit(
        "pipeline parallelism on CUDA",
        lambda config: config.device_config.device_type == "cuda" and _above_one(config, "pipeline_parallel_size"),
        "tried on the CPU backend only; set --pipeline-parallel-size 1",
    ),
    Limit(
        "pipeline parallelism with executors other than external_launcher",
        lambda config: (
            _above_one(config, "pipeline_parallel_size")
            and _not_in(config.parallel_config.distributed_executor_backend, ("external_launcher",))
        ),
        "tried with external_launcher only; set --pipeline-parallel-size 1",
    ),
    Limit(
        "data parallelism of mixture-of-experts models",
        lambda config: config.model_config.is_moe and _above_one(config, "data_parallel_size"),
        "start one server a replica, behind a load balancer",
    ),
    Limit(
        "data parallelism with executors other than multiprocessing",
        lambda config: (
            _above_one(config, "data_parallel_size")
            and (
                _not_in(config.parallel_config.distributed_executor_backend, ("mp",))
                or _not_in(config.parallel_config.data_parallel_backend, ("mp",))
            )
        ),
        "use --distributed-executor-backend mp and --data-parallel-backend mp",
    ),
    Limit(
        "data parallelism together with --nnodes",
        # Of a dense model vLLM makes engines without data parallelism, which take all nodes for theirs
        # (run_engine_core in vllm/v1/engine/core.py, nnodes_within_dp in vllm/config/parallel.py).
        lambda config: _above_one(config, "data_parallel_size") and _above_one(config, "nnodes"),
        "leave out --nnodes, and start each node with its own --data-parallel-start-rank",
    ),
    Limit(
        "prefill context parallelism",
        lambda config: _above_one(config, "prefill_context_parallel_size"),
        "leave out its flag",
    ),
    Limit(
        "decode context parallelism",
        lambda config: _above_one(config, "decode_context_parallel_size"),
        "leave out its flag",
    ),
    Limit(
        "expert parallel load balancing", lambda config: config.parallel_config.enable_eplb, "leave out --enable-eplb"
    ),
    Limit(
        # What vLLM marks as padding is of TP mode's rows.
        "experts that skip padding",
        lambda config: config.model_config.is_moe and envs.VLLM_MOE_SKIP_PADDING,
        "unset VLLM_MOE_SKIP_PADDING",
    ),
    Limit(
        # Compiled, SP mode pads the tokens to a multiple of S, and what is in the padding would count.
        "experts that quantize a step's tokens with one FP8 scale",
        _experts_share_a_scale,
        "use a checkpoint with scales by blocks, or one of compressed-tensors",
    ),
    Limit(
        # Random, so that it differs between the modes.
        "simulated routing to experts, with the self-check on",
        lambda config: (
            config.model_config.is_moe
            and config.additional_config[CONFIG_KEY]["self_check"]
            and envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY
        ),
        'unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY, or set additional_config["shift_parallel"]["self_check"] to false',
    ),
    Limit(
        # Not tried, and the self-check takes the inputs of INT4 layers for unquantized.
        "quantized inputs of Marlin's kernels",
        lambda config: config.model_config.quantization and envs.VLLM_MARLIN_INPUT_DTYPE,
        "unset VLLM_MARLIN_INPUT_DTYPE",
    ),
    Limit(
        "returning the experts that tokens were routed to",
        lambda config: config.model_config.enable_return_routed_experts,
        "leave out --enable-return-routed-experts",
    ),
    Limit("dual batch overlap", lambda config: config.parallel_config.use_ubatching, "leave out --enable-dbo"),
    Limit(
        "vLLM's sequence parallelism pass",
        lambda config: config.compilation_config.pass_config.enable_sp,
        "leave out pass_config.enable_sp and pass_config.fuse_gemm_comms",
    ),
    Limit(
        # SP mode has the exchange between them, and FlashInfer's attention divides by a scale from then on.
        "the fusion of attention with the quantization of its output",
        lambda config: config.compilation_config.pass_config.fuse_attn_quant,
        "leave out pass_config.fuse_attn_quant",
    ),
    Limit(
        # Models then say that there are as many tokens as positions, of which SP mode has one for each slot.
        "unbacked dynamic shapes",
        lambda config: config.compilation_config.dynamic_shapes_config.type == "unbacked",
        "leave dynamic_shapes_config.type at backed",
    ),
    Limit(
        "torch.compile without vLLM's own pipeline",
        _compiles_by_itself,
        "leave the compilation mode at its default",
    ),
    Limit(
        # vLLM puts its hooks on the model's layers once one mode is compiled.
        "layerwise NVTX tracing of compiled models",
        lambda config: (
            config.observability_config.enable_layerwise_nvtx_tracing and not config.model_config.enforce_eager
        ),
        "set --enforce-eager, or leave out --enable-layerwise-nvtx-tracing",
    ),
    Limit(
        "batch invariance",
        lambda config: envs.VLLM_BATCH_INVARIANT,
        "unset VLLM_BATCH_INVARIANT: sums are rounded differently in the two modes",
    ),
    Limit(
        # Its all-reduce sums over the first group that is made, whichever calls it, and gathered rows last until the
        # next ones.
        "NCCL's symmetric memory",
        lambda config: envs.VLLM_USE_NCCL_SYMM_MEM,
        "unset VLLM_USE_NCCL_SYMM_MEM",
    ),
    Limit(
        # It has one workspace in a process, for the first group that asks.
        "FlashInfer's all-reduce with a tensor parallel size above 1",
        lambda config: _tp_above_one(config) and envs.VLLM_ALLREDUCE_USE_FLASHINFER,
        "unset VLLM_ALLREDUCE_USE_FLASHINFER",
    ),
    Limit(
        # Not tried: both modes would run without vLLM's compilation.
        "breakable CUDA graphs",
        lambda config: envs.VLLM_USE_BREAKABLE_CUDAGRAPH,
        "unset VLLM_USE_BREAKABLE_CUDAGRAPH, or set it to 0 where vLLM chooses it for the model",
    ),
    Limit(
        # The model itself picks the rows that later layers see.
        "fast prefill of models that share KV caches between layers",
        lambda config: config.cache_config.kv_sharing_fast_prefill,
        "leave out --kv-sharing-fast-prefill",
    ),
    Limit(
        # The self-check has no adapters.
        "LoRA of architectures not tested",
        lambda config: config.lora_config and _not_in(config.model_config.architecture, ARCHITECTURES),
        f"leave out --enable-lora, or use one of {', '.join(ARCHITECTURES)}",
    ),
    Limit(
        "LoRA of mixture-of-experts or quantized models",
        lambda config: config.lora_config and (config.model_config.is_moe or config.model_config.quantization),
        "leave out --enable-lora, or merge the adapter into the checkpoint",
    ),
    Limit(
        "fully sharded LoRA",
        lambda config: config.lora_config and config.lora_config.fully_sharded_loras,
        "leave out --fully-sharded-loras",
    ),
    Limit(
        # They are looked up by a number of slices that layers of stock vLLM have.
        "LoRA with tuned kernels",
        lambda config: config.lora_config and envs.VLLM_TUNED_CONFIG_FOLDER,
        "unset VLLM_TUNED_CONFIG_FOLDER",
    ),
    Limit(
        "LoRA on a second stream",
        lambda config: config.lora_config and envs.VLLM_LORA_ENABLE_DUAL_STREAM,
        "unset VLLM_LORA_ENABLE_DUAL_STREAM",
    ),
    Limit(
        "speculative decoding other than n-gram, EAGLE, EAGLE-3 and draft models",
        lambda config: config.speculative_config and _not_in(config.speculative_config.method, SPECULATIVE_METHODS),
        f"use one of the methods {', '.join(SPECULATIVE_METHODS)}",
    ),
    Limit(
        "dynamic speculative decoding",
        lambda config: config.speculative_config and config.speculative_config.uses_dynamic_speculative_decoding(),
        "leave num_speculative_tokens_per_batch_size out of --speculative-config",
    ),
    Limit(
        "pipeline parallelism together with speculative decoding",
        lambda config: config.speculative_config and _above_one(config, "pipeline_parallel_size"),
        "use one of the two",
    ),
    Limit(
        "KV caches quantized otherwise than to FP8",
        lambda config: _not_in(config.cache_config.cache_dtype, CACHE_DTYPES),
        f"use one of --kv-cache-dtype {', '.join(CACHE_DTYPES)}",
    ),
    Limit(
        "scales of a KV cache computed from the first step",
        lambda config: config.cache_config.calculate_kv_scales,
        "leave out --calculate-kv-scales: scales are those of the checkpoint, or 1",
    ),
    Limit(
        "weight offloading",
        lambda config: config.offload_config.uva.cpu_offload_gb or config.offload_config.prefetch.offload_group_size,
        "leave out --cpu-offload-gb and --offload-group-size",
    ),
    Limit(
        "encoder cache connectors",
        lambda config: config.ec_transfer_config and config.ec_transfer_config.ec_connector,
        "leave out --ec-transfer-config",
    ),
    Limit(
        "weight transfer other than of whole checkpoints",
        lambda config: (
            config.weight_transfer_config and _not_in(config.weight_transfer_config.backend, WEIGHT_TRANSFER_BACKENDS)
        ),
        f"use one of the backends {', '.join(WEIGHT_TRANSFER_BACKENDS)}",
    ),
    Limit(
        "weight transfer to a quantized model",
        lambda config: config.weight_transfer_config and config.model_config.quantization,
        "use an unquantized model, or leave out --weight-transfer-config",
    ),
    Limit(
        "load formats that bypass the weight loaders, or have not been tried",
        lambda config: _not_in(config.load_config.load_format, LOAD_FORMATS),
        f"use one of --load-format {', '.join(LOAD_FORMATS)}",
    ),
    Limit(
        "executors other than multiprocessing, Ray and external_launcher",
        _unknown_executor,
        "use --distributed-executor-backend mp or ray, and leave VLLM_USE_RAY_V2_EXECUTOR_BACKEND at 1",
    ),
    Limit(
        "platforms other than CUDA and CPU",
        lambda config: _not_in(config.device_config.device_type, ("cuda", "cpu")),
        "use a CUDA or CPU build of vLLM",
    ),
)


def check(limits: tuple[Limit, ...], config: Any) -> None:
    """Compare a config with a table.

    Raises:
        ValueError: the config asks for something in the table; names all such things.
    """
    reasons = []
    for limit in limits:
        if value := limit.found(config):
            shown = "" if value is True else f" ({value})"
            reasons.append(f"{limit.name}{shown}: {limit.instead}")
    if reasons:
        raise ValueError("Shift Parallelism does not support " + "; nor ".join(reasons))


def check_model_shape(model: Any, world_size: int) -> None:
    """Compare a model's sizes with the number of ranks.

    Args:
        model: vLLM's ``ModelConfig``.
        world_size: SP x TP.

    Raises:
        ValueError: a size does not divide; names it and the numbers of ranks that would work.
    """
    text = model.hf_text_config
    heads, kv_heads = text.num_attention_heads, model.get_total_num_kv_heads()
    # vLLM pads the vocabulary to a multiple of 64 before it shards it.
    vocabulary = round_up(text.vocab_size, 64)
    sizes = {"attention heads": heads, "padded vocabulary": vocabulary}
    if intermediate := getattr(text, "intermediate_size", None):
        # Some models have one for each layer, and ranks have to divide them all.
        sizes["intermediate size"] = math.gcd(*intermediate) if isinstance(intermediate, list) else intermediate

    def fits(ranks: int) -> bool:
        even = all(size % ranks == 0 for size in sizes.values())
        return even and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    if fits(world_size):
        return
    works = [ranks for ranks in range(2, heads + 1) if fits(ranks)]
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise ValueError(
        f"SP x TP = {world_size} ranks do not divide this model ({shown}, KV heads {kv_heads}); "
        f"numbers of ranks that work: {works}"
    )
