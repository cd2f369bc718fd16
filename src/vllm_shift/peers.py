"""The exchange between GPUs that reach each other's memory: every rank writes its rows to where the others want them.

One kernel takes the place of packing, NCCL's all-to-all and unpacking. It writes through PyTorch's symmetric memory:
buffers whose addresses on all ranks are known to each. Between two ranks that have much to send, copy engines do it
instead, on a stream of their own, while the product before or after the exchange runs. That stream has no kernels, not
even a barrier: once kernels of two streams have run at the same time, a GPU leaves more time between the kernels of
CUDA graphs from then on, and decoding takes 4 % longer (benchmarks/results/2026-11-25-h100-x2.md).

Each direction has a buffer of its own, so that one barrier an exchange is enough. After the barrier of one direction
every rank has read what it got by the other before, because its barrier comes after that on the same stream. So the
next exchange may write there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn.functional as F
import triton
import triton.language as tl
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import GroupCoordinator, get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from vllm_shift.exchange import Exchange, qkv_widths, why_not_direct
from vllm_shift.overlap import never_reuse

logger = init_logger(f"vllm.{__name__}")

# Elements that one program copies at a time.
BLOCK = 2048

# From so many bytes on, a copy beside a product is faster than one before it (benchmarks/exchange_times.py). Only two
# ranks swap.
SWAP_BYTES = 4 * 2**20


@triton.jit  # type: ignore[untyped-decorator]
def _copy(source, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WIDTH
        tl.store(target + column, tl.load(source + column, mask=inside), mask=inside)


# What changes with the tokens of a step must not lead to another variant of the kernel while requests run.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["rank", "source_token", "source_rank", "target_token", "target_rank"]
)
def write_rows(  # type: ignore[no-untyped-def]
    q, k, v, targets, rank, q_stride, k_stride, v_stride, source_token, source_rank, target_token, target_rank,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy rows into the buffers of all ranks, one program a row: grid (tokens of a rank, ranks).

    Args:
        q, k, v: rows of ``Q``, ``K`` and ``V`` columns; ``K`` and ``V`` may be 0.
        targets: int64 [ranks], addresses of their buffers, which have rows of Q + K + V columns: q, k and v.
        rank: this one.
        q_stride, k_stride, v_stride: elements from row to row.
        source_token, source_rank: row ``token * source_token + other * source_rank`` goes to rank ``other``,
        target_token, target_rank: and becomes its row ``token * target_token + rank * target_rank``.
        BLOCK: columns to copy at a time, a power of 2.
    """
    token = tl.program_id(0)
    # Each rank begins with another one, so that no link is waited for by all.
    other = (tl.program_id(1) + rank + 1) % tl.num_programs(1)
    source = (token * source_token + other * source_rank).to(tl.int64)
    row = (token * target_token + rank * target_rank).to(tl.int64)
    # Allocations are aligned, which the compiler cannot know of an address that it loads.
    target = tl.multiple_of(tl.load(targets + other).to(tl.pointer_type(q.dtype.element_ty)), 16) + row * (Q + K + V)
    _copy(q + source * q_stride, target, Q, BLOCK)
    if K > 0:
        _copy(k + source * k_stride, target + Q, K, BLOCK)
        _copy(v + source * v_stride, target + Q + K, V, BLOCK)


