"""What the layers refuse: settings that have no way to run in SP mode, and another plugin in their place."""

import pytest
from torch import nn
from vllm.model_executor import custom_op

from vllm_shift import layers


def layer(refusal: str, shifts: bool) -> nn.Module:
    found = layers.SlottedRowParallelLinear.__new__(layers.SlottedRowParallelLinear)
    nn.Module.__init__(found)
    found.refusal, found.shifts = refusal, shifts
    return found


def test_a_layer_that_cannot_shift_is_refused_by_name():
    sound = nn.ModuleDict({"norm": nn.Linear(2, 2), "up": layer("", True), "same_in_both": layer("reason", False)})
    layers.check_layers(sound)
    with pytest.raises(NotImplementedError, match=r"^down: gather_output=True is not supported in SP mode$"):
        layers.check_layers(nn.ModuleDict({"up": sound["up"], "down": layer("gather_output=True", True)}))


def test_layers_that_another_plugin_has_replaced_are_not_replaced_again(monkeypatch):
    before = dict(custom_op.op_registry_oot)
    with layers.slotted_layers(None):
        assert custom_op.op_registry_oot["RowParallelLinear"] is layers.SlottedRowParallelLinear
        with layers.stock_layers():
            assert custom_op.op_registry_oot == before
    assert custom_op.op_registry_oot == before
    monkeypatch.setitem(custom_op.op_registry_oot, "RowParallelLinear", object)
    with (
        pytest.raises(RuntimeError, match=r"\['RowParallelLinear'\], which another vLLM plugin"),
        layers.slotted_layers(None),
    ):
        pass
