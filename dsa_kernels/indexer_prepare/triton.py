"""indexer_prepare in Triton: the indexer's prologue in one launch.

One thread takes one vector of Di elements, one program ROWS of them: the first programs take the T * Hi query vectors, the
others the T key vectors, which they also write to the index cache. A thread loads its vector by 16 bytes, joined in
registers, so that norm, RoPE, Hadamard transform and maximum need no other thread: no shuffle, no shared memory, no
barrier. The loads of a warp are strided by a vector, but each touched line is used whole before it leaves L1.

The Hadamard transform is log2(Di) rounds of butterflies in fp32, neighbours first, the order of every implementation:
equal inputs of the transform give equal bits. The scale comes from the exponent bits of the largest magnitude, taken as
an integer so that NaN is the largest. Where the inputs are bf16, the vector is rounded to bf16 after the norm, after
RoPE and after the Hadamard transform.

At 16 x 64 a token is 2208 bytes in, 256 of cos and sin, 1156 out, and 28 instructions an element (1840 a thread, 168
registers, no spills, as compiled for sm_90a). Computed for an H200, the two bounds are within a third of each other.
"""

import torch
import triton
import triton.language as tl

from ..dispatch import has_fp8_units
from ..paged_cache.triton import load_slots

NUM_WARPS = 2
ROWS = 32 * NUM_WARPS  # vectors a program, one a thread
VECTOR_BITS = {"cuda": 128, "cpu": 4096}  # loaded at once; Triton's interpreter is paid by the call