class _Buffer:
    """Memory of this rank that the others of its group write to.

    Args:
        elements: that it holds.
        dtype: of them.
        group: of the ranks.

    Raises:
        RuntimeError: there is no memory left.
    """

    def __init__(self, elements: int, dtype: torch.dtype, group: GroupCoordinator) -> None:
        self._group, self._rank, self._ranks = group, group.rank_in_group, group.world_size
        self._memory = symmetric_memory.empty(elements, dtype=dtype, device=group.device)
        self._targets = torch.empty(self._ranks, dtype=torch.int64, device=group.device)
        self._stream = torch.cuda.Stream(group.device)  # type: ignore[no-untyped-call]
        self._ready, self._sent = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def meet(self) -> None:
        """Learn the addresses of the others' buffers; all ranks of the group do so at the same time.

        Raises:
            RuntimeError: the GPUs cannot share memory.
        """
        name = self._group.device_group.group_name
        self._handle = symmetric_memory.rendezvous(self._memory, name)
        # PyTorch knows groups by names, which an earlier engine in this process may have used.
        if (self._handle.rank, self._handle.world_size) != (self._rank, self._ranks):
            raise RuntimeError(f"PyTorch takes {name} for another group")
        self._targets.copy_(torch.tensor(self._handle.buffer_ptrs))

    def exchange(self, sources: Sequence[torch.Tensor], strides: tuple[int, int, int, int]) -> torch.Tensor:
        """Send rows to all ranks, see ``write_rows``; returns those that came: this rank's memory, not a copy.

        Args:
            sources: q, k and v, or one tensor; [n*S, ...].
            strides: ``source_token`` to ``target_rank`` of ``write_rows``.
        """
        sources = [x if x.stride(-1) == 1 else x.contiguous() for x in sources]
        widths = [x.shape[-1] for x in sources]
        rows = len(sources[0])
        received = self.rows(rows, sum(widths))
        assert all(x.dtype == self._memory.dtype for x in sources), [x.dtype for x in sources]
        q, k, v = sources if len(sources) == 3 else sources * 3
        write_rows[(rows // self._ranks, self._ranks)](
            q, k, v, self._targets, self._rank, q.stride(0), k.stride(0), v.stride(0), *strides,
            Q=widths[0], K=sum(widths[1:2]), V=sum(widths[2:]), BLOCK=BLOCK,
        )  # fmt: skip
        self._handle.barrier()
        return received

    def rows(self, rows: int, columns: int) -> torch.Tensor:
        """The memory as rows, from its beginning: what came, where it is."""
        assert rows * columns <= self._memory.numel(), (rows, columns)
        return self._memory[: rows * columns].view(rows, columns)

    def swap(self, x: torch.Tensor, block: int, meanwhile: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Of two ranks, swap tensors of one shape by copy engines, which take no time of what runs meanwhile.

        Args:
            x: to send.
            block: of blocks of that size in the other's memory, the one that it becomes.
            meanwhile: what to run; it may write to blocks of this rank's memory that nothing comes to.

        Returns:
            What ``meanwhile`` returned. What came is in ``rows``.
        """
        assert x.dtype == self._memory.dtype, x.dtype
        here = torch.cuda.current_stream()
        # wait_stream makes and destroys an event each time, and steps of 3,000 tokens already wait for the host.
        self._ready.record(here)
        self._stream.wait_event(self._ready)
        with torch.cuda.stream(self._stream):
            self._handle.get_buffer(1 - self._rank, x.shape, x.dtype, block * x.numel()).copy_(x)
        self._sent.record(self._stream)
        result = meanwhile()
        here.wait_event(self._sent)
        self._handle.barrier()
        return result


class PeerMemory:
    """Both directions of the exchange. What it allocates is of use once all ranks of the group have called ``meet``.

    Args:
        group: the SP group.
        layers: that exchange.
        rows: most rows of the folded view, n*S.
        dtype: of the activations.
        keeps: whether what goes to attention is left alone until the next exchange; else it is copied.

    Attributes:
        swap_bytes: blocks of so many bytes and more travel beside products; infinite where none does.

    Raises:
        RuntimeError: there is no memory left; later, the two directions did not take turns.
    """

    def __init__(
        self, group: GroupCoordinator, layers: Sequence[Attention], rows: int, dtype: torch.dtype, keeps: bool
    ) -> None:
        self._sp, self._rank, self._item_size = group.world_size, group.rank_in_group, dtype.itemsize
        self._keeps, self._with_heads = keeps, False
        self.swap_bytes: float = SWAP_BYTES if self._sp == 2 else math.inf
        self._heads = _Buffer(rows * max(sum(qkv_widths(x)) for x in layers), dtype, group)
        self._tokens = _Buffer(rows * max(x.num_heads * x.head_size_v for x in layers), dtype, group)

    def meet(self) -> None:
        """As ``_Buffer.meet``, for both directions."""
        self._heads.meet()
        self._tokens.meet()

    def tokens_to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[n*S, ...] each, in the folded view, to [n*S, all columns] in the head view."""
        self._turn(to_heads=True)
        received = self._heads.exchange((q, k, v), (self._sp, 1, 1, len(q) // self._sp))
        return received if self._keeps else received.clone()

    def product_to_heads(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` [n, in] times ``weight`` [S * columns, in], plus ``bias`` [S * columns]: [n*S, columns], all tokens of
        this rank's heads, in the head view.

        With two ranks, and enough to send, what the other rank gets travels while the rest is made.
        """
        n, width = len(x), len(weight) // self._sp
        self._turn(to_heads=True)
        if self._swaps(n, width):
            heads = self._swapped_product(x, weight, bias)
        else:
            folded = F.linear(x, weight, bias).view(-1, width)
            heads = self._heads.exchange((folded,), (self._sp, 1, 1, n))
        return heads if self._keeps else heads.clone()

    def _swapped_product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``product_to_heads`` of two ranks: each half is written to where it is wanted, in memory of the exchange."""
        n, width = len(x), len(weight) // 2
        mine, other = self._rank, 1 - self._rank
        weights = torch.split(weight, width)
        biases = () if bias is None else torch.split(bias, width)
        heads, sent = self._heads.rows(2 * n, width), x.new_empty(n, width)

        def product(slot: int, out: torch.Tensor) -> torch.Tensor:
            if bias is None:
                return torch.mm(x, weights[slot].t(), out=out)
            return torch.addmm(biases[slot], x, weights[slot].t(), out=out)

        product(other, sent)
        self._heads.swap(sent, mine, lambda: product(mine, heads[mine * n : (mine + 1) * n]))
        return heads

    def heads_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[n*S, ...] in the head view to the folded view."""
        return self._received_tokens(x).clone()

    def heads_to_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[n*S, ...] in the head view; its tokens of this rank times ``weight`` [out, S * columns]: [n, out].

        With two ranks, and enough to send, the product with the heads that are here runs while the others come.
        """
        n, width = len(x) // self._sp, x.shape[1]
        if not self._swaps(n, width):
            return F.linear(self._received_tokens(x).view(n, -1), weight)
        self._turn(to_heads=False)
        mine, other = self._rank, 1 - self._rank
        blocks, weights = torch.split(x, n), torch.split(weight, width, dim=1)
        product = self._tokens.swap(blocks[other], 0, lambda: F.linear(blocks[mine], weights[mine]))
        return product.addmm_(self._tokens.rows(n, width), weights[other].t())

    def _swaps(self, rows: int, columns: int) -> bool:
        """Whether a block of this size is worth a swap."""
        return rows * columns * self._item_size >= self.swap_bytes

    def _received_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """``heads_to_tokens`` in memory that the next exchange writes to."""
        self._turn(to_heads=False)
        return self._tokens.exchange((x,), (1, len(x) // self._sp, self._sp, 1))

    def _turn(self, to_heads: bool) -> None:
        """The directions have to take turns, see the top of this module; CUDA graphs replay what did."""
        if self._with_heads == to_heads:
            raise RuntimeError("an exchange before attention must be followed by one after it, and the reverse")
        self._with_heads = to_heads


def connect(exchange: Exchange, layers: Sequence[Attention], rows: int, vllm_config: VllmConfig) -> None:
    """Let an engine exchange in this way, if its GPUs can; otherwise NCCL's all-to-all does it.

    They can where vLLM's custom all-reduce runs, which works alike, on GPUs of one host with NVLink between all of
    them: barriers are atomic operations on another GPU's memory.

    Args:
        exchange: of the engine, whose ranks all call this; gains peers.
        layers: that exchange.
        rows: most rows of the folded view, n*S.
        vllm_config: of the engine.
    """
    group = exchange.group
    problem = _share_memory(exchange, layers, rows, vllm_config)
    if group.rank == group.first_rank:
        way = "each other's memory" if problem is None else f"NCCL, as {problem}"
        logger.info("Shift Parallelism: ranks %s exchange tokens for heads through %s.", group.ranks, way)


def _share_memory(exchange: Exchange, layers: Sequence[Attention], rows: int, vllm_config: VllmConfig) -> str | None:
    """As ``connect``; returns why it cannot be, the same on all ranks of all SP groups."""
    group, all_ranks = exchange.group, get_tp_group()
    if (problem := why_not_direct(all_ranks)) is not None:
        return problem
    # The default, unless set; with another one the barrier may do nothing.
    if (backend := symmetric_memory.get_backend(group.device)) not in (None, "CUDA"):
        return f"PyTorch's symmetric memory has the backend {backend}"
    compilation: Any = vllm_config.compilation_config
    # Where attention is compiled together with what follows, Inductor would reuse the memory of its inputs.
    keeps = compilation.splitting_ops_contain_attention() and not compilation.use_inductor_graph_partition
    if keeps:
        never_reuse(torch.ops.vllm_shift.peers_product_to_heads.default)
    # A rank without memory would leave the others waiting for it, so all ask before they meet.
    peers, problem = _attempt(
        "there is no memory for it",
        lambda: PeerMemory(group, layers, rows, vllm_config.model_config.dtype, keeps),
        all_ranks,
    )
    if problem is None:
        _, problem = _attempt("the GPUs cannot share memory", peers.meet, all_ranks)
    if problem is None:
        exchange.peers = peers
    return problem


def _attempt(trouble: str, make: Callable[[], Any], all_ranks: GroupCoordinator) -> tuple[Any, str | None]:
    """What this rank makes; and why one of the ranks could not, which is the same on all of them."""
    made, problem = None, None
    try:
        made = make()
    except RuntimeError as error:
        problem = f"{trouble} ({error})"
    problems: list[str | None] = [None] * all_ranks.world_size
    torch.distributed.all_gather_object(problems, problem, group=all_ranks.cpu_group)
    return made, next((each for each in problems if each is not None), None)
