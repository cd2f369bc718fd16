"""Time of a row-parallel product with three layouts of its weight, on one GPU, in microseconds.

own: the shards as tensors of their own, which is stock vLLM's layout in TP mode; SP mode then adds S products. slice: a
slice of each row of the SP group's shards, side by side, stock vLLM's layout in SP mode; transposed: the shards one
after the other, transposed in memory, as ``vllm_shift.slots`` stores them. Ratios are to stock vLLM's layout.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

# name, outputs, inputs of the SP group's shards, shards
WEIGHTS = (
    ("8B o_proj, SP=2", 4096, 4096, 2),
    ("8B down_proj, SP=2", 4096, 14336, 2),
    ("8B o_proj, SP=4", 4096, 4096, 4),
    ("8B down_proj, SP=4", 4096, 14336, 4),
    ("32B o_proj, SP=2", 5120, 8192, 2),
    ("32B down_proj, SP=2", 5120, 25600, 2),
    ("70B o_proj, SP=2 x TP=2", 8192, 4096, 2),
    ("70B down_proj, SP=2 x TP=2", 8192, 14336, 2),
    ("70B o_proj, SP=4", 8192, 8192, 4),
    ("70B down_proj, SP=4", 8192, 28672, 4),
    ("70B o_proj, SP=2 x TP=4", 8192, 2048, 2),
    ("70B down_proj, SP=2 x TP=4", 8192, 7168, 2),
)
ROTATED = 160_000_000  # bytes of a shard's copies, which take turns so that the L2 cache does not hold the weight
CALLS, REPEATS = 20, 15


def graph_us(call: Callable[[int], object]) -> float:
    """Median time of one call in a CUDA graph of ``CALLS`` calls."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def product_us(x: torch.Tensor, weights: list[tuple[torch.Tensor, ...]]) -> float:
    """The sum of one product a shard; of each of ``weights`` in turn."""

    def call(i: int) -> torch.Tensor:
        shards = weights[i % len(weights)]
        parts = x.split([shard.shape[1] for shard in shards], dim=1)
        out = F.linear(parts[0], shards[0])
        for part, shard in zip(parts[1:], shards[1:], strict=True):
            out.addmm_(part, shard.t())
        return out

    return graph_us(call)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bf16, us")
    print("| weight | mode | rows | stock | own | slice | transposed |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name, out, width, shards in WEIGHTS:
        shard = width // shards
        copies = max(4, ROTATED // (2 * out * shard))
        whole = [torch.randn(out, width, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
        transposed = [w.t().contiguous().t() for w in whole]
        own = [tuple(part.contiguous() for part in w.chunk(shards, dim=1)) for w in whole]
        for rows in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256):
            x = torch.randn(rows, shard, device="cuda", dtype=torch.bfloat16)
            stock = product_us(x, [(first,) for first, *_ in own])
            others = [product_us(x, [(w[:, :shard],) for w in weights]) / stock for weights in (whole, transposed)]
            print(f"| {name} | TP | {rows} | {stock:.1f} | 1 | {others[0]:.3f} | {others[1]:.3f} |", flush=True)
        for rows in itertools.accumulate((128, 128, 256, 512, 1024, 2048)):
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
            stock = product_us(x, [(w,) for w in whole])
            split, turned = product_us(x, own) / stock, product_us(x, [(w,) for w in transposed]) / stock
            print(f"| {name} | SP | {rows} | {stock:.1f} | {split:.3f} | 1 | {turned:.3f} |", flush=True)


if __name__ == "__main__":
    main()