@triton.jit
def rounded(x, BF16: tl.constexpr, ON_GPU: tl.constexpr):
    """x, rounded to bf16 if BF16."""
    if not BF16:
        return x
    if ON_GPU:  # `.to` issues a slower conversion, of one element (F2F), and a pack
        return tl.inline_asm_elementwise(
            "{ .reg .b32 p; cvt.rn.bf16x2.f32 p, $3, $2; shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000; }",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    bits = x.to(tl.uint32, bitcast=True)  # Triton's interpreter truncates in `.to`
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def concatenate(a, b):
    """[R, N] and [R, N] to [R, 2 N], in registers."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def load_row(source, N: tl.constexpr, VECTOR_BITS: tl.constexpr):
    """source[0, N) of each row, [R] pointers, as float32 [R, N] of which a thread holds whole rows."""
    if N * source.dtype.element_ty.primitive_bitwidth > VECTOR_BITS:
        a = load_row(source, N // 2, VECTOR_BITS)
        b = load_row(source + N // 2, N // 2, VECTOR_BITS)
        return concatenate(a, b)
    else:
        return tl.load(source[:, None] + tl.arange(0, N)[None, :]).to(tl.float32)


@triton.jit
def store_row(target, codes, mask, VECTOR_BITS: tl.constexpr):
    """Stores the rows of codes [R, N] uint8 at [R] pointers."""
    rows: tl.constexpr = codes.shape[0]
    n: tl.constexpr = codes.shape[1]
    if n * 8 > VECTOR_BITS:
        a, b = tl.split(tl.permute(tl.reshape(codes, [rows, 2, n // 2]), [0, 2, 1]))
        store_row(target, a, mask, VECTOR_BITS)
        store_row(target + n // 2, b, mask, VECTOR_BITS)
    else:
        tl.store(target[:, None] + tl.arange(0, n)[None, :], codes, mask=mask[:, None])


@triton.jit
def rotate(low, high, cos, sin, BF16: tl.constexpr, ON_GPU: tl.constexpr):
    a = rounded(low * cos - high * sin, BF16, ON_GPU)
    b = rounded(high * cos + low * sin, BF16, ON_GPU)
    return a, b


@triton.jit
def butterflies(x, DISTANCE: tl.constexpr):
    """The rounds of the Hadamard transform of the rows of x [R, N] that pair elements DISTANCE or more apart."""
    rows: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, [rows, n // (2 * DISTANCE), 2, DISTANCE])
    a, b = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
    x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [rows, n])
    if n > 2 * DISTANCE:
        return butterflies(x, 2 * DISTANCE)
    else:
        return x


@triton.jit
def e4m3_encode(x, NATIVE_FP8: tl.constexpr):
    """The e4m3 code of x, |x| <= 448 or NaN, to nearest even; see csrc/common/e4m3.h."""
    if NATIVE_FP8:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(x == x, code, 0x7F).to(tl.uint8)


@triton.jit
def transform_and_quantize(low, high, NORMALIZE: tl.constexpr, BF16: tl.constexpr, ON_GPU: tl.constexpr,
                           NATIVE_FP8: tl.constexpr):  # fmt: skip
    """The codes [R, Di] and the scales [R] of the rows."""
    y = rounded(butterflies(concatenate(low, high), 1) * NORMALIZE, BF16, ON_GPU)
    amax = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    amax = tl.maximum(amax, 0x38D1B717)  # 1e-4
    exponent = (amax + 0x1FFFFF) >> 23  # one up where the mantissa exceeds 1.75
    scale = tl.where(amax >= 0x7F800000, 0x7FC00000, (exponent - 8) << 23)
    inverse = tl.where(amax >= 0x7F800000, 0x7FC00000, (262 - exponent) << 23)
    codes = e4m3_encode(y * inverse.to(tl.float32, bitcast=True)[:, None], NATIVE_FP8)
    return codes, scale.to(tl.float32, bitcast=True)


@triton.jit
def inverse_rms(low, high, DIM: tl.constexpr, eps):
    mean = tl.sum(low * low + high * high, 1) / DIM
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]


@triton.jit
def indexer_prepare_kernel(q, k, gate, q_weight, k_weight, k_bias, cos, sin, q_codes, weights, k_codes, k_scale,
                           cache_keys, cache_scales, slots, num_tokens, heads, q_tiles, pages, eps, q_stride, q_head,
                           k_stride, gate_stride, cos_stride, sin_stride, page_stride, DIM: tl.constexpr,
                           NORMALIZE: tl.constexpr, ROWS: tl.constexpr, CACHED: tl.constexpr, ON_GPU: tl.constexpr,
                           NATIVE_FP8: tl.constexpr, VECTOR_BITS: tl.constexpr):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    BF16: tl.constexpr = q.dtype.element_ty == tl.bfloat16
    program = tl.program_id(0)
    lane = tl.arange(0, ROWS)
    same = tl.zeros([ROWS], tl.int64)
    if program < q_tiles:
        row = program * ROWS + lane
        mask = row < num_tokens * heads
        token = tl.minimum(row // heads, num_tokens - 1).to(
            tl.int64
        )  # a row past the end loads, but stores nothing
        head = row % heads
        row = row.to(tl.int64)
        source = q + token * q_stride + head * q_head
        low = load_row(source, HALF, VECTOR_BITS)
        high = load_row(source + HALF, HALF, VECTOR_BITS)
        inverse = inverse_rms(low, high, DIM, eps)
        low = low * inverse * load_row(q_weight + same, HALF, VECTOR_BITS)
        high = high * inverse * load_row(q_weight + HALF + same, HALF, VECTOR_BITS)
        low, high = rotate(
            rounded(low, BF16, ON_GPU), rounded(high, BF16, ON_GPU),
            load_row(cos + token * cos_stride, HALF, VECTOR_BITS),
            load_row(sin + token * sin_stride, HALF, VECTOR_BITS), BF16, ON_GPU,
        )  # fmt: skip
        codes, scale = transform_and_quantize(low, high, NORMALIZE, BF16, ON_GPU, NATIVE_FP8)
        store_row(q_codes + row * DIM, codes, mask, VECTOR_BITS)
        g = tl.load(gate + token * gate_stride + head).to(tl.float32)
        tl.store(weights + row, g * scale * NORMALIZE, mask=mask)
    else:
        row = (program - q_tiles).to(tl.int64) * ROWS + lane
        mask = row < num_tokens
        token = tl.minimum(row, num_tokens - 1)
        source = k + token * k_stride
        low = load_row(source, HALF, VECTOR_BITS)
        high = load_row(source + HALF, HALF, VECTOR_BITS)
        mean = (tl.sum(low + high, 1) / DIM)[:, None]
        low = low - mean
        high = high - mean
        inverse = inverse_rms(low, high, DIM, eps)
        low = low * inverse * load_row(k_weight + same, HALF, VECTOR_BITS)
        low += load_row(k_bias + same, HALF, VECTOR_BITS)
        high = high * inverse * load_row(k_weight + HALF + same, HALF, VECTOR_BITS)
        high += load_row(k_bias + HALF + same, HALF, VECTOR_BITS)
        low, high = rotate(
            rounded(low, BF16, ON_GPU), rounded(high, BF16, ON_GPU),
            load_row(cos + token * cos_stride, HALF, VECTOR_BITS),
            load_row(sin + token * sin_stride, HALF, VECTOR_BITS), BF16, ON_GPU,
        )  # fmt: skip
        codes, scale = transform_and_quantize(low, high, NORMALIZE, BF16, ON_GPU, NATIVE_FP8)
        store_row(k_codes + row * DIM, codes, mask, VECTOR_BITS)
        tl.store(k_scale + row, scale, mask=mask)
        if CACHED:
            valid, page, offset = load_slots(slots, row, num_tokens, pages)
            store_row(cache_keys + page * page_stride + offset * DIM, codes, valid, VECTOR_BITS)
            place = cache_scales + page * (page_stride // 4) + 16 * DIM + offset
            tl.store(place, scale, mask=valid)


def indexer_prepare(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps):
    return launch(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, None, None)


def indexer_prepare_cached(
    q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, index_cache, slots
):
    return launch(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, index_cache, slots)


def launch(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, index_cache, slots):
    num_tokens, heads, dim = q.shape
    q_codes = torch.empty((num_tokens, heads, dim), dtype=torch.uint8, device=q.device)
    weights = torch.empty((num_tokens, heads), dtype=torch.float32, device=q.device)
    k_codes = torch.empty((num_tokens, dim), dtype=torch.uint8, device=q.device)
    k_scale = torch.empty((num_tokens,), dtype=torch.float32, device=q.device)
    cached = index_cache is not None
    q_tiles = triton.cdiv(num_tokens * heads, ROWS)
    if num_tokens > 0:
        indexer_prepare_kernel[(q_tiles + triton.cdiv(num_tokens, ROWS),)](
            q, k, gate, q_weight, k_weight, k_bias, cos, sin, q_codes, weights, k_codes, k_scale, index_cache,
            index_cache.view(torch.float32) if cached else None, slots, num_tokens, heads, q_tiles,
            index_cache.shape[0] if cached else 0, eps, q.stride(0), q.stride(1), k.stride(0), gate.stride(0),
            cos.stride(0), sin.stride(0), index_cache.stride(0) if cached else 0, DIM=dim,
            NORMALIZE=dim**-0.5, ROWS=ROWS, CACHED=cached, ON_GPU=q.is_cuda, NATIVE_FP8=has_fp8_units(q.device),
            VECTOR_BITS=VECTOR_BITS[q.device.type], num_warps=NUM_WARPS,
        )  # fmt: skip
    return q_codes.view(torch.float8_e4m3fn), weights, k_codes.view(torch.float8_e4m3fn), k_scale
