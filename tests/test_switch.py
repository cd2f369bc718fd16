"""Which mode a step runs in, and what the model sees of it, on one rank without collectives."""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_exchange import PlainPeers, SimpleGroup
from torch import nn
from vllm.config import CompilationMode
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

from vllm_shift import switch as switch_module
from vllm_shift.dims import ParallelDims
from vllm_shift.switch import ModeSwitch, learns_positions

VLLM_CONFIG = SimpleNamespace(
    compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
    scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
)


class FakeAttention(Attention):
    def __init__(self) -> None:
        nn.Module.__init__(self)


class Model(nn.Module):
    """Records what it is called with; returns a hidden state per token id."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.attention = FakeAttention()
        self.calls = []
        self.fails = False

    def forward(self, input_ids, positions):
        self.calls.append((input_ids, positions, get_forward_context().skip_compiled))
        if self.fails:
            raise RuntimeError("out of memory")
        return input_ids.float().unsqueeze(-1)


@pytest.fixture
def make():
    def build(sp: int, rank: int, threshold: int) -> tuple[ModeSwitch, Model]:
        gathered = SimpleGroup(unique_name="sp", world_size=sp, all_gather=lambda x, dim: torch.cat([x] * sp, dim))
        switch = ModeSwitch(ParallelDims(sp, 1, rank), threshold, gathered, None)
        model = Model()
        switch.attach(model, VLLM_CONFIG)
        return switch, model

    context = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={})
    with override_forward_context(context):
        yield build


def step(model: Model, num_tokens: int) -> torch.Tensor:
    return model(input_ids=torch.arange(100, 100 + num_tokens), positions=torch.arange(num_tokens))


@pytest.mark.parametrize("threshold", [0, 1, 7, 30])
def test_the_threshold_itself_is_tp(make, threshold):
    switch, model = make(2, 0, threshold)
    for num_tokens in range(1, 40):
        output = step(model, num_tokens)
        in_sp = num_tokens > threshold
        assert switch.is_sp_step(num_tokens) == in_sp
        rows = -(-num_tokens // 2) if in_sp else num_tokens
        assert len(model.calls[-1][0]) == rows
        assert len(output) == num_tokens
        assert model.calls[-1][2] == in_sp  # SP mode must not run the trace of TP mode
        assert not switch.in_sp
        assert not get_forward_context().skip_compiled


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 9])
def test_each_rank_gets_its_own_tokens(make, num_tokens):
    sp, seen = 3, []
    for rank in range(sp):
        _, model = make(sp, rank, 0)
        step(model, num_tokens)
        ids, positions, _ = model.calls[0]
        assert positions.view(-1, sp).eq(positions.view(-1, sp)[:, :1]).all()
        seen += list(zip(ids.tolist(), positions.view(-1, sp)[:, 0].tolist(), strict=True))
    assert seen[:num_tokens] == [(100 + i, i) for i in range(num_tokens)]
    assert all(padding == (0, 0) for padding in seen[num_tokens:])


def test_inputs_stay_where_cuda_graphs_read_them(make):
    _, model = make(2, 1, 0)
    for num_tokens in (9, 64, 1):
        step(model, num_tokens)
    assert len({(ids.data_ptr(), positions.data_ptr()) for ids, positions, _ in model.calls}) == 1


def test_positions_of_several_dimensions_are_never_contiguous(make):
    # Of contiguous rows in the largest step, torch.compile would take those of smaller steps to be contiguous.
    _, model = make(2, 1, 0)
    for num_tokens in (64, 9):
        positions = torch.arange(num_tokens).repeat(3, 1)
        model(input_ids=torch.arange(num_tokens), positions=positions)
    (_, largest, _), (_, smaller, _) = model.calls
    assert not largest.is_contiguous()
    assert largest.stride() == smaller.stride()
    assert torch.equal(smaller[0], torch.tensor([5, 5, 6, 6, 7, 7, 8, 8, 0, 0]))


@pytest.mark.parametrize("num_tokens", [2, 7])
def test_early_exchange_needs_the_positions_of_all_tokens(make, monkeypatch, num_tokens):
    switch, model = make(3, 1, 0)
    monkeypatch.setattr(switch.exchange, "tokens_to_heads", lambda *args: pytest.fail("exchanged a second time"))
    switch.early = True
    step(model, num_tokens)
    ids, positions, _ = model.calls[0]
    rows = switch.dims.local_tokens(num_tokens) * 3
    assert len(ids) * 3 == rows
    assert positions.tolist() == [*range(num_tokens), *[0] * (rows - num_tokens)]
    layer = SimpleNamespace(num_heads=1, num_kv_heads=1, head_size=2, head_size_v=2)
    switch.in_sp = True
    q, k, v = (torch.randn(rows, 2) for _ in range(3))
    found, _ = switch._before_attention(layer, (q, k, v), {})
    assert all(torch.equal(got, x[:num_tokens]) for got, x in zip(found, (q, k, v), strict=True))


class GathersOnly(nn.Module):
    """Keeps its place for attention that SP mode cannot divide; compares rows, as DeepSeek-V2's code does."""

    def __init__(self) -> None:
        super().__init__()
        self.mla = MultiHeadLatentAttentionWrapper.__new__(MultiHeadLatentAttentionWrapper)
        nn.Module.__init__(self.mla)
        self.mla.o_proj = RowParallelLinear.__new__(RowParallelLinear)
        nn.Module.__init__(self.mla.o_proj)
        self.mla.o_proj.reduce_results, self.mla.o_proj.tp_size = True, 2
        self.sums: list[bool] = []

    def forward(self, input_ids, positions):
        assert len(input_ids) == len(positions)
        self.sums.append(self.mla.o_proj.reduce_results)
        if len(self.sums) == 3:
            raise RuntimeError("out of memory")
        return input_ids.float().unsqueeze(-1)


