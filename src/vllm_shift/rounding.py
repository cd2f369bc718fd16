"""What rounding explains of a difference between the two modes, for the self-check.

The modes add up the same values in another order, and where layers quantize their inputs, with other scales.
"""

import math

import torch
from vllm.platforms import current_platform

# A bug of an architecture is in its first layers, too, so what matters is to allow little there: in layer 0 the modes
# differ by next to nothing. Rounding then adds up over the layers: SmolLM2-135M at SP=3 on a CPU in bfloat16 differs by
# 0.007 of a vector's length in layer 1 and 0.14 in layer 29, a third of what is allowed; float16 and float32 by less.
ROUNDINGS_PER_LAYER = 2
LEAST_ALLOWED_PER_LAYER = 1e-4
MOST_ALLOWED = 0.5

# Where a rounding of the embeddings grows beyond that, so many times what it grows to is allowed: the modes round in
# every layer, not in the first alone.
AMPLIFIED_ROUNDINGS = 2

# Triton multiplies float32 in TF32, unless told otherwise.
TF32_EPSILON = 2**-10

# Share of vectors of a mixture-of-experts model that may differ more: rounding may send a token to another expert.
MOE_SHARE = 0.25

# The same in bfloat16 and float16, and where something is quantized. Where inputs are, some tokens have far larger
# values than others, and errors with them. In trained models the first token of a prompt, which all others attend to,
# becomes such a one within a layer or two, and rounding decides how far: in SmolLM2-135M in bfloat16 the value of one
# prompt's first token differs by 0.10 in layer 11, of another's by 0.06, of other tokens by up to 0.04 (S=3, on a CPU);
# on three H200 one vector differed by 0.27. Unless something is quantized, none may differ by more than MOST_ALLOWED.
OUTLIER_SHARE = 0.1

# Of a quarter of a rank's tokens, if that has so many: a bug of the rank is in all of them. After an early token
# that went to another expert all later ones of a prompt differ, so MOST_ALLOWED goes with it.
PART_SHARE, TOKENS_OF_A_PART = 0.75, 8

# Where layers quantize their inputs, the modes round differently: a row-parallel layer's input has one scale for 1/T of
# a token in SP mode, for 1/P in TP mode. In SmolLM2-135M, nine tenths of the vectors differ by less than 0.051 in
# layer 1 and 0.18 in layer 29 with FP8, 0.083 and 0.28 with INT8 (S=3, simulated). No layer comes before layer 0, whose
# keys and values are held to rounding. Errors of layers are independent: they add up like their square root.
ALLOWED_BY_QUANTIZATION = 0.15

# FP8 has 3 bits behind the point: where rounding moves a value across the border of two, it changes by up to 2**-3.
ALLOWED_BY_QUANTIZED_CACHE = 2**-4


def allowed_error(dtype: torch.dtype, layer: int, quantizes: bool = False, quantizes_cache: bool = False) -> float:
    """Largest difference of a vector (one token's hidden state, key or value of a head), relative to its length.

    Args:
        dtype: of the model.
        layer: number of transformer layers before the vector.
        quantizes: whether linear layers quantize their inputs.
        quantizes_cache: whether the KV cache is quantized.
    """
    per_layer = max(ROUNDINGS_PER_LAYER * _epsilon(dtype), LEAST_ALLOWED_PER_LAYER)
    allowed = per_layer * (1 + layer)
    if quantizes:
        allowed = max(allowed, ALLOWED_BY_QUANTIZATION * math.sqrt(layer))
    if quantizes_cache:
        allowed += ALLOWED_BY_QUANTIZED_CACHE * math.sqrt(1 + layer)
    return min(allowed, MOST_ALLOWED)


def round_otherwise(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` [..., size] with every second value one rounding larger, as another order of sums has it."""
    moved = x.clone()
    moved[..., ::2] *= 1 + _epsilon(x.dtype)
    return moved


def relative_error(expected: torch.Tensor, found: torch.Tensor, share: float) -> float:
    """Largest difference of two sets of vectors, relative to their lengths.

    Args:
        expected: [..., size], or [blocks, heads, block size, size]. Vectors shorter than the root mean square length
            of all heads count as that long; those that are zero in both are left out.
        found: of the same shape.
        share: that many of the vectors of each head, those that differ most, are left out, 0 to 1.

    Returns:
        Infinite where a value is not finite, or where nothing was computed at all.
    """
    expected, found = expected.float(), found.float()
    lengths, differences = expected.norm(dim=-1), (expected - found).norm(dim=-1)
    written = (lengths > 0) | (differences > 0)
    if not written.any() or not differences.isfinite().all():
        return math.inf
    errors = differences / lengths.clamp_min(lengths[written].square().mean().sqrt())
    # One head may be wrong in all tokens, and is less than a share of all heads' vectors.
    heads = zip(errors.unbind(1), written.unbind(1), strict=True) if errors.dim() == 3 else [(errors, written)]
    of_heads = (of_head[kept] for of_head, kept in heads)
    return max(_all_but(share, of_head) for of_head in of_heads if len(of_head))


def _epsilon(dtype: torch.dtype) -> float:
    epsilon = torch.finfo(dtype).eps
    return max(epsilon, TF32_EPSILON) if current_platform.is_cuda() else epsilon


def _all_but(share: float, errors: torch.Tensor) -> float:
    """Largest of them, a share of the largest ones left out."""
    return float(errors.kthvalue(len(errors) - int(share * len(errors))).values)
