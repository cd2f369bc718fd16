"""The exchange through peers' memory: its kernel in Triton's interpreter, all ranks in one process."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch
from test_exchange import tagged

pytest.importorskip("triton")

# Columns of q, k and v of one head block; values have a head size of their own.
Q, K, V = 6, 3, 4
LAYER = SimpleNamespace(num_heads=2, num_kv_heads=1, head_size=3, head_size_v=V)


@pytest.fixture
def peers(monkeypatch):
    """The module ``peers``, for CPU tensors; it copies 4 columns at a time."""
    # Read when the kernel is defined; nothing else imports this module on CPU.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from vllm_shift import peers

    monkeypatch.setattr(peers, "BLOCK", 4)
    return peers


def connected(peers, monkeypatch, sp: int, rows: int, keeps: bool) -> list:
    """A ``PeerMemory`` of each rank, in memory of this process; ranks do not wait for each other."""
    calls, places = count(), [torch.full((2, 1000), float("nan")) for _ in range(sp)]

    def empty(elements, dtype, device):
        call = next(calls)
        return places[call // 2][call % 2][:elements]

    def rendezvous(memory, name):
        direction = (memory.data_ptr() - places[int(name)].data_ptr()) // (1000 * memory.itemsize)
        return SimpleNamespace(buffer_ptrs=[place[direction].data_ptr() for place in places], barrier=lambda: None)

    monkeypatch.setattr(peers.symmetric_memory, "empty", empty)
    monkeypatch.setattr(peers.symmetric_memory, "rendezvous", rendezvous)
    groups = [
        SimpleNamespace(world_size=sp, rank_in_group=rank, device="cpu", device_group=SimpleNamespace(group_name=rank))
        for rank in range(sp)
    ]
    return [peers.PeerMemory(group, [LAYER], rows * sp, torch.float32, keeps) for group in groups]


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("sp", "rows"), [(2, 1), (2, 5), (3, 4)])
def test_tokens_become_heads_and_come_back(peers, monkeypatch, sp, rows, keeps):
    ranks = connected(peers, monkeypatch, sp, rows, keeps)
    sent = []
    for rank in range(sp):
        # As in a model: v is a column slice of a larger tensor.
        k, v = torch.cat([tagged(rank, rows, sp, width) for width in (K, V)], dim=-1).split((K, V), dim=-1)
        sent.append((tagged(rank, rows, sp, Q), k, v))
    token = torch.arange(sp * rows).view(-1, 1)
    # What comes is complete when every rank has sent, which a barrier waits for: here, the second time.
    for _ in range(2):
        received = [rank.tokens_to_heads(*each) for rank, each in zip(ranks, sent, strict=True)]
    for number, found in enumerate(received):
        expected = [token * 10_000 + number * 100 + torch.arange(width) for width in (Q, K, V)]
        assert torch.equal(found, torch.cat(expected, dim=-1).float())
        assert (found.data_ptr() == ranks[number]._heads._memory.data_ptr()) is keeps
    heads = [(token * 10_000 + number * 100 + torch.arange(2 * V)).float() for number in range(sp)]
    for _ in range(2):
        back = [rank.heads_to_tokens(x) for rank, x in zip(ranks, heads, strict=True)]
    for number, found in enumerate(back):
        assert torch.equal(found, tagged(number, rows, sp, 2 * V))


@pytest.mark.parametrize("case", ["works", "no custom all-reduce", "it is disabled", "memory cannot be shared"])
def test_nccl_is_used_where_memory_cannot_be_shared(peers, monkeypatch, case):
    from vllm_shift import exchange

    def rendezvous(memory, name):
        if case == "memory cannot be shared":
            raise RuntimeError("no handles")
        return SimpleNamespace(buffer_ptrs=[0], barrier=lambda: None)

    class Group(SimpleNamespace):
        __hash__ = object.__hash__

    lines = []
    custom_all_reduce = None if case == "no custom all-reduce" else SimpleNamespace(disabled=case == "it is disabled")
    tp_group = SimpleNamespace(device_communicator=SimpleNamespace(ca_comm=custom_all_reduce))
    monkeypatch.setattr(peers, "get_tp_group", lambda: tp_group)
    monkeypatch.setattr(peers.symmetric_memory, "empty", torch.empty)
    monkeypatch.setattr(peers.symmetric_memory, "rendezvous", rendezvous)
    monkeypatch.setattr(
        peers.torch.distributed, "all_gather_object", lambda found, x, group: found.__setitem__(slice(None), [x])
    )
    monkeypatch.setattr(peers.logger, "info", lambda line, *args: lines.append(line % args))
    device_group = SimpleNamespace(group_name="sp")
    group = Group(
        world_size=1, rank_in_group=0, rank=0, first_rank=0, ranks=[0], device="cpu", cpu_group=None,
        device_group=device_group,
    )  # fmt: skip
    compilation = SimpleNamespace(splitting_ops_contain_attention=lambda: True, use_inductor_graph_partition=False)
    config = SimpleNamespace(compilation_config=compilation, model_config=SimpleNamespace(dtype=torch.float32))
    peers.connect(group, [LAYER], 4, config)
    assert (group in exchange._peers) is (case == "works")
    expected = {
        "works": "each other's memory.",
        "memory cannot be shared": "NCCL, as the GPUs cannot share memory (no handles).",
    }
    assert len(lines) == 1
    assert lines[0].endswith("through " + expected.get(case, "NCCL, as vLLM's custom all-reduce is off."))


def test_it_refuses_more_rows_than_it_has_memory_for(peers, monkeypatch):
    (rank, _) = connected(peers, monkeypatch, 2, 3, True)
    with pytest.raises(AssertionError):
        rank.heads_to_tokens(torch.zeros(8, 2 * V))
