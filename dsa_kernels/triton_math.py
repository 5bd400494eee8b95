"""Arithmetic that the Triton kernels of several rooms call on the device."""

import triton
import triton.language as tl

from .dispatch import interpreting

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(interpreting())
NOTHING, IEEE = tl.constexpr(None), tl.constexpr("ieee")


@triton.jit
def mma(a, b, sums=NOTHING, PRECISION: tl.constexpr = IEEE):
    """sums + a b on the matrix units, with a in b's dtype; "ieee": float32 operands keep their precision."""
    # The interpreter's tl.dot takes the bits of a bfloat16 for an integer, and its casts to one truncate.
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision=PRECISION)
    return tl.dot(a.to(b.dtype), b, sums, input_precision=PRECISION)


@triton.jit
def popcount(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def e4m3_to_fp16(codes):
    """e4m3 bytes as fp16: the fields move as they are, and 2^8 makes up for the difference of the biases."""
    bits = codes.to(tl.uint16)
    magnitude = bits & 0x7F
    half = ((bits & 0x80) << 8) | (magnitude << 7)
    half = half.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), half).to(tl.float16)
