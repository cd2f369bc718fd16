"""Whether the exchange through each other's memory gives right values whatever rank is late, on real GPUs.

Rounds of random size, with and without CUDA graphs, with and without products beside the exchange, and with pauses of
random length on every rank between the parts and before copies. Nothing waits for a GPU until all rounds are done.
Values are small whole numbers, so that every sum is exact and every element is compared. Then the same with an error of
ordering planted, each of which has to be found.
Example: python benchmarks/exchange_stress.py --sp 2
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from exchange_times import Group, join

from vllm_shift.peers import PeerMemory

HIDDEN, Q, KV, OUT = 64, 64, 16, 48
LAYER: Any = SimpleNamespace(num_heads=4, num_kv_heads=1, head_size=16, head_size_v=16)
WIDTH = Q + 2 * KV
# Tokens of a rank, and a limit between them for exchanges beside products.
SIZES, SWAP_BYTES = (1, 3, 40, 300, 2000), 64 * 2**10
# Inputs of each size; CUDA graphs of each size and way.
INPUTS, GRAPHS = 6, 2
# Cycles of a GPU that a pause takes; a kernel of a round takes some 10,000.
PAUSES = (0, 0, 0, 20_000, 100_000, 500_000)


class Rounds:
    """Exchanges of one rank, with what they should give.

    Args:
        group: the SP group.
        peers: what is tried.
    """

    def __init__(self, group: Group, peers: PeerMemory) -> None:
        self._peers, self._sp, self._rank = peers, group.world_size, group.rank_in_group
        self._pauses = random.Random(self._rank)
        self.wrong = torch.zeros((), dtype=torch.int64, device=group.device)
        generator = torch.Generator(group.device).manual_seed(0)

        def whole_numbers(*shape: int, most: int) -> torch.Tensor:
            return torch.randint(-most, most + 1, shape, device=group.device, generator=generator).float()

        self._qkv = whole_numbers(self._sp * WIDTH, HIDDEN, most=1)
        self._bias = whole_numbers(self._sp * WIDTH, most=4)
        self._output = whole_numbers(self._sp * Q, OUT, most=1).t()
        # The same on all ranks, of which each takes its own.
        self.inputs = {
            n: [self._expect(whole_numbers(self._sp, n, HIDDEN, most=4)) for _ in range(INPUTS)] for n in SIZES
        }

    def _expect(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the hidden states of all ranks [S, n, HIDDEN]: this rank's, its rows in the head view, and its output."""
        heads = F.linear(x.flatten(0, 1), self._qkv, self._bias).view(self._sp, -1, self._sp, WIDTH)
        output = F.linear(2 * heads[self._rank, :, :, :Q].flatten(1), self._output)
        return x[self._rank], heads[:, :, self._rank].flatten(0, 1), output

    def _pause(self) -> None:
        torch.cuda._sleep(self._pauses.choice(PAUSES))

    def run(self, beside: bool, x: torch.Tensor, heads: torch.Tensor, output: torch.Tensor) -> None:
        """One round: hidden states to heads and back, by the ops that may run beside products or by the others."""
        self._pause()
        if beside:
            received = self._peers.product_to_heads(x, self._qkv, self._bias)
        else:
            q, k, v = F.linear(x, self._qkv, self._bias).view(-1, WIDTH).split((Q, KV, KV), dim=-1)
            received = self._peers.tokens_to_heads(q, k, v)
        self._pause()
        self.wrong += (received != heads).sum()
        attended = 2 * received[:, :Q].contiguous()
        self._pause()
        if beside:
            found = self._peers.heads_to_product(attended, self._output)
        else:
            found = F.linear(self._peers.heads_to_tokens(attended).view(len(x), -1), self._output)
        self._pause()
        self.wrong += (found != output).sum()

    def graph(self, n: int, beside: bool) -> Callable[[tuple[torch.Tensor, ...]], None]:
        """A round of ``n`` tokens as a CUDA graph, its pauses drawn once."""
        graph, places = torch.cuda.CUDAGraph(), [x.clone() for x in self.inputs[n][0]]
        with torch.cuda.graph(graph):
            self.run(beside, *places)

        def replay(values: tuple[torch.Tensor, ...]) -> None:
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            graph.replay()

        return replay


