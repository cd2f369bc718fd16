"""Which models can exchange q, k and v where they are made."""

import pytest
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

from vllm_shift.dims import ParallelDims
from vllm_shift.layers import (
    SlottedColumnParallelLinear,
    SlottedQKVParallelLinear,
    SlottedRowParallelLinear,
    exchange_early,
)
from vllm_shift.switch import ModeSwitch


def bare(kind: type, **attributes: object) -> nn.Module:
    """A layer of this class with nothing but these attributes."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def attention() -> nn.Module:
    return bare(Attention, num_heads=4, num_kv_heads=1, head_size=8, head_size_v=8)


def qkv(columns: int = 48, whole: object = None) -> nn.Module:
    return bare(SlottedQKVParallelLinear, shifts=True, whole=whole, output_size_per_partition=columns)


def block(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


SOUND = {"qkv_proj": qkv, "attn": attention, "o_proj": lambda: bare(SlottedRowParallelLinear, shifts=True)}
REFUSED = {
    "a gate": ({"gate": lambda: bare(SlottedColumnParallelLinear, shifts=True)}, "self_attn does not make q, k and v"),
    "no layer for all": ({"qkv_proj": nn.Identity}, "self_attn does not make q, k and v"),
    "two attention layers": ({"other": attention}, "self_attn does not make q, k and v"),
    "a gate in the layer": ({"qkv_proj": lambda: qkv(80)}, "self_attn has q, k and v quantized, or together with more"),
    "quantized": ({"qkv_proj": lambda: qkv(whole=object())}, "self_attn has q, k and v quantized"),
}


def model_of(**changed: object) -> nn.Module:
    parts = SOUND | changed
    layers = [block(self_attn=block(**{name: make() for name, make in parts.items()})) for _ in range(2)]
    return block(layers=nn.ModuleList(layers))


def test_a_block_of_one_product_and_attention_can():
    switch = ModeSwitch.__new__(ModeSwitch)
    switch.early, switch.dims = False, ParallelDims(2, 1, 0)
    exchange_early(model_of(), switch)
    assert switch.early


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_by_name(case):
    changed, problem = REFUSED[case]
    switch = ModeSwitch.__new__(ModeSwitch)
    switch.early = False
    with pytest.raises(NotImplementedError, match=rf"layers\.0\.{problem}"):
        exchange_early(model_of(**changed), switch)
    assert not switch.early


def test_gathered_modules_that_take_positions_are_refused():
    model = model_of()
    model.mla = bare(MultiHeadLatentAttentionWrapper)
    switch = ModeSwitch.__new__(ModeSwitch)
    with pytest.raises(NotImplementedError, match="mla needs positions"):
        exchange_early(model, switch)
