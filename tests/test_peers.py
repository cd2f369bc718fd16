"""The exchange through peers' memory: its kernel in Triton's interpreter, all ranks in one process."""

import weakref
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from test_early import bare
from test_exchange import PlainPeers, SimpleGroup, exchange_through, tagged

from vllm_shift.dims import ParallelDims
from vllm_shift.exchange import Exchange
from vllm_shift.layers import SlottedQKVParallelLinear

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


def without_streams(monkeypatch) -> None:
    """Let what runs on two CUDA streams run in the order in which it is issued."""
    stream = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


def connected(peers, monkeypatch, sp: int, rows: int, keeps: bool) -> list[Exchange]:
    """The ``Exchange`` of each rank with its peers, in memory of this process; ranks do not wait for each other."""
    calls, places = count(), [torch.full((2, 1000), float("nan")) for _ in range(sp)]

    def empty(elements, dtype, device):
        call = next(calls)
        return places[call // 2][call % 2][:elements]

    def rendezvous(memory, name):
        direction = (memory.data_ptr() - places[int(name)].data_ptr()) // (1000 * memory.itemsize)
        return SimpleNamespace(
            rank=int(name),
            world_size=sp,
            buffer_ptrs=[place[direction].data_ptr() for place in places],
            barrier=lambda: None,
            get_buffer=lambda rank, shape, dtype, first: places[rank][direction][first:][: shape.numel()].view(shape),
        )

    without_streams(monkeypatch)
    monkeypatch.setattr(peers.symmetric_memory, "empty", empty)
    monkeypatch.setattr(peers.symmetric_memory, "rendezvous", rendezvous)
    exchanges = [
        Exchange(
            SimpleGroup(
                world_size=sp, rank_in_group=rank, device="cpu", device_group=SimpleNamespace(group_name=rank),
                unique_name="sp",
            )
        )
        for rank in range(sp)
    ]  # fmt: skip
    for exchange in exchanges:
        exchange.peers = peers.PeerMemory(exchange.group, [LAYER], rows * sp, torch.float32, keeps)
        exchange.peers.meet()
    return exchanges


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("sp", "rows"), [(2, 1), (2, 5), (3, 4)])
def test_tokens_become_heads_and_come_back(peers, monkeypatch, sp, rows, keeps):
    exchanges, sent = connected(peers, monkeypatch, sp, rows, keeps), []
    for rank in range(sp):
        # As in a model: v is a column slice of a larger tensor.
        k, v = torch.cat([tagged(rank, rows, sp, width) for width in (K, V)], dim=-1).split((K, V), dim=-1)
        sent.append((tagged(rank, rows, sp, Q), k, v))
    token = torch.arange(sp * rows).view(-1, 1)
    heads = [(token * 10_000 + number * 100 + torch.arange(2 * V)).float() for number in range(sp)]
    # What comes is complete when every rank has sent, which a barrier waits for: here, the second time.
    for _ in range(2):
        received = [exchange.tokens_to_heads(*each) for exchange, each in zip(exchanges, sent, strict=True)]
        back = [exchange.heads_to_tokens(x) for exchange, x in zip(exchanges, heads, strict=True)]
    for number, qkv in enumerate(received):
        for found, width in zip(qkv, (Q, K, V), strict=True):
            assert torch.equal(found, (token * 10_000 + number * 100 + torch.arange(width)).float())
        memory = exchanges[number].peers._heads._memory
        assert (qkv[0].data_ptr() == memory.data_ptr()) is keeps
    for number, found in enumerate(back):
        assert torch.equal(found, tagged(number, rows, sp, 2 * V))


