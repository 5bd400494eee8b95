"""The definition of indexer_prepare: norm, rotation, Hadamard transform, FP8 quantisation.

Computes in float32 (float64 for float64 inputs) and rounds to the dtype of q after each of the first three steps.
"""

import torch


def indexer_prepare(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps):
    q_codes, q_scale = quantize(transform_q(q, q_weight, cos, sin, eps))
    k_codes, k_scale = quantize(transform_k(k, k_weight, k_bias, cos, sin, eps))
    weights = wide(gate) * q_scale * q.shape[-1] ** -0.5
    return q_codes, weights, k_codes, k_scale


def indexer_prepare_cached(
    q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, index_cache, slots
):
    result = indexer_prepare(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps)
    k_codes, k_scale = result[2:]
    dim = k.shape[-1]
    keys = index_cache[:, : 64 * dim].unflatten(1, (64, dim))
    scales = index_cache[:, 64 * dim :].view(torch.float32)
    valid = (slots >= 0) & (slots < len(index_cache) * 64)
    page, offset = slots[valid] // 64, slots[valid] % 64
    keys[page, offset] = k_codes.view(torch.uint8)[valid]
    scales[page, offset] = k_scale[valid]
    return result


def transform_q(q, weight, cos, sin, eps):
    x = wide(q)  # [T, Hi, Di]
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * wide(weight)
    return rotate(x.to(q.dtype), cos[:, None], sin[:, None])


def transform_k(k, weight, bias, cos, sin, eps):
    x = wide(k)  # [T, Di]
    x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * wide(weight) + wide(bias)
    return rotate(x.to(k.dtype), cos, sin)


def rotate(x, cos, sin):
    """NeoX RoPE over all dimensions, then the Hadamard transform in Sylvester order times Di^-0.5."""
    low, high = wide(x).chunk(2, -1)
    y = wide(torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype))
    dim, distance = x.shape[-1], 1
    while distance < dim:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        distance *= 2
    return (y * dim**-0.5).to(x.dtype)


def quantize(y):
    """Codes and scale: the smallest power of two with max(amax, 1e-4) <= 448 scale; 448 = 0.875 * 2^9."""
    y = wide(y)
    amax = y.abs().amax(-1)
    mantissa, exponent = amax.clamp(min=1e-4).frexp()
    exponent = exponent - 9 + (mantissa > 0.875)
    scale = ((exponent + 127) << 23).view(torch.float32).to(y.dtype)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    return (y / scale[..., None]).to(torch.float8_e4m3fn), scale


def wide(x):
    return x if x.dtype == torch.float64 else x.float()
