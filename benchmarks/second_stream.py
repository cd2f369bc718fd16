"""What a second CUDA stream does to CUDA graphs that run afterwards, between two real GPUs.

A graph of small kernels, one after the other as in decoding, is timed before and after something has run beside a
product on a second stream; each case in processes of its own, because it stays that way until they end.
Example: python benchmarks/second_stream.py
"""

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

# Rounds of a case, replays of the graph in a row, repeats of that.
ROUNDS, REPLAYS, REPEATS = 30, 10, 7
ROWS, COLUMNS = 2048, 4096

# What runs beside a product: given memory of this GPU, of the other one, and what both ranks wait with.
CASES: dict[str, Callable[[torch.Tensor, torch.Tensor, Any], object]] = {
    "nothing": lambda block, peer, handle: None,
    "a copy to the other GPU": lambda block, peer, handle: peer.copy_(block),
    "a kernel": lambda block, peer, handle: block.mul_(1),
    "a barrier": lambda block, peer, handle: handle.barrier(),
    "a copy to the other GPU and a barrier": lambda block, peer, handle: (peer.copy_(block), handle.barrier()),
}
# Of these also as a CUDA graph of both.
IN_GRAPH = ("a copy to the other GPU", "a kernel")


def captured(call: Callable[[], object], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A call as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def decode(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
    """400 kernels: products of one row, and elementwise ones."""
    for _ in range(100):
        torch.mm(x, weight)
        y.add_(1).mul_(0.5).sub_(1)


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Median time of a replay."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / REPLAYS)
    return statistics.median(times)


def run_rank(rank: int, case: str, in_graph: bool, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=device)
    here, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.set_stream(here)
    matrix = torch.randn(COLUMNS, COLUMNS, device=device, dtype=torch.bfloat16)
    x, y = matrix[:1].clone(), torch.zeros(8192, device=device)
    graph = captured(lambda: decode(x, matrix, y), here)
    memory = symmetric_memory.empty(ROWS * COLUMNS, dtype=torch.bfloat16, device=device)
    handle = symmetric_memory.rendezvous(memory, dist.group.WORLD.group_name)
    peer = handle.get_buffer(1 - rank, (ROWS, COLUMNS), torch.bfloat16)
    block = torch.randn(ROWS, COLUMNS, device=device, dtype=torch.bfloat16)

    def round_of_both() -> None:
        second.wait_stream(here)
        with torch.cuda.stream(second):
            CASES[case](block, peer, handle)
        torch.mm(matrix, matrix)
        here.wait_stream(second)

    before = microseconds(graph)
    again = captured(round_of_both, here).replay if in_graph else round_of_both
    for _ in range(ROUNDS):
        again()
    after = microseconds(graph)
    if rank == 0:
        print(
            f"| {case}{', in a CUDA graph' * in_graph} | {before:.0f} | {after:.0f} | {after / before:.2f} |",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=29600)
    args = parser.parse_args()
    print(
        "| beside a product on a second stream | graph before, us | after | after / before |\n| --- | --- | --- | --- |"
    )
    runs = [(case, False) for case in CASES] + [(case, True) for case in IN_GRAPH]
    for number, (case, in_graph) in enumerate(runs):
        torch.multiprocessing.spawn(run_rank, args=(case, in_graph, args.port + number), nprocs=2)


if __name__ == "__main__":
    main()
