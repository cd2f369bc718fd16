"""Modules on gathered tokens, on one rank without collectives, and inside a trace."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.minimax_rms_norm import MiniMaxText01RMSNormTP

from vllm_shift.gathered import Gather, gathered_modules


class Switch:
    """Rank 1 of an SP group of 2 and a TP group of 3 whose ranks have the same tokens, which fill all rows.

    Each of the P = 6 ranks has the same partial sums. ``values`` counts what a rank sends, as in a ring.
    """

    dims = SimpleNamespace(sp=2, sp_rank=1)
    position_repeats = 2

    def __init__(self, in_sp: bool) -> None:
        self.in_sp, self.values = in_sp, 0.0
        self.sp_group = SimpleNamespace(all_gather=self._all_gather, reduce_scatter=self._reduce_scatter)

    def _all_gather(self, x, dim):
        self.values += x.numel()
        return torch.cat([x, x], dim)

    def _reduce_scatter(self, x, dim):
        self.values += x.numel() / 2
        return 2 * x.chunk(2, dim)[1]

    def all_reduce_tp(self, x):
        self.values += 2 * 2 / 3 * x.numel()
        return 3 * x

    def without_padding(self, x):
        return x

    def with_padding(self, x):
        return x


class WritesToArgument(nn.Module):
    """Mixes tokens, and uses their positions."""

    def forward(self, positions, hidden_states, output):
        output.copy_((hidden_states * (1 + positions.unsqueeze(-1))).cumsum(0))


class Returns(nn.Module):
    """Is given one of its parameters, as Mamba layers of Falcon-H1 are."""

    def forward(self, hidden_states, mup_vector):
        return hidden_states.cumsum(0), hidden_states * mup_vector


class Model(nn.Module):
    def __init__(self, in_sp: bool) -> None:
        super().__init__()
        self.first, self.second = WritesToArgument(), Returns()
        for module in (self.first, self.second):
            Gather(Switch(in_sp), module)

    def forward(self, positions, hidden_states):
        output = torch.empty_like(hidden_states)
        self.first(positions, hidden_states, output=output)
        return self.second(output, mup_vector=torch.full((1, 3), 2.0))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_rank_keeps_its_tokens_of_the_whole(rows):
    x, positions = torch.randn(rows, 3), torch.arange(rows)
    found = Model(in_sp=True)(positions.repeat_interleave(2), x)
    expected = Model(in_sp=False)(positions.repeat(2), torch.cat([x, x]))
    for ours, whole in zip(found, expected, strict=True):
        # The second module gathers the second rank's result of the first, as the fake group does.
        assert ours.shape == (rows, 3)
        assert whole.shape == (2 * rows, 3)
    assert torch.allclose(found[1], expected[1][rows:])


class Routes(nn.Module):
    """Is given hidden states twice, as experts that route by themselves."""

    def forward(self, hidden_states, router_logits):
        return (hidden_states * router_logits).cumsum(0)


def test_the_hooks_can_be_traced():
    model, routes, switch = Model(in_sp=True), Routes(), Switch(in_sp=True)
    Gather(switch, routes)

    def whole(positions, hidden_states):
        return *model(positions, hidden_states), routes(hidden_states, hidden_states)

    compiled = torch.compile(whole, fullgraph=True, backend="eager")
    for rows in (4, 6):
        inputs = torch.arange(rows).repeat_interleave(2), torch.randn(rows, 3)
        switch.values = 0.0
        found, counted = compiled(*inputs), switch.values
        switch.values = 0.0
        for ours, expected in zip(found, whole(*inputs), strict=True):
            assert torch.equal(ours, expected)
        assert counted == switch.values == rows * 3


class Row(RowParallelLinear):
    """Doubles; sums over 6 ranks with the same partial sums."""

    def __init__(self, tp_size: int = 6) -> None:
        nn.Module.__init__(self)
        self.reduce_results, self.tp_size = True, tp_size

    def forward(self, x):
        return (6 if self.reduce_results and self.tp_size > 1 else 1) * 2 * x, None


class Mixes(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.rows = nn.ModuleList(Row(size) for size in sizes)

    def forward(self, hidden_states):
        x = hidden_states.cumsum(0)
        for row in self.rows:
            x, _ = row(x)
        return x


class MixesInto(Mixes):
    def forward(self, hidden_states, output):
        output.copy_(super().forward(hidden_states))


class Experts(MoERunnerInterface):
    """Sums over ranks unless told not to; may have such a layer inside, whose sum is its own."""

    def __init__(self, is_sequence_parallel: bool = False) -> None:
        nn.Module.__init__(self)
        self.moe_config = SimpleNamespace(
            skip_final_all_reduce=False,
            is_sequence_parallel=is_sequence_parallel,
            tp_size=6,
            ep_size=1,
            moe_parallel_config=SimpleNamespace(use_all2all_kernels=False),
        )
        self.router, self.shared = None, Row()

    def forward(self, hidden_states, router_logits):
        x, _ = self.shared((hidden_states + router_logits).cumsum(0) / 12)
        return x if self.moe_config.skip_final_all_reduce else 6 * x


Experts.__abstractmethods__ = frozenset()


def experts(**changed: Any) -> Experts:
    module = Experts()
    for name, value in changed.items():
        config = module.moe_config
        setattr(config if hasattr(config, name) else config.moe_parallel_config, name, value)
    return module


def experts_that_do_nothing() -> Experts:
    module = Experts()
    module.router = ZeroExpertRouter.__new__(ZeroExpertRouter)
    return module


def leaves_the_sum() -> Mixes:
    module = Mixes(6)
    module.rows[0].reduce_results = False
    return module


class AddsAfterwards(Mixes):
    def forward(self, hidden_states):
        return super().forward(hidden_states) / 4 + 1


@pytest.mark.parametrize(
    ("make", "sums"),
    [
        (lambda: Mixes(6), True),
        (lambda: MixesInto(6), True),
        (Experts, True),
        # Which of two sums is the last one is not known; a layer of one rank's own has none.
        (lambda: Mixes(6, 6), False),
        (lambda: Mixes(1), False),
        (lambda: Experts(is_sequence_parallel=True), False),
        (lambda: experts(use_all2all_kernels=True), False),
        (lambda: experts(skip_final_all_reduce=True), False),
        (lambda: experts(tp_size=1), False),
        (experts_that_do_nothing, False),
        (leaves_the_sum, False),
        # What the sum becomes afterwards is not a sum.
        (lambda: AddsAfterwards(6), True),
    ],
    ids=["returns", "writes", "experts", "two layers", "no sum", "sums elsewhere", "all-to-all", "skips",
         "on every rank", "zero experts", "leaves the sum", "adds afterwards"],
)  # fmt: skip
def test_a_sum_over_ranks_costs_no_more_than_in_tp_mode(make, sums):
    module, switch = make(), Switch(in_sp=True)
    gather = Gather(switch, module)

    def run(x):
        if isinstance(module, Experts):
            return module(x, router_logits=x)
        if not isinstance(module, MixesInto):
            return module(x)
        module(x, output=(output := torch.zeros_like(x)))
        return output

    x = torch.randn(4, 3)
    switch.in_sp = False
    expected = run(torch.cat([x, x]))[4:]
    assert switch.values == 0
    for _ in range(2):
        switch.in_sp, switch.values = True, 0.0
        gather.take_over_sums(True)
        assert torch.allclose(run(x), expected)
        gather.take_over_sums(False)
        switch.in_sp = False
        assert torch.allclose(run(torch.cat([x, x]))[4:], expected)
    values_of_tp = 2 * 5 / 6 * (8 * 3)
    assert switch.values == (pytest.approx(values_of_tp) if sums else x.numel())


class FakeAttention(Attention):
    def __init__(self) -> None:
        nn.Module.__init__(self)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = FakeAttention(), nn.LayerNorm(2)


class StockRow(RowParallelLinear):
    def __init__(self) -> None:
        nn.Module.__init__(self)


class NormOverAllHeads(Plain):
    def forward(self, x):
        return self._norm(x)

    def _norm(self, x):
        return self.norm(tensor_model_parallel_all_gather(x))


def loaded_in_its_own_way(*shape: int) -> nn.Module:
    norm = nn.LayerNorm(shape)
    norm.weight.weight_loader = lambda param, loaded_weight: None
    return norm


class NormOfEachHead(Plain):
    """Weights [heads, head size], of which a rank loads a shard, as Command R+."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = loaded_in_its_own_way(3, 2)