@pytest.mark.parametrize("swap_bytes", [0, 1_000_000])
@pytest.mark.parametrize(("sp", "rows"), [(2, 1), (2, 5), (3, 4)])
def test_product_with_what_comes(peers, monkeypatch, sp, rows, swap_bytes):
    monkeypatch.setattr(peers, "SWAP_BYTES", swap_bytes)
    exchanges = connected(peers, monkeypatch, sp, rows, True)
    heads = [torch.randn(sp * rows, 2 * V) for _ in exchanges]
    # As in the slots of a row-parallel layer, one slot after the other in memory.
    weight = torch.randn(sp * 2 * V, 7).t()
    swaps, products = [], {}
    monkeypatch.setattr(peers._Buffer, "swap", lambda *args, swap=peers._Buffer.swap: swaps.append(1) or swap(*args))
    for _ in range(2):
        for exchange, x in zip(exchanges, heads, strict=True):
            exchange.peers._turn(to_heads=True)
            products[exchange] = torch.ops.vllm_shift.peers_heads_to_product(x, weight, exchange.name)
    assert bool(swaps) is (swap_bytes == 0 and sp == 2)
    for rank, exchange in enumerate(exchanges):
        tokens = torch.cat([x[rank * rows : (rank + 1) * rows] for x in heads], dim=-1)
        torch.testing.assert_close(products[exchange], tokens @ weight.t())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("swap_bytes", [0, 1_000_000])
@pytest.mark.parametrize(("sp", "rows"), [(2, 1), (2, 5), (3, 4)])
def test_product_that_goes_where_it_is_wanted(peers, monkeypatch, sp, rows, swap_bytes, keeps, bias):
    monkeypatch.setattr(peers, "SWAP_BYTES", swap_bytes)
    exchanges = connected(peers, monkeypatch, sp, rows, keeps)
    width = Q + K + V
    tokens, products = [torch.randn(rows, 7) for _ in exchanges], {}
    weight, add = torch.randn(sp * width, 7), torch.randn(sp * width)
    swaps = []
    monkeypatch.setattr(peers._Buffer, "swap", lambda *args, swap=peers._Buffer.swap: swaps.append(1) or swap(*args))
    for _ in range(2):
        for exchange, x in zip(exchanges, tokens, strict=True):
            products[exchange] = torch.ops.vllm_shift.peers_product_to_heads(
                x, weight, add if bias else None, exchange.name
            )
            exchange.peers._turn(to_heads=False)
    assert bool(swaps) is (swap_bytes == 0 and sp == 2)
    everything = torch.nn.functional.linear(torch.cat(tokens), weight, add if bias else None)
    for rank, exchange in enumerate(exchanges):
        torch.testing.assert_close(products[exchange], everything[:, rank * width : (rank + 1) * width])
        memory = exchange.peers._heads._memory
        assert (products[exchange].data_ptr() == memory.data_ptr()) is keeps


REASONS = {
    "works": None,
    "no custom all-reduce": "vLLM's custom all-reduce is off",
    "it is disabled": "vLLM's custom all-reduce is off",
    "PCIe": "there is no NVLink between all GPUs",
    "another backend": "PyTorch's symmetric memory has the backend NVSHMEM",
    "no handles": "the GPUs cannot share memory (no handles)",
    "another group": "the GPUs cannot share memory (PyTorch takes sp for another group)",
    "no memory": "there is no memory for it (out of memory)",
}


def handle(world_size=2):
    return SimpleNamespace(rank=0, world_size=world_size, buffer_ptrs=[0] * world_size, barrier=lambda: None)


