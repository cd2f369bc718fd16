"""The checkpoints of gpt-oss that ``quantize.py`` makes: what vLLM and transformers take them for."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from quantize import GROUP, mxfp4, quantize_experts
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from vllm.config import ModelConfig
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from vllm_shift import limits

EXPERTS, HIDDEN, MIDDLE = 2, 64, 96


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its folder, what is stored there, and what that stands for."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    sizes = {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "pad_token_id": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MORE_CONFIGS, "gpt_oss", (transformers.GptOssConfig, sizes | tiny.LAYER_TYPES))
        plain = tiny.make_checkpoint("gpt_oss", folder)
    used = quantize_experts(plain, folder / "mxfp4")
    stored = load_file(folder / "mxfp4" / "model.safetensors")
    return SimpleNamespace(
        folder=folder / "mxfp4", stored=stored, used=used, plain=load_file(plain / "model.safetensors")
    )


@pytest.mark.parametrize("values", ["random", "zeros"])
def test_mxfp4_rounds_to_nearest(values):
    weight = torch.randn(3, 5, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    if values == "zeros":
        weight[1] = 0
    blocks, scales, used = mxfp4(weight)
    assert (blocks.shape, scales.shape) == ((3, 5, 2, GROUP // 2), (3, 5, 2))
    assert torch.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32), used.transpose(1, 2))
    unit = (scales.int() - 127).float().exp2().repeat_interleave(GROUP, -1)
    size = weight.abs() / unit
    assert size.max() < 8
    # Half of the distance between neighbours up to 2, 4 and 6; above 6 there is none.
    allowed = torch.tensor([0.25, 0.5, 1.0, 2.0])[torch.bucketize(size, torch.tensor([2.0, 4.0, 6.0]))]
    assert ((weight - used).abs() <= allowed * unit).all()


def test_experts_are_stored_as_in_the_published_checkpoints(checkpoint):
    prefix = "model.layers.1.mlp.experts."
    found = {name.removeprefix(prefix): (x.dtype, *x.shape) for name, x in checkpoint.stored.items() if prefix in name}
    assert found == {
        "gate_up_proj_blocks": (torch.uint8, EXPERTS, 2 * MIDDLE, HIDDEN // GROUP, GROUP // 2),
        "gate_up_proj_scales": (torch.uint8, EXPERTS, 2 * MIDDLE, HIDDEN // GROUP),
        "gate_up_proj_bias": (torch.float32, EXPERTS, 2 * MIDDLE),
        "down_proj_blocks": (torch.uint8, EXPERTS, HIDDEN, MIDDLE // GROUP, GROUP // 2),
        "down_proj_scales": (torch.uint8, EXPERTS, HIDDEN, MIDDLE // GROUP),
        "down_proj_bias": (torch.float32, EXPERTS, HIDDEN),
    }


def test_the_weights_are_those_of_the_checkpoint_rounded(checkpoint):
    assert checkpoint.used.keys() == checkpoint.plain.keys()
    for name, used in checkpoint.used.items():
        if f"{name}_blocks" not in checkpoint.stored:
            assert torch.equal(used, checkpoint.plain[name])
            continue
        blocks, scales = checkpoint.stored[f"{name}_blocks"], checkpoint.stored[f"{name}_scales"]
        assert torch.equal(convert_moe_packed_tensors(blocks, scales), used.bfloat16())
        error = (used - checkpoint.plain[name]).norm() / checkpoint.plain[name].norm()
        assert 0 < error < 0.15


def test_vllm_knows_the_names(checkpoint):
    names = GptOssForCausalLM.hf_to_vllm_mapper.apply_list(list(checkpoint.stored))
    kinds = {name.rpartition(".")[2] for name in names if ".experts." in name}
    assert kinds == {f"w{part}_{kind}" for part in (13, 2) for kind in ("weight", "weight_scale", "bias")}


@pytest.mark.parametrize("flag", [None, "mxfp4"])
def test_its_method_is_allowed(checkpoint, flag):
    model = ModelConfig(model=str(checkpoint.folder), dtype="bfloat16", quantization=flag)
    assert model.quantization == "gpt_oss_mxfp4"
    limits.check(limits.MODEL_LIMITS, model)
