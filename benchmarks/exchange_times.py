"""Time of one layer's exchange, both directions, between real GPUs: through NCCL and through each other's memory.

In CUDA graphs, without anything else on the GPUs; packing for NCCL and unpacking are compiled, as in an engine. The
products before and after it are timed, too: with the exchange between them, with the second direction beside its
product, and with both, as an engine of two ranks runs them. First compares what they all give.
Example: python benchmarks/exchange_times.py --shape 8b --sp 2
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from engines import SHAPES

from vllm_shift.exchange import Exchange
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


def join(rank: int, args: argparse.Namespace) -> Group:
    """The group of ``args.sp`` processes with a GPU each; ``rank`` is this one."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=args.sp, device_id=device)
    return Group(world_size=args.sp, rank_in_group=rank, device=device, device_group=dist.group.WORLD, unique_name="sp")


def run_rank(rank: int, args: argparse.Namespace) -> None:
    group = join(rank, args)
    device, sizes = group.device, SHAPES[args.shape]
    heads, kv_heads = (max(1, sizes[f"num_{kind}_heads"] // args.sp) for kind in ("attention", "key_value"))
    nccl, peers, size = Exchange(group), Exchange(group), sizes["head_dim"]
    layer = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_size=size, head_size_v=size)
    peers.peers = PeerMemory(group, [layer], max(args.tokens), torch.bfloat16, keeps=True)
    peers.peers.meet()

    # Of the output projection, in the layout of the slots, and of q, k and v.
    hidden, widths = sizes["hidden_size"], (heads * size, kv_heads * size, kv_heads * size)
    output = torch.randn(args.sp * heads * size, hidden, device=device, dtype=torch.bfloat16).t() / 64
    qkv = torch.randn(args.sp * sum(widths), hidden, device=device, dtype=torch.bfloat16) / 64

    def ways(h: Any, q: Any, k: Any, v: Any, x: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """What comes before attention, and what comes after it: q, k, v and this rank's tokens or their product."""
        ops, name = torch.ops.vllm_shift, peers.name
        there, back = (torch.compile(part, dynamic=False) for part in (nccl.tokens_to_heads, nccl.heads_to_tokens))

        def made() -> Any:
            return F.linear(h, qkv).view(-1, sum(widths)).split(widths, dim=-1)

        def product() -> Any:
            return F.linear(peers.heads_to_tokens(x).view(-1, output.shape[1]), output)

        def early() -> Any:
            return ops.peers_product_to_heads(h, qkv, None, name).split(widths, dim=-1)

        beside = partial(ops.peers_heads_to_product, x, output, name)
        return {
            "NCCL": (partial(there, q, k, v), partial(back, x)),
            "peers": (partial(peers.tokens_to_heads, q, k, v), partial(peers.heads_to_tokens, x)),
            "between products": (lambda: peers.tokens_to_heads(*made()), product),
            "second beside": (lambda: peers.tokens_to_heads(*made()), beside),
            "both beside": (early, beside),
        }

    if rank == 0:
        print(
            "| tokens | NCCL, us | peers | / NCCL | between products | second beside | / between | both | / between |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for tokens in args.tokens:
        n = tokens // args.sp
        shapes = [(n, hidden), *((n * args.sp, width) for width in (*widths, widths[0]))]
        torch.compiler.reset()  # or it would give up after so many sizes
        found, times = {}, {}
        for way, parts in ways(*(torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)).items():
            # The next exchange may write to what the first one gives.
            found[way] = [[x.clone() for x in parts[0]()], parts[1]()]
            times[way] = microseconds(lambda parts=parts: [part() for part in parts])
        assert all(map(torch.equal, found["NCCL"][0], found["peers"][0])), tokens
        assert torch.equal(found["NCCL"][1], found["peers"][1]), tokens
        for way in ("second beside", "both beside"):
            expected = [*found["between products"][0], found["between products"][1]]
            for part, same in zip([*found[way][0], found[way][1]], expected, strict=True):
                # Sums in another order: as far apart as bf16 rounds the parts.
                torch.testing.assert_close(part, same, rtol=0.02, atol=0.02 * float(same.abs().max()))
        by_nccl, by_peers, between, second, both = times.values()
        if rank == 0:
            ratios = f"{second:.1f} | {second / between:.2f} | {both:.1f} | {both / between:.2f}"
            print(
                f"| {tokens} | {by_nccl:.1f} | {by_peers:.1f} | {by_peers / by_nccl:.2f} | {between:.1f} | {ratios} |",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--port", type=int, default=29555)
    args = parser.parse_args()
    torch.multiprocessing.spawn(run_rank, args=(args,), nprocs=args.sp)


if __name__ == "__main__":
    main()
