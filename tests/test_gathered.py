"""Modules on gathered tokens, on one rank without collectives, and inside a trace."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import Attention

from vllm_shift.gathered import Gather, gathered_modules


class Switch:
    """Rank 1 of an SP group of 2 whose ranks have the same tokens, which fill all rows."""

    dims = SimpleNamespace(sp=2, sp_rank=1)
    position_repeats = 2
    sp_group = SimpleNamespace(all_gather=lambda x, dim: torch.cat([x, x], dim))

    def __init__(self, in_sp: bool) -> None:
        self.in_sp = in_sp

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


def test_the_hooks_can_be_traced():
    model = Model(in_sp=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in (4, 6):
        inputs = torch.arange(rows).repeat_interleave(2), torch.randn(rows, 3)
        for ours, expected in zip(compiled(*inputs), model(*inputs), strict=True):
            assert torch.equal(ours, expected)


class FakeAttention(Attention):
    def __init__(self) -> None:
        nn.Module.__init__(self)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = FakeAttention(), nn.LayerNorm(2)


class NormOverAllHeads(Plain):
    def forward(self, x):
        return self._norm(x)

    def _norm(self, x):
        return self.norm(tensor_model_parallel_all_gather(x))


class Whole(nn.Module):
    """Calls a collective, but is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Plain(), NormOverAllHeads()])

    def forward(self, x):
        return tensor_model_parallel_all_gather(x)


def test_modules_that_call_collectives_are_found():
    assert [name for name, _ in gathered_modules(Whole())] == ["layers.1"]
