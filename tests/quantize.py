"""Quantized forms of a tiny checkpoint, with round-to-nearest: for tests and benchmarks, not for use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 128
GROUP = 32

# FP4 (E2M1) by its bits, without the sign.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

Parts = dict[str, torch.Tensor]


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def fp8_tensor(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale a weight."""
    scale = weight.abs().amax() / FP8_MAX
    quantized = _fp8(weight, scale)
    return {"weight": quantized, "weight_scale": scale}, quantized.float() * scale


def fp8_static(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale a weight, and a fixed one for its input."""
    parts, used = fp8_tensor(weight)
    return parts | {"input_scale": torch.tensor(0.05)}, used


def fp8_shared(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale for all weights: in checkpoints of ModelOpt those that vLLM merges share theirs."""
    scale = torch.tensor(0.02)
    quantized = _fp8(weight, scale)
    return {"weight": quantized, "weight_scale": scale, "input_scale": torch.tensor(0.05)}, quantized.float() * scale


def fp8_channel(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale an output."""
    scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
    quantized = _fp8(weight, scale)
    return {"weight": quantized, "weight_scale": scale}, quantized.float() * scale


def fp8_block(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale a block of 128 x 128."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / FP8_MAX
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    quantized = _fp8(weight, wide)
    return {"weight": quantized, "weight_scale_inv": scale}, quantized.float() * wide


def modelopt_channel(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale an output, without a second dimension."""
    parts, used = fp8_channel(weight)
    return parts | {"weight_scale": parts["weight_scale"].squeeze(1)}, used


def modelopt_block(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale a block of 128 x 128, in four dimensions."""
    parts, used = fp8_block(weight)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"][:, None, :, None]}, used


def int8(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale an output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    quantized = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return {"weight": quantized, "weight_scale": scale}, quantized.float() * scale


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[outputs, inputs] as whole numbers 0 to 15 around 8, scales [outputs, groups], and what they stand for."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    quantized = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    used = quantized * scale.float().unsqueeze(-1)
    return (quantized + 8).view(weight.shape).to(torch.int32), scale, used.view(weight.shape)


def _pack(values: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """Eight neighbours of the last dimension in one int32, the first of ``order`` lowest."""
    parts = values.unflatten(-1, (-1, 8))
    packed = torch.zeros(parts.shape[:-1], dtype=torch.int64)
    for place, index in enumerate(order):
        packed |= parts[..., index].long() << (4 * place)
    return packed.to(torch.int32)


def int4(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Groups of 32 inputs, in compressed-tensors' packing."""
    quantized, scale, used = _four_bits(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _pack(quantized), "weight_scale": scale, "weight_shape": shape}, used


def awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Groups of 32 inputs, in AWQ's packing."""
    quantized, scale, used = _four_bits(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros = torch.full_like(scale.t(), 8, dtype=torch.int32)
    return {"qweight": _pack(quantized.t(), order), "qzeros": _pack(zeros, order), "scales": scale.t()}, used


def gptq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Groups of 32 inputs, in GPTQ's packing, whose zeros are stored less one."""
    quantized, scale, used = _four_bits(weight)
    zeros = _pack(torch.full_like(scale.t(), 7, dtype=torch.int32))
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    return {"qweight": _pack(quantized).t(), "qzeros": zeros, "scales": scale.t(), "g_idx": groups}, used


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP4 with a power of two as the scale of 32 inputs.

    Returns:
        Of [..., inputs]: values in pairs, the first one lower, [..., inputs/32, 16]; exponents of the scales plus 127,
        [..., inputs/32]; and what they stand for.
    """
    groups = weight.unflatten(-1, (-1, GROUP))
    # The largest value of a group becomes one from 4 to less than 8, of which those above 6 are 6.
    exponents = groups.abs().amax(-1, keepdim=True).frexp().exponent - 3
    scaled = groups.ldexp(-exponents)
    values = (scaled.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    used = FP4[values].copysign(scaled).ldexp(exponents).flatten(-2)
    bits = (values + 8 * scaled.signbit()).to(torch.uint8)
    return bits[..., ::2] | bits[..., 1::2] << 4, (exponents + 127).squeeze(-1).to(torch.uint8), used


def _compressed_tensors(form: str, weights: dict, activations: dict | None) -> dict:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    if activations is not None:
        group["input_activations"] = {"symmetric": True, "dynamic": True, "strategy": "token"} | activations
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
_FP8_CACHE = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}

# How a weight is stored, and the entry "quantization_config" of the checkpoint's config.
FORMS: dict[str, tuple[Callable[[torch.Tensor], tuple[Parts, torch.Tensor]], dict]] = {
    "fp8": (fp8_tensor, _FP8),
    "fp8-static": (fp8_static, _FP8 | {"activation_scheme": "static"}),
    "fp8-block": (fp8_block, _FP8 | {"weight_block_size": [BLOCK, BLOCK]}),
    "fp8-channel": (
        fp8_channel,
        _compressed_tensors(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "channel"},
            {"num_bits": 8, "type": "float"},
        ),
    ),
    "modelopt": (fp8_static, _MODELOPT),
    "modelopt-cache": (fp8_shared, _MODELOPT | _FP8_CACHE),
    "modelopt-channel": (modelopt_channel, _MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "modelopt-block": (modelopt_block, _MODELOPT | {"quant_algo": "FP8_PB_WO"}),
    "int8": (
        int8,
        _compressed_tensors(
            "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, {"num_bits": 8, "type": "int"}
        ),
    ),
    "int4": (
        int4,
        _compressed_tensors(
            "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None
        ),
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
    ),
}


def quantize_checkpoint(source: Path, form: str, folder: Path) -> Parts:
    """Write a quantized copy of a checkpoint of one file; returns the weights that it stands for, by their names."""
    quantize, config = FORMS[form]
    weights, stored, used = load_file(source / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        if weight.dim() == 2 and name.endswith("_proj.weight"):
            parts, used[name] = quantize(weight.float())
            projection = name.split(".")[-2]
            if "kv_cache_scheme" in config and projection in ("k_proj", "v_proj"):
                parts[f"{projection[0]}_scale"] = weight.abs().amax().float() / 4
            stored |= {name.removesuffix("weight") + part: x.contiguous() for part, x in parts.items()}
        else:
            stored[name] = used[name] = weight
    _write(source, folder, stored, config)
    return used


def quantize_experts(source: Path, folder: Path) -> Parts:
    """The same for gpt-oss, whose experts become MXFP4, as in its published checkpoints."""
    weights, stored, used = load_file(source / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            # Unquantized they are [experts, inputs, outputs].
            stored[f"{name}_blocks"], stored[f"{name}_scales"], whole = mxfp4(weight.transpose(1, 2).float())
            used[name] = whole.transpose(1, 2)
        else:
            stored[name] = used[name] = weight
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _write(source, folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return used


def _write(source: Path, folder: Path, stored: Parts, config: dict) -> None:
    """A copy of a checkpoint with other weights, and how they are quantized."""
    shutil.copytree(source, folder)
    save_file(stored, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
