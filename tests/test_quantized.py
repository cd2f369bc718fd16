"""Quantized layers, one process in the place of each rank: TP mode equals vLLM's layer of TP=P, SP mode that of TP=T.

vLLM's CPU build has its INT8 kernel, and PyTorch's for FP8; what quantizes to FP8 on CUDA is replaced here. It has a
4-bit kernel and an FP8 KV cache for processors with AVX-512 only.
"""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mutations import MUTATIONS_OF_QUANTIZED
from quantize import BLOCK, FORMS, FP8_MAX
from rank_group import QUANTIZED, QUANTIZED_CHECKS, assert_same
from test_early import bare
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_processing
from vllm.model_executor.warmup import deep_gemm_warmup
from vllm.platforms import PlatformEnum

from vllm_shift import layers
from vllm_shift.dims import ParallelDims
from vllm_shift.quantized import WholeLinear, check_method, quantizes_inputs

HIDDEN, HEADS, KV_HEADS, HEAD, MIDDLE = 256, 8, 4, 32, 512
KINDS = ("qkv", "gate_up", "down")
FOUR_BITS = ("int4", "awq", "gptq")
LAYOUTS = [(2, 1), (2, 2), (4, 1)]


def scaled_fp8_quant(x, scale=None, use_per_token_if_dynamic=False, **_):
    """What vLLM's CUDA kernel does, which its CPU build does not have."""
    if scale is None:
        largest = x.abs().amax(-1, keepdim=True) if use_per_token_if_dynamic else x.abs().amax().reshape(1)
        scale = largest.float() / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


class ReferenceBlockKernel(Fp8BlockScaledMMLinearKernel):
    """FP8 in blocks, for which vLLM has no kernel on most CPUs."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    def apply_block_scaled_mm(self, A, B, As, Bs):
        a = A.float() * As.repeat_interleave(BLOCK, 1)
        return a @ (B.float() * Bs.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)).t()


@pytest.fixture(scope="module", autouse=True)
def vllm_config():
    model = mock.MagicMock(spec=ModelConfig, dtype=torch.bfloat16, is_moe=False)
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    config.model_config = model
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with (
        set_current_vllm_config(config),
        mock.patch("vllm._custom_ops.scaled_fp8_quant", scaled_fp8_quant),
        mock.patch.dict(kernels._POSSIBLE_FP8_BLOCK_KERNELS, {PlatformEnum.CPU: [ReferenceBlockKernel]}),
    ):
        yield config
    torch.set_default_dtype(default)


def quant_config(form):
    if form == "online":
        config = get_quantization_config("fp8").from_config({"quant_method": "fp8", "activation_scheme": "dynamic"})
        config.is_checkpoint_fp8_serialized = False
    else:
        settings = FORMS[form][1]
        config = get_quantization_config(settings["quant_method"]).from_config(settings)
    if form == "gptq":  # which vLLM reads from the checkpoint's files
        config.modules_in_block_to_quantize = [f"{name}_proj" for name in ("q", "k", "v", "gate", "up", "down")]
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


def checkpoint(kind):
    """bf16 weights and biases of a layer, by the shard ids that loaders take."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        "qkv": {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD},
        "gate_up": {0: MIDDLE, 1: MIDDLE},
        "down": {None: HIDDEN},
    }[kind]
    columns = MIDDLE if kind == "down" else HIDDEN
    return {
        shard: (
            (torch.randn(size, columns, generator=generator) * (1 + size / 500)).bfloat16(),
            torch.randn(size, generator=generator).bfloat16(),
        )
        for shard, size in rows.items()
    }