def test_positions_have_the_rows_of_hidden_states_where_all_attention_is_gathered(make):
    switch, _ = make(2, 1, 0)
    model = GathersOnly()
    switch.attach(model, VLLM_CONFIG)
    assert len(step(model, 9)) == 9


def test_gathered_layers_leave_out_their_all_reduce_in_sp_mode_only(make):
    switch, _ = make(2, 1, 5)
    model = GathersOnly()
    switch.attach(model, VLLM_CONFIG)
    step(model, 5)
    step(model, 6)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, 6)
    step(model, 5)
    assert model.sums == [True, False, False, True]


class LearnsPositions(Model):
    """Adds an embedding of positions to those of tokens, as OPT and GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(64, 4)

    def forward(self, input_ids, positions):
        return super().forward(input_ids, positions) + self.embed_positions(positions)


def test_learned_positions_have_the_rows_of_hidden_states(make):
    switch, _ = make(2, 1, 0)
    model = LearnsPositions()
    switch.attach(model, VLLM_CONFIG)
    assert step(model, 9).shape == (9, 4)
    assert model.calls[0][1].tolist() == [5, 6, 7, 8, 0]


def test_a_failed_step_leaves_sp_mode(make):
    switch, model = make(2, 0, 4)
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, 8)
    assert not switch.in_sp
    model.fails = False
    assert len(step(model, 3)) == 3


def test_a_model_without_attention_is_refused(make):
    switch, _ = make(2, 0, 4)
    with pytest.raises(NotImplementedError, match="Linear has no attention layer"):
        switch.attach(nn.Linear(2, 2), VLLM_CONFIG)


@pytest.fixture
def twins(monkeypatch):
    """What happens to the compiled twins: whether they exchange through peers, in and out."""
    events = []
    swaps = SimpleNamespace(swap=lambda in_sp: events.append("in" if in_sp else "out"))
    monkeypatch.setattr(
        switch_module,
        "CompiledTwins",
        lambda model, config, through_peers, groups: events.append(through_peers) or swaps,
    )
    return events


def test_twins_run_in_sp_mode_only_and_not_eagerly(make, twins):
    switch, model = make(2, 0, 4)
    assert twins == [False]
    step(model, 4)
    assert twins == [False]
    step(model, 5)
    assert twins == [False, "in", "out"]
    assert not model.calls[-1][2]  # their trace is that of SP mode
    model.fails = True
    with pytest.raises(RuntimeError):
        step(model, 5)
    assert twins == [False, "in", "out", "in", "out"]
    model.fails, switch.eager = False, True
    for num_tokens in (4, 5):
        step(model, num_tokens)
        assert model.calls[-1][2]
    assert twins.count("in") == 2


class ReplacesABuffer(Model):
    """As vLLM's rotary embeddings whose table has another dtype than the model, unless they are being traced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, input_ids, positions):
        self.table = self.table.bfloat16()
        if self.fails:
            raise RuntimeError("out of memory")
        return input_ids.float().unsqueeze(-1)


def test_steps_that_skip_what_is_compiled_leave_buffers_as_traces_know_them(make):
    switch, _ = make(2, 0, 8)
    compiled = SimpleNamespace(mode=CompilationMode.DYNAMO_TRACE_ONCE)
    config = SimpleNamespace(**vars(VLLM_CONFIG) | {"compilation_config": compiled})
    switch.attach(model := ReplacesABuffer(), config)
    table = model.table
    step(model, 9)
    assert model.table is table
    switch.eager = True
    step(model, 8)
    assert model.table is table
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, 8)
    assert model.table is table
    switch.eager = model.fails = False
    step(model, 8)
    assert model.table.dtype == torch.bfloat16


