"""What layers refuse: what has no way to run in SP mode, and what another plugin has replaced."""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
from torch import nn
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor import custom_op
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_shift import layers
from vllm_shift.dims import ParallelDims

SWITCH = SimpleNamespace(dims=ParallelDims(2, 1, 0), in_sp=False, early=False)


@pytest.fixture
def building():
    """As while a model is built on the first of two ranks."""
    with ExitStack() as stack:
        for module in ("layers.linear", "layers.vocab_parallel_embedding", "parameter"):
            path = f"vllm.model_executor.{module}.get_tensor_model_parallel"
            stack.enter_context(mock.patch(f"{path}_world_size", return_value=2))
            stack.enter_context(mock.patch(f"{path}_rank", return_value=0))
        stack.enter_context(set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))))
        stack.enter_context(layers.slotted_layers(SWITCH))
        yield


REFUSED = {
    "gather_output=True, skip_bias_add=False": lambda: linear.ColumnParallelLinear(8, 8, gather_output=True),
    "gather_output=False, skip_bias_add=True": lambda: linear.ColumnParallelLinear(8, 8, skip_bias_add=True),
    "input_is_parallel=False, reduce_results=True": lambda: linear.RowParallelLinear(8, 8, input_is_parallel=False),
    "input_is_parallel=True, reduce_results=False": lambda: linear.RowParallelLinear(
        8, 8, bias=False, reduce_results=False
    ),
    "added embeddings": lambda: VocabParallelEmbedding(68, 8, org_num_embeddings=64),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_layers_that_cannot_shift_are_refused(building, problem):
    with pytest.raises(NotImplementedError, match=problem):
        layers.check_layers(nn.Sequential(REFUSED[problem]()))


def test_layers_that_can_shift_are_not(building):
    layers.check_layers(nn.Sequential(linear.ColumnParallelLinear(8, 8), linear.RowParallelLinear(8, 8)))


def test_layers_that_another_plugin_has_replaced_are_not_replaced_again(monkeypatch):
    before = dict(custom_op.op_registry_oot)
    with layers.slotted_layers(SWITCH):
        assert custom_op.op_registry_oot["RowParallelLinear"] is layers.SlottedRowParallelLinear
        with layers.stock_layers():
            assert custom_op.op_registry_oot == before
    assert custom_op.op_registry_oot == before
    monkeypatch.setitem(custom_op.op_registry_oot, "RowParallelLinear", object)
    with (
        pytest.raises(RuntimeError, match=r"\['RowParallelLinear'\], which another vLLM plugin"),
        layers.slotted_layers(SWITCH),
    ):
        pass


def test_layers_of_each_rank_alone_have_no_slots(building):
    for layer in (linear.ColumnParallelLinear(8, 8, disable_tp=True), linear.RowParallelLinear(8, 8, disable_tp=True)):
        assert not layer.shifts
        assert not hasattr(layer, "weight_slots")
        assert layer.weight.shape == (8, 8)


def test_a_bias_that_is_not_there_may_be_skipped(building):
    layers.check_layers(nn.Sequential(linear.ColumnParallelLinear(8, 8, bias=False, skip_bias_add=True)))
