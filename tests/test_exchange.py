"""The exchange, between real processes over gloo."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WIDTHS = (6, 2, 4)  # of q, k and v of one head block


def tagged(rank: int, rows: int, sp: int, width: int) -> torch.Tensor:
    """Folded view [rows*sp, width] whose elements say: token (global number), head block, column."""
    token = (rank * rows + torch.arange(rows)).view(rows, 1, 1)
    block = torch.arange(sp).view(1, sp, 1)
    return (token * 10_000 + block * 100 + torch.arange(width)).float().view(rows * sp, width)


def one_rank(rank: int, sp: int, rows: int, port: int) -> None:
    from vllm_shift.exchange import Exchange

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=sp)
    group = SimpleGroup(unique_name="sp", world_size=sp, device_group=dist.group.WORLD)
    # A further one in the same group: each has its own name.
    exchange, other = Exchange(group), Exchange(group)
    assert exchange.name != other.name
    inputs = [tagged(rank, rows, sp, width) for width in WIDTHS]
    # As in a model: k and v are column slices of one tensor.
    k, v = torch.cat(inputs[1:], dim=-1).split(WIDTHS[1:], dim=-1)
    exchanged = exchange.tokens_to_heads(inputs[0], k, v)
    token = torch.arange(sp * rows).view(-1, 1)
    for found, width in zip(exchanged, WIDTHS, strict=True):
        assert torch.equal(found, (token * 10_000 + rank * 100 + torch.arange(width)).float())
    assert torch.equal(other.rows_to_heads((torch.cat(inputs, dim=-1),)), torch.cat(exchanged, dim=-1))
    assert torch.equal(exchange.heads_to_tokens(exchanged[0].contiguous()), inputs[0])
    dist.destroy_process_group()


class SimpleGroup(SimpleNamespace):
    """The part of vLLM's GroupCoordinator that the exchange uses."""

    __hash__ = object.__hash__


def exchange_through(peers: Any) -> Any:
    """An ``Exchange`` of two ranks that has peers."""
    from vllm_shift.exchange import Exchange

    exchange = Exchange(SimpleGroup(unique_name="sp", world_size=2))
    exchange.peers = peers
    return exchange


@pytest.mark.parametrize(("sp", "rows"), [(2, 1), (2, 5), (3, 4)])
def test_tokens_become_heads_and_come_back(sp, rows):
    from vllm.utils.network_utils import get_open_port

    mp.spawn(one_rank, args=(sp, rows, get_open_port()), nprocs=sp)


class PlainPeers:
    """Stands for ranks that send back rows of this one; after attention, of ones more."""

    def tokens_to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([q, k, v], dim=-1)

    def product_to_heads(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias).view(len(x) * 2, -1)

    def heads_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def heads_to_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x + 1).view(-1, weight.shape[1]) @ weight.t()


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("peers_tokens_to_heads", [(6, 4), (6, 2), (6, 3)]),
        ("peers_product_to_heads", [(3, 5), (14, 5), (14,)]),
        ("peers_product_to_heads", [(3, 5), (14, 5), None]),
        ("peers_heads_to_tokens", [(6, 4)]),
        ("peers_heads_to_product", [(6, 4), (5, 8)]),
    ],
)
def test_a_compiler_is_told_the_shapes_that_the_ops_give(op, shapes):
    exchange = exchange_through(PlainPeers())
    args = [None if shape is None else torch.randn(shape) for shape in shapes]
    found = getattr(torch.ops.vllm_shift, op).default
    torch.library.opcheck(found, (*args, exchange.name), test_utils=("test_schema", "test_faketensor"))