class NormLikeMiniMax(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = MiniMaxText01RMSNormTP.__new__(MiniMaxText01RMSNormTP)
        nn.Module.__init__(self.norm)


class NotOfHeads(Plain):
    """A norm with the same weights for all heads; one over hidden states, of a decoder layer; experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = loaded_in_its_own_way(2), Experts()
        self.mlp.weights = loaded_in_its_own_way(3, 2)


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm = Plain(), loaded_in_its_own_way(3, 2)


class ExpertsOnTheirOwn(NormOverAllHeads):
    """Calls it only with vLLM's sequence parallelism of experts."""

    is_sequence_parallel = False


class Whole(nn.Module):
    """Calls a collective, but is no layer."""

    def __init__(self) -> None:
        super().__init__()
        layers = [Plain(), NormOverAllHeads(), ExpertsOnTheirOwn(), NormOfEachHead(), NormLikeMiniMax(), DecoderLayer()]
        self.layers = nn.ModuleList(layers)
        self.layers[0].o_proj = StockRow()  # its own code gathers, too, and has a way to run in SP mode

    def forward(self, x):
        return tensor_model_parallel_all_gather(x)


def test_modules_that_mix_heads_are_found():
    assert [name for name, _ in gathered_modules(Whole())] == ["layers.1", "layers.3", "layers.4"]
    assert [name for name, _ in gathered_modules(NotOfHeads())] == ["mlp"]


class Logits(LogitsProcessor):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def _gather_logits(self, logits):
        return tensor_model_parallel_all_gather(logits)


def test_logits_are_made_after_the_model():
    assert list(gathered_modules(nn.Sequential(Logits()))) == []


def test_weights_of_other_kinds_are_none_of_heads():
    model = Plain()
    model.o_proj = StockRow()
    model.o_proj.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    model.o_proj.weight.weight_loader = lambda param, loaded_weight: None
    model.norm = nn.LayerNorm((3, 2))  # the same on all ranks
    assert list(gathered_modules(model)) == []


def test_a_model_of_two_layers_is_no_layer():
    model = Whole()
    model.layers = nn.ModuleList([Plain(), Plain()])
    assert list(gathered_modules(model)) == []


class TakesRows(nn.Module):
    def forward(self, positions, hidden_states):
        assert positions.shape == (3, len(hidden_states))
        return hidden_states * positions[2].unsqueeze(-1)


def test_positions_of_several_dimensions():
    module, x = TakesRows(), torch.ones(4, 1)
    Gather(Switch(in_sp=True), module)
    positions = torch.arange(12).view(3, 4)
    assert module(positions.repeat_interleave(2, dim=-1), x).flatten().tolist() == [8, 9, 10, 11]


def test_two_ranks_sum_too():
    assert Gather(Switch(in_sp=True), experts(tp_size=2))._experts is not None
    assert Gather(Switch(in_sp=True), experts(tp_size=1, ep_size=2))._experts is not None
    assert Gather(Switch(in_sp=True), Mixes(2))._layer is not None
