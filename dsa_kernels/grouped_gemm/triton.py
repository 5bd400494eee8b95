"""grouped_gemm and its weight gradient in Triton.

grouped_gemm: one program per tile of the device-built list (triton_tiles.py) and block of columns; A and B go through
a cp.async pipeline into wgmma (mma below Hopper), with one fp32 accumulator tile in registers. 128 x 256 tiles of 8
warps hold 128 accumulators a thread and 48 KB of shared memory a stage. Rows of a tile beyond its expert read the
expert's last row again and are not stored, so the main loop has no row masks.

grouped_gemm_wgrad: one program per expert and 128 x 256 block of its gradient, looping over the expert's rows, 64 at a
time; both operands are row tiles with the reduction as slow dimension, one of them transposed in shared memory for
free. Rows may be gathered (moe_mlp passes tokens): the tokens of the next step are loaded ahead, so that the row loads
stay asynchronous. Sums run in row order: deterministic.

Bound by the tensor cores above about 300 rows an expert, by streaming B below.
"""

import math

import torch
import triton
import triton.language as tl

from ..triton_math import mma
from .triton_tiles import (
    NO_TILE,
    expert_rows,
    fitting_stages,
    num_groups,
    tile_and_column,
    tile_list,
)

GROUP_M = 8  # tiles a band, see triton_tiles
# (rows an expert up to, BLOCK_M, BLOCK_N, BLOCK_K, warps, stages). The first row is for fp32, and for bf16 whose
# strides rule out 16-byte loads: without wide asynchronous loads a large tile spills.
CONFIGS = (
    ("small", 32, 64, 32, 4, 2),
    (16, 16, 64, 128, 4, 5),
    (32, 32, 64, 128, 4, 4),
    (64, 64, 128, 64, 4, 4),
    (math.inf, 128, 256, 64, 8, 4),
)
WGRAD = (128, 256, 64, 8, 4)  # BLOCK_N, BLOCK_K, BLOCK_R, warps, stages; bf16
WGRAD_SMALL = (32, 64, 32, 4, 2)


def is_small(*operands):
    """Whether a call takes the first row of a table."""
    strides = [stride for x in operands for stride in x.stride() if stride > 1]
    unaligned = any(n % 16 for n in (*strides, *(x.data_ptr() for x in operands)))
    return unaligned or operands[0].dtype == torch.float32


def config(small, rows, experts, table=CONFIGS):
    """The tile of a call, from the mean number of rows an expert."""
    if small:
        return table[0][1:]
    return next(entry[1:] for entry in table[1:] if rows <= entry[0] * max(experts, 1))


@triton.jit
def add_products(acc, a_ptrs, b_ptrs, b_step, n, N, K, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """acc + a b over k in [0, K), from the pointers of the first BLOCK_K; the columns n of b are < N."""
    k = tl.arange(0, BLOCK_K)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=k[None, :] < K - k0, other=0.0)
        if EVEN_K and EVEN_N:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=(k[:, None] < K - k0) & (n[None, :] < N), other=0.0)
        acc = mma(a, b, acc)
        a_ptrs += BLOCK_K
        b_ptrs += b_step
    return acc


@triton.jit
def grouped_gemm_kernel(a, b, out, tiles, num_tiles, N, K, a_row, b_expert, b_n, b_k, EVEN_N: tl.constexpr,
                        EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    tile, column = tile_and_column(tl.cdiv(N, BLOCK_N), num_tiles, GROUP_M)
    expert = tl.load(tiles + tile * 4)
    if expert != NO_TILE:
        first = tl.load(tiles + tile * 4 + 1)
        end = tl.load(tiles + tile * 4 + 2)
        m = first + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if expert >= 0:
            a_ptrs = a + tl.minimum(m, end - 1).to(tl.int64)[:, None] * a_row + k[None, :]
            b_ptrs = (b + expert.to(tl.int64) * b_expert + k.to(tl.int64)[:, None] * b_k
                      + n.to(tl.int64)[None, :] * b_n)  # fmt: skip
            step = tl.cast(b_k, tl.int64) * BLOCK_K
            acc = add_products(acc, a_ptrs, b_ptrs, step, n, N, K, EVEN_N, EVEN_K, BLOCK_K)
        out_ptrs = out + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=(m[:, None] < end) & (n[None, :] < N))


