"""Which models exchange q, k and v where they are made."""

import pytest
from test_gathered import Experts
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

from vllm_shift.layers import (
    SlottedColumnParallelLinear,
    SlottedQKVParallelLinear,
    SlottedRowParallelLinear,
    check_layers,
    stop_shifting,
    why_not_early,
)


def bare(kind: type, **attributes: object) -> nn.Module:
    """A layer of this class with nothing but these attributes."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def attention() -> nn.Module:
    return bare(Attention, num_heads=4, num_kv_heads=1, head_size=8, head_size_v=8)


def qkv(columns: int = 48, whole: object = None, adapters: object = None) -> nn.Module:
    return bare(
        SlottedQKVParallelLinear, shifts=True, whole=whole, adapters=adapters, output_size_per_partition=columns
    )


def block(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


SOUND = {"qkv_proj": qkv, "attn": attention, "o_proj": lambda: bare(SlottedRowParallelLinear, shifts=True)}
REFUSED = {
    "a gate": ({"gate": lambda: bare(SlottedColumnParallelLinear, shifts=True)}, "does not make q, k and v in one"),
    "no layer for all": ({"qkv_proj": nn.Identity}, "does not make q, k and v in one"),
    "two attention layers": ({"other": attention}, "does not make q, k and v in one"),
    "a gate in the layer": ({"qkv_proj": lambda: qkv(80)}, "makes q, k and v together with more"),
    "quantized": ({"qkv_proj": lambda: qkv(whole=object())}, "makes q, k and v of quantized weights or with LoRA"),
    "LoRA": ({"qkv_proj": lambda: qkv(adapters=object())}, "makes q, k and v of quantized weights or with LoRA"),
}


def model_of(**changed: object) -> nn.Module:
    parts = SOUND | changed
    layers = [block(self_attn=block(**{name: make() for name, make in parts.items()})) for _ in range(2)]
    return block(layers=nn.ModuleList(layers))


def test_a_block_of_one_product_and_attention_can():
    assert why_not_early(model_of()) is None


@pytest.mark.parametrize("case", REFUSED)
def test_others_say_why_not(case):
    changed, problem = REFUSED[case]
    assert f"layers.0.self_attn {problem}" in why_not_early(model_of(**changed))


def test_nothing_else_may_take_positions():
    model = model_of()
    model.mla = bare(MultiHeadLatentAttentionWrapper)
    assert why_not_early(model) == "mla takes positions"
    # In a table instead of a rotation, as OPT.
    model = model_of()
    model.embed_positions = nn.Embedding(8, 4)
    assert why_not_early(model) == "the model learns positions"


def test_attention_elsewhere_cannot():
    # Code of transformers calls attention layers that are no part of its modules.
    assert why_not_early(model_of(attn=nn.Identity)) == "no layer of the model has attention"


def test_what_works_on_any_rows_is_no_hindrance():
    # Experts are gathered and take no positions; a gate that is the same on all ranks does not shift.
    assert why_not_early(model_of(gate=lambda: bare(SlottedColumnParallelLinear, shifts=False))) is None
    model = model_of()
    model.layers[0].mlp = Experts()
    assert why_not_early(model) is None


def test_a_refusal_counts_only_where_a_layer_shifts():
    layer = bare(SlottedRowParallelLinear, shifts=True, refusal="reduce_results=False", whole=None)
    with pytest.raises(NotImplementedError, match="0: reduce_results=False"):
        check_layers(nn.Sequential(layer))
    stop_shifting([layer])
    check_layers(nn.Sequential(layer))
