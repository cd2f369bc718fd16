"""Sizes of CUDA graphs: which a shift engine has, what steps are padded to, and the memory that SP mode's graphs take.

A step is padded to the next size, and the model sees it padded. So the threshold has to be one of the sizes: no step is
padded from one mode into the other.
"""

from itertools import chain
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.utils.math_utils import round_up

from vllm_shift.config import ShiftConfig

logger = init_logger(f"vllm.{__name__}")


def most_graph_tokens(hidden_size: int, world_size: int) -> int:
    """Tokens of the largest step that is worth a CUDA graph in SP mode: larger ones take longer to run than to launch.

    Launching takes about 1.1 ms a layer, whatever its size. Running goes with the square of the hidden size: where that
    is 8,192, it takes as long at 1,536 tokens on four H100 (benchmarks/results/2026-11-26-h100-x4.md). The limit is not
    above 1,536 tokens a rank, up to which graphs have been measured (benchmarks/results/2026-11-27-h200-x2.md).
    """
    return world_size * min(1536, 384 * 8192**2 // hidden_size**2)


def graph_sizes(stock: list[int], max_tp_tokens: int, extend_to: int) -> list[int]:
    """CUDA graph sizes of a shift engine, in tokens.

    The threshold becomes a size, so that no batch is padded from one mode into the other. Sizes of SP mode go further
    than vLLM's default of 512, because a rank's share of a large step still takes longer to launch than to compute.

    Args:
        stock: vLLM's sizes, ascending.
        max_tp_tokens: the threshold; 0 for none to add.
        extend_to: largest size to add, 8192 at most. They lie 64 to 512 tokens apart; up to 512, where vLLM's sizes
            end earlier for want of requests that decode, 16.
    """
    sizes = set(stock)
    larger = (
        *range(16, 513, 16),
        *range(576, 1024, 64),
        *range(1024, 2048, 128),
        *range(2048, 4096, 256),
        *range(4096, 8193, 512),
    )
    sizes.update(size for size in larger if stock[-1] < size <= extend_to)
    if 0 < max_tp_tokens < max(sizes):
        sizes.add(max_tp_tokens)
    return sorted(sizes)


def set_graph_sizes(vllm_config: Any, config: ShiftConfig, chosen_by_user: bool) -> None:
    """Give a config the sizes of ``graph_sizes``, where it has any; where the user chose, with the threshold only."""
    compilation = vllm_config.compilation_config
    stock = compilation.cudagraph_capture_sizes
    if not stock:  # vLLM captures no graphs
        return
    worthwhile = most_graph_tokens(vllm_config.model_config.get_hidden_size(), config.world_size)
    extend_to = min(vllm_config.scheduler_config.max_num_batched_tokens, worthwhile)
    if chosen_by_user or compilation.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
        # In full graphs attention would split keys, which costs time and memory (limit_splits).
        extend_to = 0
    # A threshold that is measured later becomes one of the sizes.
    sizes = graph_sizes(stock, 0 if config.is_auto else config.max_tp_tokens, extend_to)
    # vLLM's V1 model runner wants each size that is compiled for itself among them, up to the largest.
    sizes = sorted({*sizes, *(size for size in compilation.compile_sizes or () if stock[-1] < size <= sizes[-1])})
    if sizes != stock:
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = sizes, sizes[-1]
        logger.info("CUDA graph sizes gain %s for Shift Parallelism.", sorted(set(sizes) - set(stock)))


def chose_graph_sizes(engine_args: Any) -> bool:
    """Whether the user did, in one of the places that vLLM has for it."""
    places = (engine_args, engine_args.compilation_config)
    return any(place.cudagraph_capture_sizes or place.max_cudagraph_capture_size for place in places)


def padded_sizes(vllm_config: Any) -> list[int]:
    """Numbers of tokens that steps are padded to, those of CUDA graphs, ascending.

    Where only decode steps have graphs, vLLM's V2 model runner makes them for multiples of a request's tokens, of which
    there are several with speculative decoding (vllm/v1/worker/gpu/cudagraph_utils.py). V1 has changed its sizes.
    """
    compilation = vllm_config.compilation_config
    sizes: list[int] = compilation.cudagraph_capture_sizes or []
    if not sizes or compilation.cudagraph_mode.mixed_mode() != CUDAGraphMode.NONE:
        return sizes
    rounded = {round_up(size, 1 + vllm_config.num_speculative_tokens) for size in sizes}
    return sorted(size for size in rounded if size <= sizes[-1])


def fit_to_graphs(max_tp_tokens: int, sizes: list[int]) -> int:
    """The largest threshold up to ``max_tp_tokens`` at which no step is padded from TP mode into SP mode.

    Args:
        max_tp_tokens: the threshold that is wanted.
        sizes: CUDA graph sizes, ascending.
    """
    if not sizes or max_tp_tokens > sizes[-1]:
        return max_tp_tokens
    return max((size for size in sizes if size <= max_tp_tokens), default=0)


def graph_memory(captures: int, layers: int, collectives: int) -> int:
    """Bytes that so many CUDA graphs of SP mode take on a GPU, about.

    Measured were 0.30 to 0.35 MiB a graph and layer (benchmarks/results/2026-11-26-h100-x4.md), and 0.2 more for each
    collective of NCCL in a layer (2026-11-26-h200-x4.md).
    """
    return int(captures * layers * (0.4 + 0.2 * collectives) * 2**20)


def limit_splits(model_runner: Any, vllm_config: Any) -> None:
    """Let attention split keys over 32 parts up to the largest step only that a full CUDA graph may run.

    FlashAttention 3 does so in each step up to the largest CUDA graph size, and keeps what the parts give: float32 [32,
    heads of a rank, tokens, head size], up to 1 GiB with the sizes of SP mode, which no profile sees. In larger steps
    it decides for itself (vllm/v1/attention/backends/flash_attn.py).
    """
    if vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
        return
    most = vllm_config.scheduler_config.max_num_seqs * (1 + vllm_config.num_speculative_tokens)
    drafter = getattr(model_runner, "drafter", None)
    for group in (*chain(*model_runner.attn_groups), *getattr(drafter, "draft_attn_groups", ())):
        for builder in group.metadata_builders:
            if getattr(builder, "max_cudagraph_size", None):
                builder.max_cudagraph_size = min(builder.max_cudagraph_size, most)
