"""The definitions of grouped_gemm, its weight gradient and its block-scaled FP8 form: one matmul per expert."""

from itertools import pairwise


def ranges(offsets, rows):
    """First and last+1 row of each expert: clamped to [0, rows] and never decreasing."""
    bounds = offsets.clamp(0, rows).cummax(0).values.tolist()
    return list(pairwise(bounds))


def grouped_gemm(a, b, offsets):
    out = a.new_zeros(a.shape[0], b.shape[1])
    for e, (begin, end) in enumerate(ranges(offsets, a.shape[0])):
        if begin < end:
            out[begin:end] = a[begin:end] @ b[e].T
    return out


def grouped_gemm_wgrad(dc, a, offsets):
    out = a.new_zeros(offsets.numel() - 1, dc.shape[1], a.shape[1])
    for e, (begin, end) in enumerate(ranges(offsets, a.shape[0])):
        if begin < end:
            out[e] = dc[begin:end].T @ a[begin:end]
    return out


def grouped_gemm_fp8(a, a_scale, b, b_scale, offsets):
    wide = a.float() * a_scale.repeat_interleave(128, 1)  # [M, K]
    experts = b.float() * b_scale.repeat_interleave(128, 1).repeat_interleave(128, 2)  # [E, N, K]
    return grouped_gemm(wide, experts, offsets).bfloat16()
