"""From the flags to the config of a stock vLLM engine with TP = SP x TP ranks.

The scheduler, the KV cache, the LM head and every process group of that engine are those of tensor parallelism over
all ranks. What makes it shift is a dict in ``additional_config`` and the name of the worker class.
"""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_shift.config import CODE_KEY, CONFIG_KEY, ShiftConfig, code_hash, most_step_tokens
from vllm_shift.graphs import chose_graph_sizes, set_graph_sizes
from vllm_shift.limits import ENGINE_LIMITS, MODEL_LIMITS, UNCHECKED_LIMITS, check, check_model_shape
from vllm_shift.metrics import publish
from vllm_shift.owner import name_owner

logger = init_logger(f"vllm.{__name__}")

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_shift.worker_cpu.ShiftCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_shift.worker_gpu.ShiftGPUWorker",
}


def create_shift_engine_config(stock_create: Callable[..., Any], engine_args: Any, *args: Any, **kwargs: Any) -> Any:
    """``EngineArgs.create_engine_config`` for an engine that uses one of our settings.

    Args:
        stock_create: vLLM's own method, unbound.
        engine_args: the ``EngineArgs``, left as they are.
        args: passed on.
        kwargs: passed on.

    Returns:
        The ``VllmConfig`` of an engine of SP x TP ranks.

    Raises:
        ValueError: a setting is wrong, or something is asked for that is not supported with it.
    """
    config = read_settings(engine_args)
    stock_args = copy.copy(engine_args)
    stock_args.tensor_parallel_size = config.world_size
    if not config.active:
        logger.warning("Shift Parallelism is off: ulysses_sequence_parallel_size is 1.")
        return stock_create(stock_args, *args, **kwargs)
    _check_devices(config.world_size * engine_args.pipeline_parallel_size * _local_engines(engine_args), engine_args)
    _check_draft(config.world_size, engine_args)
    ours = {CONFIG_KEY: config.to_dict(), CODE_KEY: code_hash()}
    stock_args.additional_config = (engine_args.additional_config or {}) | ours

    def create_model_config() -> Any:
        # Here rather than afterwards: vLLM would blame a TP degree that the user never gave.
        model = type(engine_args).create_model_config(stock_args)
        check(MODEL_LIMITS if config.self_check else MODEL_LIMITS + UNCHECKED_LIMITS, model)
        check_model_shape(model, config.world_size)
        return model

    stock_args.create_model_config = create_model_config
    vllm_config = stock_create(stock_args, *args, **kwargs)
    check(ENGINE_LIMITS, vllm_config)
    most = most_step_tokens(vllm_config.scheduler_config)
    if not config.is_auto and config.max_tp_tokens >= most:
        logger.warning(
            "SP mode will never run: the threshold of %d tokens is not below the largest step, %d tokens.",
            config.max_tp_tokens,
            most,
        )
    name_owner()
    _use_shift_worker(vllm_config.parallel_config)
    set_graph_sizes(vllm_config, config, chose_graph_sizes(engine_args))
    if folder := vllm_config.compilation_config.cache_dir:
        # What vLLM finds in a directory of the user's own it takes, whatever engine left it there.
        of_this_engine = vllm_config.compute_hash()
        vllm_config.compilation_config.cache_dir = os.path.join(folder, f"shift-{of_this_engine}")
    # Of several API server processes none has the engines; their parent does.
    has_engines = engine_args._api_process_count == 1 or engine_args._api_process_rank < 0
    if not engine_args.disable_log_stats and has_engines and _has_first_rank(vllm_config.parallel_config):
        publish(vllm_config)
    return vllm_config


def read_settings(engine_args: Any) -> ShiftConfig:
    """The settings given by flags, by ``additional_config``, or by both where they agree.

    Raises:
        ValueError: a setting is wrong, or the two disagree.
    """
    defaults = ShiftConfig().to_dict()
    flags = {name: getattr(engine_args, name, default) for name, default in defaults.items()}
    additional = engine_args.additional_config or {}
    if not isinstance(additional, Mapping):
        raise ValueError(f"Shift Parallelism needs an additional_config that is a dict, got {additional!r}")
    settings = additional.get(CONFIG_KEY, {})
    merged = flags | ShiftConfig.known(settings)
    for name, default in defaults.items():
        if flags[name] not in (default, merged[name]):
            raise ValueError(
                f"{name} is {flags[name]!r} as a flag and {merged[name]!r} in additional_config[{CONFIG_KEY!r}]; "
                "give it once"
            )
    return ShiftConfig(**merged)


def _local_engines(engine_args: Any) -> int:
    """Data-parallel engines on this host."""
    if engine_args.data_parallel_rank is not None or engine_args.data_parallel_external_lb:
        return 1
    local = engine_args.data_parallel_size_local
    return int(engine_args.data_parallel_size if local is None else local)


def _has_first_rank(parallel_config: Any) -> bool:
    """Whether rank 0 is in this process, or on its node."""
    if parallel_config.distributed_executor_backend == "external_launcher":
        return os.environ.get("RANK", "0") == "0"
    return bool(parallel_config.node_rank == 0)


def _check_devices(world_size: int, engine_args: Any) -> None:
    """Refuse more ranks than this host has places for.

    Raises:
        ValueError: names both numbers.
    """
    if engine_args.distributed_executor_backend not in (None, "mp") or engine_args.nnodes > 1:
        return
    if current_platform.is_cuda():
        if (gpus := current_platform.device_count()) < world_size:
            raise ValueError(
                f"SP x TP x PP x DP = {world_size} ranks need as many GPUs, found {gpus}; "
                "lower a degree, or use several hosts with --nnodes or --distributed-executor-backend ray"
            )
    elif current_platform.is_cpu() and envs.VLLM_CPU_OMP_THREADS_BIND == "auto":
        from vllm.utils.cpu_resource_utils import get_visible_memory_node

        nodes = len(get_visible_memory_node())
        if nodes < world_size and os.environ.get("VLLM_CPU_SIM_MULTI_NUMA", "0") == "0":
            raise ValueError(
                f"SP x TP x PP x DP = {world_size} ranks, but vLLM binds each to a NUMA node and there are {nodes}; "
                "set VLLM_CPU_OMP_THREADS_BIND=nobind"
            )


def _check_draft(world_size: int, engine_args: Any) -> None:
    """Refuse a draft model with a TP degree of its own; vLLM would compare it with one that the user never gave.

    Raises:
        ValueError: names the degree that a draft model has.
    """
    settings = {name.replace("-", "_"): value for name, value in (engine_args.speculative_config or {}).items()}
    degree = settings.get("draft_tensor_parallel_size") or world_size
    # A head as EAGLE's may run on one rank.
    if degree != world_size and (degree != 1 or settings.get("method") == "draft_model"):
        raise ValueError(
            f"draft_tensor_parallel_size is {degree}, but a draft model runs on all SP x TP = {world_size} ranks; "
            f"set it to {world_size}, or leave it out"
        )


def _use_shift_worker(parallel_config: Any) -> None:
    if parallel_config.worker_cls not in _WORKERS:
        raise ValueError(
            f"Shift Parallelism does not support --worker-cls {parallel_config.worker_cls}: leave it at auto"
        )
    parallel_config.worker_cls = _WORKERS[parallel_config.worker_cls]
