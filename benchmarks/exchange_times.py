"""Time of one layer's exchange, both directions, between real GPUs: through NCCL and through each other's memory.

In CUDA graphs, without anything else on the GPUs; packing for NCCL and unpacking are compiled, as in an engine. The
output projection is timed after it, and as one op with the second direction. First compares what they all give.
Example: python benchmarks/exchange_times.py --shape 8b --sp 2
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
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

    # Of the output projection, in the layout of the slots.
    weight = torch.randn(args.sp * heads * size, sizes["hidden_size"], device=device, dtype=torch.bfloat16).t() / 64

    def before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, way: str) -> tuple[torch.Tensor, ...]:
        return tokens_to_heads(q, k, v, args.sp, name, way != "NCCL")

    def after(x: torch.Tensor, way: str) -> torch.Tensor:
        if way == "in product":
            return torch.ops.vllm_shift.peers_heads_to_product(x, weight, name)
        tokens = heads_to_tokens(x, args.sp, name, way != "NCCL")
        return F.linear(tokens.view(-1, weight.shape[1]), weight) if way == "then product" else tokens

    def exchange(way: str) -> Callable[..., list[torch.Tensor]]:
        first, second = partial(before, way=way), partial(after, way=way)
        if way == "NCCL":
            # One by one, as attention is between them; compiled together they might change places.
            first, second = (torch.compile(part, dynamic=False) for part in (first, second))
        return lambda q, k, v, x: [*first(q, k, v), second(x)]

    if rank == 0:
        print("| tokens | NCCL, us | peers | peers / NCCL | peers, then product | in product | in / then |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for tokens in args.tokens:
        rows = tokens // args.sp * args.sp
        widths = (heads * size, kv_heads * size, kv_heads * size, heads * size)
        inputs = [torch.randn(rows, width, device=device, dtype=torch.bfloat16) for width in widths]
        torch.compiler.reset()  # or it would give up after so many sizes
        ways = ("NCCL", "peers", "then product", "in product")
        calls = [partial(exchange(way), *inputs) for way in ways]
        found = [call() for call in calls]
        for parts in zip(*(each[:3] for each in found), strict=True):
            assert all(torch.equal(part, parts[0]) for part in parts), tokens
        assert torch.equal(found[0][3], found[1][3]), tokens
        # Sums in another order: as far apart as bf16 rounds the parts.
        torch.testing.assert_close(found[3][3], found[2][3], rtol=0.02, atol=0.02 * float(found[2][3].abs().max()))
        nccl, peers, then, during = (microseconds(call) for call in calls)
        if rank == 0:
            row = f"{nccl:.1f} | {peers:.1f} | {peers / nccl:.2f} | {then:.1f} | {during:.1f} | {during / then:.2f}"
            print(f"| {tokens} | {row} |", flush=True)
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
