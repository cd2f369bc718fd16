"""Times real steps in both modes at start-up, for ``--shift-parallel-threshold auto``; all ranks reach one result."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_world_group, graph_capture
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_shift.graphs import padded_sizes
from vllm_shift.switch import ModeSwitch
from vllm_shift.threshold import StepTimes, TimesCache, candidates, decided, find_threshold

logger = init_logger(f"vllm.{__name__}")

REPEATS = 5


def calibrate(model_runner: Any, switch: ModeSwitch, vllm_config: Any) -> int:
    """Find the threshold of this engine, on every rank at the same time.

    Times come from the cache where an engine like this one has run before.

    Returns:
        The threshold in tokens, the same on every rank.
    """
    begin = time.perf_counter()
    group = get_world_group()
    most = vllm_config.scheduler_config.max_num_batched_tokens
    # Rank 0 decides for all: other hosts may have other disks, and may round logarithms differently.
    way = (switch.exchange.peers is not None, switch.early)
    cache = TimesCache(vllm_config, way) if group.rank_in_group == 0 else None
    times = group.broadcast_object(cache.load() if cache else None, src=0)
    source = "measured before"
    if times is None:
        times, source = [], "measured now"
        for num_tokens in candidates(most):
            times.append(_slowest_rank(_time_step(num_tokens, model_runner, switch, vllm_config)))
            if decided(times):
                break
        _free_workspaces()
        if cache:
            cache.save(times)
    sizes = padded_sizes(vllm_config)
    threshold: int = group.broadcast_object(find_threshold(times, most, sizes) if cache else None, src=0)
    if cache:
        seconds = time.perf_counter() - begin
        logger.info("%s", describe(times, threshold, most, f"{source}, {seconds:.1f} s"))
    return threshold


def describe(times: list[StepTimes], threshold: int, most: int, source: str) -> str:
    """The lines of the log: what was seen, and what follows from it."""
    rows = "; ".join(f"{step.tokens}: {step.tp_ms:.2f} / {step.sp_ms:.2f}" for step in times)
    result = f"steps of up to {threshold} tokens run in TP mode"
    if threshold == 0:
        result = "SP mode is always faster, every step runs in it"
    elif threshold >= most:
        result = "TP mode is always faster, every step runs in it"
    return (
        f"Shift Parallelism, step times without attention ({source}), tokens: ms in TP / SP mode: {rows}. So {result}."
    )


def _slowest_rank(step: StepTimes) -> StepTimes:
    group = get_world_group()
    milliseconds = torch.tensor([step.tp_ms, step.sp_ms], dtype=torch.float64)
    torch.distributed.all_reduce(milliseconds, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return StepTimes(step.tokens, *milliseconds.tolist())


@torch.inference_mode()
def _time_step(num_tokens: int, model_runner: Any, switch: ModeSwitch, vllm_config: Any) -> StepTimes:
    """Milliseconds of the model's forward pass in each mode, from hidden states to hidden states, without attention."""
    model, device = model_runner.get_model(), model_runner.device
    inputs: dict[str, Any] = {}
    # Whatever the model runner gives the model: its names, dtypes and buffers.
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: inputs.update(kwargs), with_kwargs=True, prepend=True)
    try:
        model_runner._dummy_run(num_tokens, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    finally:
        hook.remove()
    given = inputs["positions"].shape[-1]

    def run() -> None:
        with set_forward_context(None, vllm_config, num_tokens=given, cudagraph_runtime_mode=CUDAGraphMode.NONE):
            model(**inputs)

    milliseconds = []
    for max_tp_tokens in (given, given - 1):  # TP mode, then SP mode
        with switch.threshold(max_tp_tokens):
            run()
            launch = _in_graph(run, switch, device) if _is_graphed(given, vllm_config) else run
            milliseconds.append(_time(launch, device))
    return StepTimes(given, *milliseconds)


def _is_graphed(num_tokens: int, vllm_config: Any) -> bool:
    compilation = vllm_config.compilation_config
    graphs = compilation.cudagraph_mode != CUDAGraphMode.NONE
    return bool(graphs and num_tokens <= (compilation.max_cudagraph_capture_size or 0))


def _in_graph(run: Callable[[], None], switch: ModeSwitch, device: torch.device) -> Callable[[], None]:
    """What launches ``run`` as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with switch.graph_capture(), graph_capture(device) as context, torch.cuda.graph(graph, stream=context.stream):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def _free_workspaces() -> None:
    """Give back what cuBLAS holds of each graph: PyTorch keeps a workspace of it for every stream with products."""
    if current_platform.is_cuda():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _time(run: Callable[[], None], device: torch.device) -> float:
    """Median milliseconds of ``run``."""
    run()
    synchronize = torch.get_device_module(device).synchronize
    times = []
    for _ in range(REPEATS):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)