def try_to_connect(
    peers, monkeypatch, rendezvous, all_reduce, elsewhere=(), splits=True, partitions=False, empty=torch.empty
):
    """A group of two ranks, and whether it exchanges through peers; ``elsewhere``: problems of the other rank."""
    others = iter(elsewhere)

    def all_gather_object(problems, problem, group):
        assert group == "all ranks"  # one SP group with memory of its own and one without would do different things
        problems[:] = [problem, next(others, None)]

    all_ranks = SimpleNamespace(
        device_communicator=SimpleNamespace(ca_comm=all_reduce), world_size=2, cpu_group="all ranks"
    )
    monkeypatch.setattr(peers, "get_tp_group", lambda: all_ranks)
    monkeypatch.setattr(peers.symmetric_memory, "empty", empty)
    monkeypatch.setattr(peers.symmetric_memory, "rendezvous", rendezvous)
    monkeypatch.setattr(peers.torch.distributed, "all_gather_object", all_gather_object)
    without_streams(monkeypatch)
    exchange = Exchange(
        SimpleGroup(
            world_size=2, rank_in_group=0, rank=0, first_rank=0, ranks=[0, 1], device="cpu", cpu_group=None,
            device_group=SimpleNamespace(group_name="sp"), unique_name="sp",
        )
    )  # fmt: skip
    compilation = SimpleNamespace(
        splitting_ops_contain_attention=lambda: splits, use_inductor_graph_partition=partitions
    )
    config = SimpleNamespace(compilation_config=compilation, model_config=SimpleNamespace(dtype=torch.float32))
    peers.connect(exchange, [LAYER], 4, config)
    return exchange


