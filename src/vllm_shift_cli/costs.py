"""The cost model of `vllm-shift plan`: times and memory of one step, from a model's sizes and a GPU's data sheet.

A roofline for what a GPU computes, bandwidth and latency for what GPUs exchange. All functions are pure. Every number
that is not a data sheet's is in ``Achieved``: what was fitted to the measurements in ``benchmarks/results`` and what is
assumed. Letters are those of the rest of the project: S is the SP degree, T the TP degree of SP mode, P = S x T.
Times are seconds, sizes bytes, unless a name says otherwise.
"""

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder with a gated MLP and full attention, as its config.json names them.

    Attributes:
        name: shown to the user.
        hidden: h, width of the hidden states.
        intermediate: width of the MLP.
        layers: number of layers.
        heads: attention heads.
        kv_heads: KV heads.
        head_size: width of a head.
        vocabulary: tokens in the vocabulary.
        tied: embedding and LM head share one table.
        element_bytes: of a weight, an activation and an element of the KV cache.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    element_bytes: int = 2

    @property
    def padded_vocabulary(self) -> int:
        """The vocabulary as vLLM shards it."""
        return -(-self.vocabulary // 64) * 64


@dataclass(frozen=True)
class Gpu:
    """What the data sheet says of a kind of GPU.

    Attributes:
        name: as the vendor writes it.
        memory_gib: memory that the driver reports, GiB.
        tflops: dense bf16, TFLOP/s.
        hbm_gb_s: memory bandwidth, GB/s.
        link_gb_s: bandwidth to the other GPUs of its host, GB/s in one direction.
        nvlink: the link is NVLink with a switch, not PCIe.
    """

    name: str
    memory_gib: float
    tflops: float
    hbm_gb_s: float
    link_gb_s: float
    nvlink: bool = True


GPUS = {
    "h100": Gpu("H100 SXM 80GB", 79.6, 989, 3350, 450),
    "h200": Gpu("H200 SXM 141GB", 140.4, 989, 4800, 450),
    "a100": Gpu("A100 SXM 80GB", 80.0, 312, 2039, 300),
    "b200": Gpu("B200 SXM 180GB", 179.0, 2250, 8000, 900),
    "l40s": Gpu("L40S PCIe 48GB", 45.0, 362, 864, 32, nvlink=False),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs and what joins them.

    Attributes:
        gpu: their kind.
        node_size: GPUs of one host; ranks fill hosts one after the other.
        network_gb_s: bandwidth between hosts, GB/s a GPU in one direction.
    """

    gpu: Gpu
    node_size: int = 8
    network_gb_s: float = 50.0


@dataclass(frozen=True)
class Layout:
    """How one step is spread: SP=S x TP=T; TP mode of any engine is ``Layout(1, P)``."""

    sp: int
    tp: int

    @property
    def world(self) -> int:
        """Number of ranks, P."""
        return self.sp * self.tp

    @property
    def tp_mode(self) -> "Layout":
        """The other mode of the same engine: TP over all ranks."""
        return Layout(1, self.world)

    def local_tokens(self, num_tokens: int) -> int:
        """Rows of one rank in a step of ``num_tokens`` tokens, n = ceil(N / S)."""
        return -(-num_tokens // self.sp)

    def __str__(self) -> str:
        return f"SP={self.sp} x TP={self.tp}" if self.sp > 1 else f"TP={self.tp}"


@dataclass(frozen=True)
class Batch:
    """The requests of one step, all alike.

    Attributes:
        requests: their number.
        new: tokens that each of them brings into the step.
        cached: tokens that each of them has in the KV cache already.
    """

    requests: int
    new: int = 1
    cached: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the step, N."""
        return self.requests * self.new


@dataclass(frozen=True)
class Achieved:
    """What GPUs reach of their data sheets, and what a step costs besides.

    Fitted to the measurements in ``benchmarks/results/planner_points.csv`` (H100 and H200), and taken over for other
    kinds of GPU; those marked as assumed have no measurement behind them.

    Attributes:
        matmul_flops: of the data sheet's FLOP/s, by a large matrix product.
        attention_flops: the same, by causal attention.
        weight_bandwidth: of the memory bandwidth, while weights or KV cache are read.
        elementwise_bandwidth: the same, by norms, activations and copies.
        sharpness: how close a matrix product comes to the larger of its two bounds: the exponent of the norm that
            joins them.
        kernel_s: what each kernel takes beyond its work.
        step_s: work of a step outside the layers: inputs, sampling.
        host_s: least time of a step on the host, which hides behind the GPU's or hides it; assumed.
        host_request_s: the same, for each request.
        link: of the link's bandwidth, by NCCL.
        all_reduce_s: latency of vLLM's own all-reduce inside a host; fitted for two GPUs.
        exchange_s: latency of an exchange inside a host, through each other's memory; measured for two GPUs.
        nccl_s: latency of a collective of NCCL inside a host; measured for two GPUs.
        network_s: added for each doubling of the number of hosts; assumed.
        memory_share: of the GPU's memory that vLLM takes, its default.
        reserved: memory that is neither weights nor KV cache, in a TP engine.
        reserved_shift: the same, added by SP mode.
        reserved_group: added to that where T > 1, by the SP group, which is then none of vLLM's own.
    """

    matmul_flops: float = 0.72
    attention_flops: float = 0.46
    weight_bandwidth: float = 0.80
    elementwise_bandwidth: float = 0.80
    sharpness: float = 3.6
    kernel_s: float = 3.6e-6
    step_s: float = 0.1e-3
    host_s: float = 0.5e-3
    host_request_s: float = 28e-6
    link: float = 0.76
    all_reduce_s: float = 6e-6
    exchange_s: float = 6e-6
    nccl_s: float = 13e-6
    network_s: float = 10e-6
    memory_share: float = 0.92
    reserved: float = 1.2 * GIB
    reserved_shift: float = 1.0 * GIB
    reserved_group: float = 0.5 * GIB


ACHIEVED = Achieved()


def fits(model: ModelShape, world: int) -> bool:
    """Whether a model can be spread over ``world`` ranks: the rule of ``vllm_shift.limits.check_model_shape``."""
    even = all(size % world == 0 for size in (model.heads, model.intermediate, model.padded_vocabulary))
    return even and (model.kv_heads % world == 0 or world % model.kv_heads == 0)


def layouts(world: int) -> list[Layout]:
    """Every SP x TP of ``world`` ranks, TP alone first."""
    return [Layout(sp, world // sp) for sp in range(1, world + 1) if world % sp == 0]


@dataclass(frozen=True)
class Shard:
    """Widths of the TP=P shard of a layer, in elements.

    Attributes:
        q: all query heads of the shard.
        kv: all its KV heads, once for K and once for V.
        intermediate: of the MLP.
        vocabulary: rows of the embedding and of the LM head.
    """

    q: int
    kv: int
    intermediate: int
    vocabulary: int


def shard(model: ModelShape, world: int) -> Shard:
    """The TP=P shard for P = ``world``; KV heads are replicated where there are more ranks than those."""
    return Shard(
        q=model.heads // world * model.head_size,
        kv=max(1, model.kv_heads // world) * model.head_size,
        intermediate=model.intermediate // world,
        vocabulary=model.padded_vocabulary // world,
    )


def _products(model: ModelShape, layout: Layout) -> list[tuple[int, int]]:
    """Width in and out of the four matrix products of a layer: S shards side by side."""
    own, s = shard(model, layout.world), layout.sp
    return [
        (model.hidden, s * (own.q + 2 * own.kv)),
        (s * own.q, model.hidden),
        (model.hidden, s * 2 * own.intermediate),
        (s * own.intermediate, model.hidden),
    ]


def weight_bytes(model: ModelShape, layout: Layout) -> int:
    """Weights on one GPU: layers and embedding of TP=T, the LM head of TP=P. Norms and biases are left out."""
    layers = model.layers * sum(inputs * outputs for inputs, outputs in _products(model, layout))
    rows = shard(model, layout.world).vocabulary * (layout.sp + (0 if model.tied else 1))
    return model.element_bytes * (layers + rows * model.hidden)


def kv_bytes_per_token(model: ModelShape, world: int) -> int:
    """KV cache of one token on one GPU: that of TP=P in every mode."""
    return model.layers * 2 * shard(model, world).kv * model.element_bytes


def kv_tokens(model: ModelShape, layout: Layout, gpu: Gpu, achieved: Achieved = ACHIEVED) -> int:
    """Tokens of KV cache beside the weights; 0 where the weights do not fit."""
    reserved = achieved.reserved
    if layout.sp > 1:
        reserved += achieved.reserved_shift + (achieved.reserved_group if layout.tp > 1 else 0)
    free = gpu.memory_gib * GIB * achieved.memory_share - weight_bytes(model, layout) - reserved
    return max(0, int(free // kv_bytes_per_token(model, layout.world)))


def matmul_s(
    rows: int, inputs: int, outputs: int, element_bytes: int, gpu: Gpu, achieved: Achieved = ACHIEVED
) -> float:
    """[rows, inputs] x [inputs, outputs]: the bounds by arithmetic and by memory, joined smoothly."""
    flops = 2 * rows * inputs * outputs / (gpu.tflops * 1e12 * achieved.matmul_flops)
    elements = inputs * outputs + rows * (inputs + outputs)
    moved = elements * element_bytes / (gpu.hbm_gb_s * 1e9 * achieved.weight_bandwidth)
    bound: float = (flops**achieved.sharpness + moved**achieved.sharpness) ** (1 / achieved.sharpness)
    return achieved.kernel_s + bound


def layer_matmul_s(model: ModelShape, layout: Layout, tokens: int, gpu: Gpu, achieved: Achieved = ACHIEVED) -> float:
    """The four matrix products of one layer, on ceil(N / S) rows."""
    rows = layout.local_tokens(tokens)
    return sum(matmul_s(rows, *sizes, model.element_bytes, gpu, achieved) for sizes in _products(model, layout))


def _attention_s(model: ModelShape, world: int, batch: Batch, gpu: Gpu, achieved: Achieved) -> float:
    """Attention of one layer; the same in both modes, because heads are."""
    own = shard(model, world)
    flops = 4 * own.q * batch.tokens * (batch.cached + (batch.new + 1) / 2)
    read = batch.requests * (batch.cached + batch.new) * 2 * own.kv * model.element_bytes
    return 2 * achieved.kernel_s + max(
        flops / (gpu.tflops * 1e12 * achieved.attention_flops),
        read / (gpu.hbm_gb_s * 1e9 * achieved.weight_bandwidth),
    )


def _elementwise_s(model: ModelShape, layout: Layout, tokens: int, cluster: Cluster, achieved: Achieved) -> float:
    """Norms, rotary embedding, the write to the KV cache and the activation of one layer; copies of the exchange."""
    own, n = shard(model, layout.world), layout.local_tokens(tokens)
    folded = n * layout.sp
    # Elements read and written: two norms that also add the residual; q, k, v; the cache; gate, up and their product.
    moved = 8 * n * model.hidden + folded * (2 * (own.q + 2 * own.kv) + 4 * own.kv + 3 * own.intermediate)
    kernels = 5
    if layout.sp > 1:
        # What came back is copied; for NCCL, what goes out is packed, too.
        moved += folded * 2 * own.q
        kernels += 1
        if not _shares_memory(_group(layout.sp, 1, cluster), cluster):
            moved += folded * 2 * (own.q + 2 * own.kv)
            kernels += 1
    bandwidth = cluster.gpu.hbm_gb_s * 1e9 * achieved.elementwise_bandwidth
    return kernels * achieved.kernel_s + moved * model.element_bytes / bandwidth


@dataclass(frozen=True)
class _Group:
    """The ranks of a collective: how many there are on a host, and on how many hosts."""

    on_host: int
    hosts: int


def _group(ranks: int, stride: int, cluster: Cluster) -> _Group:
    on_host = min(ranks, max(1, cluster.node_size // stride))
    return _Group(on_host, -(-ranks // on_host))


def _latency(group: _Group, achieved: Achieved) -> float:
    return achieved.nccl_s + achieved.network_s * math.log2(group.hosts)


def _shares_memory(group: _Group, cluster: Cluster) -> bool:
    """Whether kernels of vLLM and of this package take the place of NCCL's."""
    return group.hosts == 1 and cluster.gpu.nvlink


def _bandwidths(cluster: Cluster, achieved: Achieved) -> tuple[float, float]:
    """Bytes a second inside a host and between hosts."""
    return cluster.gpu.link_gb_s * 1e9 * achieved.link, cluster.network_gb_s * 1e9 * achieved.link


def all_reduce_s(size: float, ranks: int, stride: int, cluster: Cluster, achieved: Achieved = ACHIEVED) -> float:
    """Sum ``size`` bytes over ``ranks`` ranks that are ``stride`` apart: a ring in each host, then rings across."""
    if ranks == 1:
        return 0.0
    group = _group(ranks, stride, cluster)
    link, network = _bandwidths(cluster, achieved)
    inside = 2 * (group.on_host - 1) / group.on_host * size / link
    across = 2 * (group.hosts - 1) / group.hosts * size / group.on_host / network
    latency = achieved.all_reduce_s if _shares_memory(group, cluster) else _latency(group, achieved)
    return latency + inside + across


def all_gather_s(size: float, ranks: int, cluster: Cluster, achieved: Achieved = ACHIEVED) -> float:
    """Bring ``size`` bytes, spread over ``ranks`` consecutive ranks, to each of them."""
    if ranks == 1:
        return 0.0
    group = _group(ranks, 1, cluster)
    link, network = _bandwidths(cluster, achieved)
    inside = (group.on_host - 1) / group.on_host * size / link
    across = (group.hosts - 1) / group.hosts * size / group.on_host / network
    return _latency(group, achieved) + inside + across


def all_to_all_s(size: float, ranks: int, cluster: Cluster, achieved: Achieved = ACHIEVED) -> float:
    """Every one of ``ranks`` consecutive ranks sends an equal part of its ``size`` bytes to each."""
    if ranks == 1:
        return 0.0
    group = _group(ranks, 1, cluster)
    link, network = _bandwidths(cluster, achieved)
    inside = (group.on_host - 1) / ranks * size / link
    across = (ranks - group.on_host) / ranks * size / network
    latency = achieved.exchange_s if _shares_memory(group, cluster) else _latency(group, achieved)
    return latency + inside + across


def exchange_bytes(model: ModelShape, layout: Layout, tokens: int) -> tuple[int, int]:
    """What a rank holds for the all-to-all before attention (q, k, v) and for that after it."""
    own, rows = shard(model, layout.world), layout.local_tokens(tokens) * layout.sp
    return rows * (own.q + 2 * own.kv) * model.element_bytes, rows * own.q * model.element_bytes


@dataclass(frozen=True)
class StepTime:
    """Where the time of a step goes, in seconds.

    Attributes:
        matmul: matrix products of all layers.
        attention: of all layers.
        elementwise: norms, activations, rotary embedding, packing.
        communication: all collectives.
        rest: embedding, LM head, inputs, sampling.
        host: least time by the host; the GPU's time hides it or hides behind it.
    """

    matmul: float
    attention: float
    elementwise: float
    communication: float
    rest: float
    host: float

    @property
    def gpu(self) -> float:
        """Time on the GPU."""
        return self.matmul + self.attention + self.elementwise + self.communication + self.rest

    @property
    def total(self) -> float:
        """From one step to the next on a busy server."""
        return max(self.gpu, self.host)


def step_time(
    model: ModelShape, layout: Layout, batch: Batch, cluster: Cluster, achieved: Achieved = ACHIEVED
) -> StepTime:
    """One step in SP=S x TP=T; give ``layout.tp_mode`` for TP mode."""
    gpu, world, tokens = cluster.gpu, layout.world, batch.tokens
    own, rows = shard(model, world), layout.local_tokens(tokens)
    hidden = rows * model.hidden * model.element_bytes
    reduced = all_reduce_s(hidden, layout.tp, layout.sp, cluster, achieved)
    exchanged = sum(all_to_all_s(size, layout.sp, cluster, achieved) for size in exchange_bytes(model, layout, tokens))
    # Also an all-reduce after the embedding, the rows of all ranks after the last layer, and the logits.
    logits = batch.requests * own.vocabulary * model.element_bytes
    once = reduced + all_gather_s(hidden * layout.sp, layout.sp, cluster, achieved)
    once += all_gather_s(logits * world, world, cluster, achieved)
    head = matmul_s(batch.requests, model.hidden, own.vocabulary, model.element_bytes, gpu, achieved)
    return StepTime(
        matmul=model.layers * layer_matmul_s(model, layout, tokens, gpu, achieved),
        attention=model.layers * _attention_s(model, world, batch, gpu, achieved),
        elementwise=model.layers * _elementwise_s(model, layout, tokens, cluster, achieved),
        communication=model.layers * (2 * reduced + exchanged) + once,
        rest=head + achieved.step_s,
        host=achieved.host_s + batch.requests * achieved.host_request_s,
    )


def saving(model: ModelShape, layout: Layout, tokens: int, cluster: Cluster, achieved: Achieved = ACHIEVED) -> float:
    """Seconds that SP mode saves in a step of one prompt of ``tokens`` tokens; negative where TP mode is faster."""
    batch = Batch(1, tokens)
    tp = step_time(model, layout.tp_mode, batch, cluster, achieved)
    return tp.gpu - step_time(model, layout, batch, cluster, achieved).gpu


def crossover(
    model: ModelShape, layout: Layout, most: int, cluster: Cluster, achieved: Achieved = ACHIEVED
) -> int | None:
    """The threshold: the largest step, on a grid of 16 tokens, that is still as fast in TP mode.

    Attention is the same in both modes, so it does not depend on the kind of batch.

    Args:
        model: the model.
        layout: SP=S x TP=T.
        most: largest step of the server, in tokens.
        cluster: the GPUs.
        achieved: what they reach.

    Returns:
        The threshold, 0 where SP mode is always faster; None where TP mode is as fast even at ``most``.
    """
    if saving(model, layout, most, cluster, achieved) <= 0:
        return None
    # First on a coarse grid, then on finer ones from the last step found there to the next.
    slower, grid = 0, most
    while grid > 16:
        end = min(slower + grid, most)
        grid = max(16, grid // 512 // 16 * 16)
        steps = range(slower + grid, end + 1, grid)
        slower = max((n for n in steps if saving(model, layout, n, cluster, achieved) <= 0), default=slower)
    return slower
