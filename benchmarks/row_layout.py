"""Time of a row-parallel product with three layouts of its weight, on one GPU, in microseconds.

own: the TP shard as a tensor of its own; slice: a slice of each row of the SP group's shards, side by side;
transposed: the shards one after the other, transposed in memory, as ``vllm_shift.slots`` stores them.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

# name, outputs, inputs of all shards, shards
WEIGHTS = (
    ("8B o_proj", 4096, 4096, 2),
    ("8B down_proj", 4096, 14336, 2),
    ("32B o_proj", 5120, 8192, 2),
    ("32B down_proj", 5120, 25600, 2),
    ("70B o_proj", 8192, 8192, 8),
    ("70B down_proj", 8192, 28672, 8),
)
COPIES = 4  # rotated, so that the L2 cache does not hold the weight
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


def linear_us(x: torch.Tensor, weights: list[torch.Tensor]) -> float:
    return graph_us(lambda i: F.linear(x, weights[i % len(weights)]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bf16, us")
    print("| weight | mode | rows | own | slice / own | transposed / own |\n| --- | --- | --- | --- | --- | --- |")
    for name, out, width, shards in WEIGHTS:
        whole = [torch.randn(out, width, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(COPIES)]
        transposed = [w.t().contiguous().t() for w in whole]
        shard = width // shards
        layouts = [[w[:, :shard].contiguous() for w in whole], [w[:, :shard] for w in whole],
                   [w[:, :shard] for w in transposed]]  # fmt: skip
        for rows in (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256):
            x = torch.randn(rows, shard, device="cuda", dtype=torch.bfloat16)
            own, sliced, turned = (linear_us(x, weights) for weights in layouts)
            print(f"| {name} | TP | {rows} | {own:.1f} | {sliced / own:.3f} | {turned / own:.3f} |")
        for rows in itertools.accumulate((512, 512, 1024, 2048)):
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
            own, turned = linear_us(x, whole), linear_us(x, transposed)
            print(f"| {name} | SP | {rows} | {own:.1f} | | {turned / own:.3f} |")


if __name__ == "__main__":
    main()