def test_without_traces_a_buffer_is_replaced_once(make):
    switch, _ = make(2, 0, 8)
    switch.attach(model := ReplacesABuffer(), VLLM_CONFIG)
    step(model, 9)
    assert model.table.dtype == torch.bfloat16


def test_padding_is_zero_after_a_larger_step(make):
    _, model = make(2, 1, 0)
    step(model, 64)
    step(model, 9)
    ids, positions, _ = model.calls[-1]
    assert (ids[-1], positions[-1]) == (0, 0)


class TakesMore(Model):
    def forward(self, input_ids, positions, token_type_ids):
        return super().forward(input_ids, positions)


def test_an_input_that_sp_mode_does_not_know_is_refused(make):
    switch, _ = make(2, 0, 4)
    switch.attach(model := TakesMore(), VLLM_CONFIG)
    with pytest.raises(NotImplementedError, match="TakesMore takes token_type_ids, which SP mode does not know"):
        model(input_ids=torch.arange(8), positions=torch.arange(8), token_type_ids=torch.arange(8))


class OtherAttention(nn.Module, AttentionLayerBase):
    pass


OtherAttention.__abstractmethods__ = frozenset()


def test_attention_that_sp_mode_does_not_know_is_refused(make):
    switch, _ = make(2, 0, 4)
    model = Model()
    model.other = OtherAttention()
    with pytest.raises(NotImplementedError, match=r"layers that SP mode does not know: \['OtherAttention'\]"):
        switch.attach(model, VLLM_CONFIG)