def make(kind, form, world, rank, switch=None, dummy=False):
    """A layer of vLLM, or with ``switch`` of ours, on one rank, with the weights loaded, or made up, and processed."""
    if form in FOUR_BITS and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM has no 4-bit kernel for this processor, which lacks AVX-512")
    with ExitStack() as stack:
        for module in ("distributed", "model_executor.layers.linear", "model_executor.parameter"):
            path = f"vllm.{module}.get_tensor_model_parallel"
            stack.enter_context(mock.patch(f"{path}_world_size", return_value=world))
            stack.enter_context(mock.patch(f"{path}_rank", return_value=rank))
        if switch is not None:
            stack.enter_context(layers.slotted_layers(switch))
        config = quant_config(form)
        if kind == "qkv":
            layer = linear.QKVParallelLinear(
                HIDDEN, HEAD, HEADS, KV_HEADS, quant_config=config, prefix="layers.0.qkv_proj"
            )
        elif kind == "gate_up":
            layer = linear.MergedColumnParallelLinear(
                HIDDEN, [MIDDLE, MIDDLE], quant_config=config, prefix="layers.0.gate_up_proj"
            )
        else:
            layer = linear.RowParallelLinear(MIDDLE, HIDDEN, quant_config=config, prefix="layers.0.down_proj")
        model = torch.nn.Sequential(layer)
        for shard, (weight, bias) in checkpoint(kind).items() if not dummy else ():
            parts = {"weight": weight} if form == "online" else FORMS[form][0](weight.float())[0]
            for name, x in (parts | {"bias": bias}).items():
                param = getattr(layer, name)
                param.weight_loader(param, x, *([] if shard is None else [shard]))
        model_config = SimpleNamespace(dtype=torch.bfloat16)
        if dummy:
            DummyModelLoader(get_current_vllm_config().load_config).load_weights(model, model_config)
        if form == "online":
            finalize_layerwise_processing(model, model_config)
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def product(layer, x):
    """Without the all-reduce of a row-parallel layer."""
    return layer.quant_method.apply(layer, x, layer.bias if not hasattr(layer, "reduce_results") else None)


def slot_of(kind, out, world, slot):
    """The columns of ``out`` [n, outputs of TP=T] that are those of one of ``world`` shards."""
    if kind == "down":
        return out
    sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD] if kind == "qkv" else [MIDDLE, MIDDLE]
    share = out.shape[-1] / sum(sizes)
    parts = out.split([int(size * share) for size in sizes], dim=-1)
    return torch.cat([part.chunk(world, -1)[slot] for part in parts], dim=-1)


CASES = [(form, kind) for form in ("online", *FORMS) for kind in KINDS]
# Heads are smaller than a block.
CASES = [case for case in CASES if case not in (("fp8-block", "qkv"), ("modelopt-block", "qkv"))]