@triton.jit
def source_row(row, end, token, num_tokens, GATHER: tl.constexpr):
    """Where each row of an operand is, and whether there is one."""
    if GATHER:
        valid = (token >= 0) & (token < num_tokens)
        return tl.where(valid, token, 0).to(tl.int64), valid
    return row.to(tl.int64), row < end


@triton.jit
def grouped_gemm_wgrad_kernel(dc, a, out, offsets, tokens, experts, rows, num_tokens, N, K, dc_row, a_row,
                              GATHER_DC: tl.constexpr, GATHER_A: tl.constexpr, GROUPS: tl.constexpr,
                              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    expert = program // (blocks_n * blocks_k)
    inside = program % (blocks_n * blocks_k)
    n = inside % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = inside // blocks_n * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    begin, end = expert_rows(offsets, expert, experts, rows, GROUPS)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    ahead = begin + r
    token = tl.zeros([BLOCK_R], tl.int32) - 1
    if GATHER_DC or GATHER_A:
        token = tl.load(tokens + ahead, mask=ahead < end, other=-1)
    for first in range(begin, end, BLOCK_R):
        row = first + r
        dc_at, dc_valid = source_row(row, end, token, num_tokens, GATHER_DC)
        a_at, a_valid = source_row(row, end, token, num_tokens, GATHER_A)
        x = tl.load(
            dc + dc_at[:, None] * dc_row + n[None, :],
            mask=dc_valid[:, None] & (n[None, :] < N),
            other=0.0,
        )
        y = tl.load(
            a + a_at[:, None] * a_row + k[None, :],
            mask=a_valid[:, None] & (k[None, :] < K),
            other=0.0,
        )
        if GATHER_DC or GATHER_A:
            ahead = row + BLOCK_R
            token = tl.load(tokens + ahead, mask=ahead < end, other=-1)
        acc = mma(tl.trans(x), y, acc)
    out_ptrs = out + (expert.to(tl.int64) * N + n.to(tl.int64))[:, None] * K + k[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


def multiply(a, b, tiles, shape):
    """out[r] = a[r] @ b[e].T over the tiles of a list made with shape's BLOCK_M; 0 for the rows of no expert."""
    block_m, block_n, block_k, warps, stages = shape
    width, depth = b.shape[1:]
    out = torch.empty((a.shape[0], width), dtype=a.dtype, device=a.device)
    grouped_gemm_kernel[(tiles.shape[0] * triton.cdiv(width, block_n),)](
        a, b, out, tiles, tiles.shape[0], width, depth, a.stride(0), *b.stride(),
        EVEN_N=width % block_n == 0, EVEN_K=depth % block_k == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M, num_warps=warps,
        num_stages=fitting_stages(stages, block_m, block_n, block_k, a),
    )  # fmt: skip
    return out


def grouped_gemm(a, b, offsets):
    rows = a.shape[0]
    if rows == 0 or b.shape[1] == 0:
        return torch.empty((rows, b.shape[1]), dtype=a.dtype, device=a.device)
    shape = config(is_small(a, b), rows, b.shape[0])
    return multiply(a, b, tile_list(offsets, rows, shape[0]), shape)


def weight_gradient(dc, a, offsets, rows, tokens=None, gather_dc=False, gather_a=False):
    """sum over an expert's rows of dc^T a; rows of a gathered operand are those of its tokens."""
    experts, height, width = offsets.numel() - 1, dc.shape[1], a.shape[1]
    out = torch.empty((experts, height, width), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    block_n, block_k, block_r, warps, stages = WGRAD_SMALL if is_small(dc, a) else WGRAD
    grid = (experts * triton.cdiv(height, block_n) * triton.cdiv(width, block_k),)
    grouped_gemm_wgrad_kernel[grid](
        dc, a, out, offsets, tokens, experts, rows, dc.shape[0] if gather_dc else a.shape[0], height, width,
        dc.stride(0), a.stride(0), GATHER_DC=gather_dc, GATHER_A=gather_a, GROUPS=num_groups(offsets),
        BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=warps,
        num_stages=fitting_stages(stages, block_n, block_k, block_r, a),
    )  # fmt: skip
    return out


def grouped_gemm_wgrad(dc, a, offsets):
    return weight_gradient(dc, a, offsets, a.shape[0])