@pytest.mark.parametrize("through_peers", [True, False])
def test_gpus_connect_for_the_rows_of_the_largest_step(make, twins, monkeypatch, through_peers):
    switch, _ = make(2, 0, 4)
    asked = []

    def connect(exchange, layers, rows, config):
        asked.append((len(layers), rows))
        exchange.peers = PlainPeers() if through_peers else None

    monkeypatch.setitem(sys.modules, "vllm_shift.peers", SimpleNamespace(connect=connect))
    monkeypatch.setattr(switch_module, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    largest = SimpleNamespace(max_num_batched_tokens=65)
    switch.attach(Model(), SimpleNamespace(**vars(VLLM_CONFIG) | {"scheduler_config": largest}))
    assert asked == [(1, 66)]
    assert (switch.exchange.peers is not None) is through_peers
    assert twins[-1] is through_peers


def test_what_graphs_read_is_noted_for_sp_mode_too(monkeypatch):
    events = []

    @contextmanager
    def graph_capture(context):
        events.append(f"begin on {context.stream}")
        yield
        events.append("note what the graphs read")

    monkeypatch.setattr(switch_module.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: "the stream")
    for dims, tp_group in (
        (ParallelDims(2, 2, 0), SimpleNamespace(graph_capture=graph_capture)),
        (ParallelDims(2, 1, 0), None),
    ):
        events.clear()
        switch = ModeSwitch(dims, 8, SimpleGroup(unique_name="sp", world_size=2), tp_group)
        capture_model = switch.graph_capture()(lambda: events.append("capture") or 7)
        assert capture_model() == 7
        noted = ["begin on the stream", "capture", "note what the graphs read"]
        assert events == (noted if tp_group else ["capture"])


@pytest.mark.parametrize("tp", [1, 2])
def test_the_benchmark_of_one_rank_has_what_is_asked_of_groups(monkeypatch, tp):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from one_rank_worker import LocalGroup, OneRankDims

    monkeypatch.setattr(switch_module.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: "the stream")
    sp_group, tp_group = (LocalGroup(unique_name=name, world_size=2, device_group=None) for name in ("sp", "rows"))
    switch = ModeSwitch(OneRankDims(2, tp, 0), 8, sp_group, tp_group if tp > 1 else None)
    with switch.graph_capture():
        assert switch.nccl_collectives() == 2 * tp  # the worker says 0, as they are local copies
    assert switch.all_reduce_tp(torch.ones(2)).tolist() == [1, 1]


def test_a_model_that_needs_reduce_scatters_does_not_start_without_them(monkeypatch):
    monkeypatch.setattr(switch_module.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(switch_module, "gathered_modules", lambda model: [("experts", nn.Identity())])
    nccl = SimpleNamespace(pynccl_comm=SimpleNamespace(disabled=True))
    sp_group = SimpleGroup(unique_name="sp", world_size=2, device_communicator=nccl)
    with pytest.raises(NotImplementedError, match=r"Model has layers.*unset VLLM_DISABLE_PYNCCL"):
        ModeSwitch(ParallelDims(2, 1, 0), 8, sp_group, None).attach(Model(), VLLM_CONFIG)


class Rotary(nn.Module):
    pass


def test_a_table_beside_a_rotation_is_none_of_positions():
    assert learns_positions(nn.Sequential(nn.Embedding(2, 2)))
    assert not learns_positions(nn.Sequential(Rotary(), nn.Embedding(2, 2)))
    assert not learns_positions(nn.Sequential(nn.Linear(2, 2)))


class Attends(Model):
    def __init__(self):
        super().__init__()
        self.attention.forward = lambda q, k, v: q
        vars(self.attention).update(num_heads=1, num_kv_heads=1, head_size=2, head_size_v=2)

    def forward(self, input_ids, positions):
        rows = len(positions)
        return self.attention(torch.zeros(rows, 2), torch.zeros(rows, 2), torch.zeros(rows, 2))[: len(input_ids)]


def test_attention_exchanges_in_sp_mode_only(make, monkeypatch):
    events = []
    switch, _ = make(2, 0, 4)
    monkeypatch.setattr(switch.exchange, "tokens_to_heads", lambda *qkv: events.append("in") or qkv)
    monkeypatch.setattr(switch.exchange, "heads_to_tokens", lambda x: events.append(len(x)) or x)
    switch.attach(model := Attends(), VLLM_CONFIG)
    step(model, 4)
    assert events == []
    step(model, 5)
    assert events == ["in", 6]


def test_a_compiled_sp_mode_keeps_its_padding(make, twins, monkeypatch):
    rows = []
    switch, _ = make(2, 0, 4)
    monkeypatch.setattr(switch.exchange, "tokens_to_heads", lambda *qkv: qkv)
    monkeypatch.setattr(switch.exchange, "heads_to_tokens", lambda x: rows.append(len(x)) or x)
    switch.attach(model := Attends(), VLLM_CONFIG)
    model.attention.forward = lambda q, k, v: rows.append(len(q)) or q
    step(model, 5)
    assert rows == [6, 6]


def test_attention_inside_a_gathered_module_exchanges_nothing(monkeypatch):
    peers = SimpleNamespace(connect=lambda *args: pytest.fail("nothing to exchange"))
    monkeypatch.setitem(sys.modules, "vllm_shift.peers", peers)
    monkeypatch.setattr(switch_module, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    nccl = SimpleNamespace(pynccl_comm=SimpleNamespace(disabled=False))
    switch = ModeSwitch(
        ParallelDims(2, 1, 0), 0, SimpleGroup(unique_name="sp", world_size=2, device_communicator=nccl), None
    )
    model = GathersOnly()
    model.mla.attn = FakeAttention()
    switch.attach(model, VLLM_CONFIG)
    assert switch.attention_layers == []
    assert switch.exchange.peers is None


def test_the_twins_are_told_their_groups(monkeypatch):
    told = []
    monkeypatch.setattr(switch_module, "CompiledTwins", lambda model, config, peers, groups: told.append(groups))
    for group in (None, SimpleNamespace(unique_name="tp:1")):
        switch = ModeSwitch(ParallelDims(2, 2, 0), 8, SimpleGroup(unique_name="sp", world_size=2), group)
        switch.attach(Model(), VLLM_CONFIG)
        assert told.pop() == [switch.exchange.name, *(["tp:1"] if group else [])]


def summing(custom_all_reduce):
    return SimpleNamespace(device_communicator=SimpleNamespace(ca_comm=custom_all_reduce))


@pytest.mark.parametrize("through_peers", [True, False])
@pytest.mark.parametrize(
    ("tp_group", "sums"),
    [
        (None, 0),
        (SimpleNamespace(device_communicator=None), 2),
        (summing(SimpleNamespace(disabled=True)), 2),
        (summing(SimpleNamespace(disabled=False, fully_connected=True)), 0),
    ],
    ids=["T = 1", "none", "off", "on"],
)
def test_collectives_of_nccl_are_those_that_nothing_else_does(through_peers, tp_group, sums):
    switch = ModeSwitch(
        ParallelDims(2, 2 if tp_group else 1, 0), 8, SimpleGroup(unique_name="sp", world_size=2), tp_group
    )
    switch.exchange.peers = PlainPeers() if through_peers else None
    assert switch.nccl_collectives() == sums + (0 if through_peers else 2)