@pytest.mark.parametrize(("form", "kind"), CASES)
@pytest.mark.parametrize(("sp", "tp"), LAYOUTS)
def test_both_modes_equal_vllms_layers(form, kind, sp, tp):
    generator = torch.Generator().manual_seed(1)
    n = 5
    for rank in range(sp * tp):
        dims = ParallelDims(sp, tp, rank)
        switch = SimpleNamespace(dims=dims, in_sp=False, early=False, all_reduce_tp=lambda x: x)
        ours = make(kind, form, dims.world, rank, switch)
        of_p, of_t = make(kind, form, dims.world, rank), make(kind, form, tp, dims.tp_rank)
        width = MIDDLE // tp if kind == "down" else HIDDEN
        x = torch.randn(n, width, generator=generator).bfloat16()
        whole = product(of_t, x)
        switch.in_sp = True
        ours.skip_bias_add = kind == "down"
        folded = x.view(n * sp, -1) if kind == "down" else x
        found, _ = ours(folded)
        if kind == "down":
            assert torch.equal(found, whole)
        else:
            found = found.view(n, sp, -1)
            for slot in range(sp):
                assert torch.equal(found[:, slot], slot_of(kind, whole, sp, slot))
        switch.in_sp = False
        own = x[:, : MIDDLE // dims.world] if kind == "down" else x
        expected = product(of_p, own)
        if form == "online" and kind != "down":
            # Its one scale is that of TP=T in both modes.
            expected = found[:, dims.sp_rank]
        assert torch.equal(product(ours, own), expected)


@pytest.mark.parametrize("form", ["online", "fp8-channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_made_up_weights_are_those_of_both_modes(form, kind, vllm_config, monkeypatch):
    monkeypatch.setattr(vllm_config.load_config, "load_format", "dummy")
    switch = SimpleNamespace(dims=ParallelDims(2, 1, 1), in_sp=False, early=False, all_reduce_tp=lambda x: x)
    layer = make(kind, form, 2, 1, switch, dummy=True)
    x = torch.randn(5, MIDDLE // 2 if kind == "down" else HIDDEN).bfloat16()
    expected = product(layer, x)
    assert expected.any()
    switch.in_sp = layer.skip_bias_add = True
    # Every slot is the same.
    found, _ = layer(x.repeat_interleave(2, 0) if kind == "down" else x)
    if kind == "down":
        torch.testing.assert_close(found, 2 * expected, rtol=0.05, atol=1e-3)
    else:
        assert torch.equal(found.view(5, 2, -1), torch.stack((expected, expected), 1))


@pytest.mark.parametrize("form", ["online", "fp8", "fp8-channel", "modelopt", "modelopt-cache", "modelopt-channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_copy_where_the_format_can_be_sliced(form, kind):
    dims = ParallelDims(2, 1, 1)
    layer = make(kind, form, 2, 1, SimpleNamespace(dims=dims, in_sp=False, early=False))
    one_copy = kind != "down"
    same = layer.weight.untyped_storage().data_ptr() == layer.whole.weight.untyped_storage().data_ptr()
    assert same == one_copy
    assert layer.second_copy == 0 if one_copy else layer.second_copy >= layer.weight.numel()


def test_vllm_may_warm_up_the_kernels_of_both_modes_once_weights_are_loaded():
    layer = make("gate_up", "fp8-block", 2, 0, SimpleNamespace(dims=ParallelDims(2, 1, 0), in_sp=False))
    # Before, what processes all modules with a method must not see the one that processed itself.
    assert layer.whole.quant_method is None
    assert not deep_gemm_warmup._fp8_linear_may_use_deep_gemm(layer.whole)
    layer.whole.finish()
    weight, _, blocks = deep_gemm_warmup._extract_data_from_linear_base_module(layer.whole)
    assert weight is layer.whole.weight
    assert blocks == [BLOCK, BLOCK]


@pytest.mark.parametrize("form", ["fp8-channel", "int4"])
def test_a_layer_that_stops_shifting_keeps_its_shard_alone(form):
    rank = 1
    layer = make("gate_up", form, 2, rank, SimpleNamespace(dims=ParallelDims(2, 1, rank), in_sp=False))
    x = torch.randn(5, HIDDEN).bfloat16()
    expected = product(layer, x)
    layer.stop_shifting()
    assert layer.whole is None
    assert torch.equal(product(layer, x), expected)
    for parameter in layer.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.parametrize(
    ("method", "use_w4a8", "quantizes"),
    [
        ("CompressedTensorsW8A8Int8", False, True),
        ("AutoGPTQLinearMethod", False, False),
        ("AutoGPTQLinearMethod", True, True),  # on a CPU with AMX
    ],
)
def test_whether_inputs_are_quantized(method, use_w4a8, quantizes):
    whole = bare(WholeLinear, method=type(method, (), {})(), use_w4a8=use_w4a8)
    assert quantizes_inputs(torch.nn.Sequential(torch.nn.Identity(), whole)) is quantizes


def test_other_methods_are_refused_by_name():
    layer = SimpleNamespace(prefix="layers.3.qkv_proj", quant_method=SimpleNamespace())
    with pytest.raises(NotImplementedError, match=r"layers.3.qkv_proj: .* SimpleNamespace; it supports .*Fp8Linear"):
        check_method(layer)


@pytest.mark.engine
@pytest.mark.parametrize("form", QUANTIZED)
def test_engines_equal_stock_vllm_of_their_tp_degree(groups, form):
    for result in groups(2).results:
        in_sp, in_tp = result[f"{form}-2x1"]
        assert in_sp["stats"]["tp_steps"] == in_tp["stats"]["sp_steps"] == 0
        assert_same(in_tp, result[f"{form}-stock"][1])
        assert in_tp["kv_difference"] < 1e-3
        # Inputs of row-parallel layers are quantized by TP=1's scales then.
        assert_same(in_sp, result[f"{form}-stages"][0])


@pytest.mark.engine
@pytest.mark.parametrize(("form", "dtype"), QUANTIZED_CHECKS)
def test_quantized_engines_pass_the_self_check(groups, form, dtype):
    if form == "modelopt-cache" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has no FP8 KV cache for this processor, which lacks AVX-512")
    for rank, result in enumerate(groups(2).results):
        found = result[f"check-{form}-{dtype}"]
        assert "refused" not in found
        assert any("self-check passed" in line for line in found["lines"]) == (rank == 0)
        assert any("twice, once for each mode" in line for line in found["lines"]) == (rank == 0)


@pytest.mark.engine
@pytest.mark.parametrize("name", MUTATIONS_OF_QUANTIZED)
def test_bugs_in_quantized_engines_are_refused(groups, name):
    _, layer = MUTATIONS_OF_QUANTIZED[name]
    (message,) = {result[name]["refused"] for result in groups(2).results}
    assert f"model.{layer}" in message
