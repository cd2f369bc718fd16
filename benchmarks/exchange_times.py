"""Time of one layer's exchange, both directions, between real GPUs: through NCCL and through each other's memory.

In CUDA graphs, without anything else on the GPUs; packing and unpacking are compiled, as in an engine. First compares
what both give. Example: python benchmarks/exchange_times.py --shape 8b --sp 2
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from engines import SHAPES

from vllm_shift.exchange import heads_to_tokens, register_group, tokens_to_heads, use_peers
from vllm_shift.peers import PeerMemory

# Exchanges in one CUDA graph, and replays of it.
CALLS, REPEATS = 20, 7


class Group(SimpleNamespace):
    """The part of vLLM's GroupCoordinator that an exchange uses."""

    __hash__ = object.__hash__


def microseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def run_rank(rank: int, args: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=args.sp, device_id=device)
    sizes = SHAPES[args.shape]
    heads, kv_heads = (max(1, sizes[f"num_{kind}_heads"] // args.sp) for kind in ("attention", "key_value"))
    group = Group(
        world_size=args.sp, rank_in_group=rank, device=device, device_group=dist.group.WORLD, unique_name="sp"
    )
    name, size = register_group(group), sizes["head_dim"]
    layer = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_size=size, head_size_v=size)
    use_peers(group, PeerMemory(group, [layer], max(args.tokens), torch.bfloat16, keeps=True))

    def exchange(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, through_peers: bool
    ) -> list[torch.Tensor]:
        there = tokens_to_heads(q, k, v, args.sp, name, through_peers)
        return [*there, heads_to_tokens(x, args.sp, name, through_peers)]

    if rank == 0:
        print("| tokens | NCCL, us | peers, us | peers / NCCL |\n| --- | --- | --- | --- |", flush=True)
    for tokens in args.tokens:
        rows = tokens // args.sp * args.sp
        widths = (heads * size, kv_heads * size, kv_heads * size, heads * size)
        inputs = [torch.randn(rows, width, device=device, dtype=torch.bfloat16) for width in widths]
        calls = [partial(torch.compile(partial(exchange, through_peers=way), dynamic=False), *inputs) for way in (0, 1)]
        for expected, found in zip(*(call() for call in calls), strict=True):
            assert torch.equal(expected, found), tokens
        nccl, peers = (microseconds(call) for call in calls)
        if rank == 0:
            print(f"| {tokens} | {nccl:.1f} | {peers:.1f} | {peers / nccl:.2f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512, 1000, 2000, 4000, 8000])
    parser.add_argument("--port", type=int, default=29555)
    args = parser.parse_args()
    torch.multiprocessing.spawn(run_rank, args=(args,), nprocs=args.sp)


if __name__ == "__main__":
    main()