@contextmanager
def planted(error: str, peers: PeerMemory) -> Iterator[None]:
    """Let an exchange make this error."""
    buffers, wait = (peers._heads, peers._tokens), torch.cuda.Stream.wait_event
    place = {"a copy does not wait for what it sends": "_ready", "a barrier does not wait for the copy": "_sent"}
    ignored = [getattr(buffer, place[error]) for buffer in buffers if error in place]
    before_copies = [buffer._ready for buffer in buffers]

    def wait_event(self: Any, event: Any) -> None:
        if any(event is each for each in ignored):
            return
        wait(self, event)
        if any(event is each for each in before_copies):
            with torch.cuda.stream(self):
                torch.cuda._sleep(random.choice(PAUSES))

    if error == "no barrier":
        for buffer in buffers:
            buffer._handle = SimpleNamespace(barrier=lambda: None, get_buffer=buffer._handle.get_buffer)
    elif error == "one buffer for both directions":
        peers._tokens = peers._heads
    with mock.patch.object(torch.cuda.Stream, "wait_event", wait_event):
        yield


# With CUDA graphs or without: the capture of a stream that nothing waits for fails by itself.
CASES = (
    ("", True),
    ("no barrier", True),
    ("no barrier", False),
    ("one buffer for both directions", True),
    ("one buffer for both directions", False),
    ("a copy does not wait for what it sends", False),
    ("a barrier does not wait for the copy", False),
)


def wrong_elements(group: Group, rounds: int, error: str, with_graphs: bool) -> int:
    """Elements that are wrong on any rank after so many rounds."""
    peers = PeerMemory(group, [LAYER], max(SIZES) * group.world_size, torch.float32, keeps=True)  # type: ignore[arg-type]
    peers.meet()
    if peers.swap_bytes < math.inf:  # only two ranks have exchanges beside products
        peers.swap_bytes = SWAP_BYTES
    common = random.Random(0)
    with planted(error, peers):
        tried = Rounds(group, peers)
        ways = [(n, beside) for n in SIZES for beside in (False, True)]
        for n, beside in ways:  # compiles the kernel
            tried.run(beside, *tried.inputs[n][0])
        graphs = {way: [tried.graph(*way) for _ in range(GRAPHS)] for way in ways if with_graphs}
        tried.wrong.zero_()
        torch.cuda.synchronize()
        dist.barrier()
        for _ in range(rounds):
            n, beside = common.choice(ways)
            values = common.choice(tried.inputs[n])
            if with_graphs and common.random() < 0.5:
                common.choice(graphs[n, beside])(values)
            else:
                tried.run(beside, *values)
        torch.cuda.synchronize()
    dist.all_reduce(tried.wrong)
    return int(tried.wrong)


def run_rank(rank: int, args: argparse.Namespace) -> None:
    group = join(rank, args)
    failed = False
    if rank == 0:
        print("| planted | CUDA graphs | rounds | wrong elements |\n| --- | --- | --- | --- |", flush=True)
    for error, with_graphs in CASES:
        if args.sp > 2 and "copy" in error:  # more than two ranks have no copies
            continue
        wrong = wrong_elements(group, args.rounds, error, with_graphs)
        failed |= (wrong > 0) != bool(error)
        if rank == 0:
            print(f"| {error or 'nothing'} | {'yes' if with_graphs else 'no'} | {args.rounds} | {wrong} |", flush=True)
    dist.destroy_process_group()
    sys.exit(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--port", type=int, default=29556)
    args = parser.parse_args()
    torch.multiprocessing.spawn(run_rank, args=(args,), nprocs=args.sp)


if __name__ == "__main__":
    main()