@pytest.mark.parametrize("case", REASONS)
def test_nccl_is_used_where_memory_cannot_be_shared(peers, monkeypatch, case):
    def rendezvous(memory, name):
        if case == "no handles":
            raise RuntimeError("no handles")
        return handle(world_size=3 if case == "another group" else 2)

    def empty(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    lines = []
    custom_all_reduce = SimpleNamespace(disabled=case == "it is disabled", fully_connected=case != "PCIe")
    custom_all_reduce = None if case == "no custom all-reduce" else custom_all_reduce
    backend = "NVSHMEM" if case == "another backend" else "CUDA"
    monkeypatch.setattr(peers.symmetric_memory, "get_backend", lambda device: backend)
    monkeypatch.setattr(peers.logger, "info", lambda line, *args: lines.append(line % args))
    exchange = try_to_connect(
        peers, monkeypatch, rendezvous, custom_all_reduce, empty=empty if case == "no memory" else torch.empty
    )
    assert (exchange.peers is not None) is (case == "works")
    way = f"NCCL, as {REASONS[case]}." if REASONS[case] else "each other's memory."
    assert [line.split(" through ")[1] for line in lines] == [way]


def test_what_would_spoil_memory_is_refused(peers, monkeypatch):
    memory = connected(peers, monkeypatch, 2, 3, True)[0].peers
    q, k, v = (torch.zeros(6, width) for width in (Q, K, V))
    memory.tokens_to_heads(q, k, v)
    # A rank may still read what the first one brought.
    with pytest.raises(RuntimeError, match="must be followed by one after it"):
        memory.tokens_to_heads(q, k, v)
    with pytest.raises(AssertionError):
        memory.heads_to_tokens(torch.zeros(8, 2 * V))
    with pytest.raises(AssertionError, match="float64"):
        memory.tokens_to_heads(q, k, v.double())


def test_what_is_sent_is_there_before_it_is_read(peers, monkeypatch):
    buffer = connected(peers, monkeypatch, 2, 3, True)[0].peers._heads
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            events.append(f"{self.name} stream waits for {event.place}")

    class Event:
        def record(self, stream):
            self.place = f"{stream.name} after {events[-1]}"

    class Kernel:
        def __getitem__(self, grid):
            events.append("send")
            return write_rows[grid]

    here, write_rows = Stream("first"), peers.write_rows
    get_buffer = buffer._handle.get_buffer
    buffer._stream, buffer._ready, buffer._sent = Stream("second"), Event(), Event()
    buffer._handle.barrier = lambda: events.append("barrier")
    buffer._handle.get_buffer = lambda *args: events.append("send") or get_buffer(*args)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(peers, "write_rows", Kernel())
    buffer.exchange((torch.zeros(6, 4),), (2, 1, 1, 3))
    assert events == ["send", "barrier"]
    events.clear()
    events.append("x")
    buffer.swap(torch.zeros(3, 4), 0, lambda: events.append("product"))
    assert events == [
        "x", "second stream waits for first after x", "send",
        "product", "first stream waits for second after send", "barrier",
    ]  # fmt: skip


@pytest.mark.parametrize("sp", [2, 3])
def test_what_the_next_exchange_writes_to_is_given_to_nobody(peers, monkeypatch, sp):
    monkeypatch.setattr(peers, "SWAP_BYTES", 10**6)
    memory = connected(peers, monkeypatch, sp, 2, False)[0].peers
    made = memory.product_to_heads(torch.randn(2, 5), torch.randn(sp * (Q + K + V), 5), None)
    back = memory.heads_to_tokens(torch.randn(2 * sp, 2 * V))
    for x, buffer in ((made, memory._heads), (back, memory._tokens)):
        assert x.untyped_storage().data_ptr() != buffer._memory.untyped_storage().data_ptr()


@pytest.mark.parametrize(("bytes_more", "swaps"), [(0, True), (1, False)])
def test_a_swap_is_for_so_many_bytes(peers, monkeypatch, bytes_more, swaps):
    memory = connected(peers, monkeypatch, 2, 3, True)[0].peers
    memory.swap_bytes = 3 * 8 * 4 + bytes_more
    assert memory._swaps(3, 8) is swaps


@pytest.mark.parametrize(
    ("splits", "partitions", "keeps"), [(True, False, True), (True, True, False), (False, False, False)]
)
@pytest.mark.parametrize("elsewhere", [(), ("there is no memory left",), (None, "the GPUs cannot share memory")])
def test_all_ranks_of_a_group_exchange_in_the_same_way(peers, monkeypatch, splits, partitions, keeps, elsewhere):
    monkeypatch.setattr(peers.symmetric_memory, "get_backend", lambda device: None)
    all_reduce = SimpleNamespace(disabled=False, fully_connected=True)
    met, never_reused = [], []
    monkeypatch.setattr(peers, "never_reuse", never_reused.append)
    exchange = try_to_connect(
        peers, monkeypatch, lambda *args: met.append(1) or handle(), all_reduce, elsewhere, splits, partitions
    )
    assert (exchange.peers is not None) is (not elsewhere)
    # Nobody waits for a rank that has no memory.
    assert bool(met) is (not elsewhere or elsewhere[0] is None)
    if not elsewhere:
        assert exchange.peers._keeps is keeps
        assert never_reused == [torch.ops.vllm_shift.peers_product_to_heads.default] * keeps


def test_peers_are_those_of_an_engine_and_end_with_it():
    first, second = exchange_through(PlainPeers()), exchange_through(PlainPeers())
    ops, ended = torch.ops.vllm_shift, weakref.ref(first.peers)
    second.peers.heads_to_tokens = lambda x: x + 2
    assert [ops.peers_heads_to_tokens(torch.zeros(1), each.name).item() for each in (first, second)] == [1, 2]
    name = first.name
    del first
    assert ended() is None
    with pytest.raises(KeyError, match=name):
        ops.peers_heads_to_tokens(torch.zeros(1), name)


def test_an_early_exchange_through_peers_is_one_with_the_product():
    exchange = exchange_through(PlainPeers())
    switch = SimpleNamespace(dims=ParallelDims(2, 1, 0), in_sp=True, early=True, exchange=exchange)
    x, weight, bias = torch.randn(3, 5), torch.randn(14, 5), torch.randn(14)
    layer = bare(
        SlottedQKVParallelLinear,
        switch=switch,
        whole=None,
        adapters=None,
        return_bias=False,
        weight_slots=SimpleNamespace(whole=weight),
        bias_slots=SimpleNamespace(whole=bias),
    )
    assert torch.equal(layer(x), PlainPeers().product_to_heads(x, weight, bias))
