"""norm_rope in Triton: forward in one launch, backward in two (one without weights).

Forward: one program a token. It holds the token's tables and takes the heads of q, then those of k, in tiles of
[BLOCK_H heads, half a head], first and second half side by side, so that the rotation is elementwise; reading a token
is one contiguous run. Backward: at most MAX_PROGRAMS programs, each with every MAX_PROGRAMS-th token; the weights'
gradients add up in registers per head and leave as one row of partial sums a program, which the second launch adds up
in order. The cut into programs depends on T alone, so the sums have the same bits on every GPU.

Bound by memory: every head is read once and written once (twice read in the backward). A tile is 16 values a thread
and half (32 heads x 64 over 4 warps forward, 8 backward).
"""

import math

import torch
import triton
import triton.language as tl

BLOCK_H = 32  # heads of a tile
FWD_WARPS = 4
BWD_WARPS = 8
MAX_PROGRAMS = 1024  # of the backward
REDUCE_PROGRAMS = 128  # rows of partial sums added at once
REDUCE_COLUMNS = 16  # columns a program of the second launch


@triton.jit
def load_table(table, token, stride, column, D: tl.constexpr):
    return tl.load(table + token * stride + column, mask=column < D // 2, other=0.0)


@triton.jit
def load_halves(base, mask, D: tl.constexpr):
    x1 = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(base + D // 2, mask=mask, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def inverse_rms(x1, x2, eps, D: tl.constexpr):
    return tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]


@triton.jit
def rotate_heads(x, out, weight, cos, sin, eps, head_stride, NORM: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                 HALF: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """out = norm and rotation of one token's heads; x and out point at the token, cos and sin are its rows."""
    column = tl.arange(0, HALF)
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = (head[:, None] < HEADS) & (column[None, :] < D // 2)
        x1, x2 = load_halves(x + head[:, None] * head_stride + column[None, :], mask, D)
        if NORM:
            w1, w2 = load_halves(weight + column, column < D // 2, D)
            inverse = inverse_rms(x1, x2, eps, D)
            x1 = x1 * inverse * w1[None, :]
            x2 = x2 * inverse * w2[None, :]
        address = out + head[:, None] * D + column[None, :]
        y1 = x1 * cos[None, :] - x2 * sin[None, :]
        y2 = x2 * cos[None, :] + x1 * sin[None, :]
        tl.store(address, y1.to(out.dtype.element_ty), mask=mask)
        tl.store(address + D // 2, y2.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_rope_fwd_kernel(q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps, q_stride, k_stride, q_head_units,
                         k_head_units, cos_stride, sin_stride, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                         Q_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
                         D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)
    c = load_table(cos, token, cos_stride, column, D)
    s = load_table(sin, token, sin_stride, column, D)
    rotate_heads(q + token * q_stride, q_out + token * (H * D), q_weight, c, s, eps, q_head_units * Q_ALIGN, Q_NORM, H,
                 D, HALF, BLOCK_H)  # fmt: skip
    rotate_heads(k + token * k_stride, k_out + token * (G * D), k_weight, c, s, eps, k_head_units * K_ALIGN, K_NORM, G,
                 D, HALF, BLOCK_G)  # fmt: skip


@triton.jit
def rotate_heads_bwd(dout, dx, x, weight, cos, sin, eps, head_stride, dw1, dw2, NORM: tl.constexpr, HEADS: tl.constexpr,
                     D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """dx of one token's heads; returns the weight's gradient per head of a tile, advanced, as two halves."""
    column = tl.arange(0, HALF)
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = (head[:, None] < HEADS) & (column[None, :] < D // 2)
        offset = head[:, None] * D + column[None, :]
        d1, d2 = load_halves(dout + offset, mask, D)
        g1 = d1 * cos[None, :] + d2 * sin[None, :]
        g2 = d2 * cos[None, :] - d1 * sin[None, :]
        if NORM:
            x1, x2 = load_halves(x + head[:, None] * head_stride + column[None, :], mask, D)
            w1, w2 = load_halves(weight + column, column < D // 2, D)
            inverse = inverse_rms(x1, x2, eps, D)
            x1 *= inverse
            x2 *= inverse
            dw1 += g1 * x1
            dw2 += g2 * x2
            g1 *= w1[None, :]
            g2 *= w2[None, :]
            mean = ((tl.sum(g1 * x1, 1) + tl.sum(g2 * x2, 1)) / D)[:, None]
            g1 = inverse * (g1 - x1 * mean)
            g2 = inverse * (g2 - x2 * mean)
        tl.store(dx + offset, g1.to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + offset + D // 2, g2.to(dx.dtype.element_ty), mask=mask)
    return dw1, dw2


@triton.jit
def store_sums(out, dw1, dw2, D: tl.constexpr, HALF: tl.constexpr):
    column = tl.arange(0, HALF)
    tl.store(out + column, tl.sum(dw1, 0), mask=column < D // 2)
    tl.store(out + D // 2 + column, tl.sum(dw2, 0), mask=column < D // 2)


@triton.jit
def norm_rope_bwd_kernel(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, dq, dk, partial, eps, num_tokens, q_stride,
                         k_stride, q_head_units, k_head_units, cos_stride, sin_stride, Q_NORM: tl.constexpr,
                         K_NORM: tl.constexpr, Q_ALIGN: tl.constexpr, K_ALIGN: tl.constexpr, H: tl.constexpr,
                         G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
                         BLOCK_G: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, HALF)
    dqw1 = tl.zeros([BLOCK_H, HALF], tl.float32)
    dqw2 = tl.zeros([BLOCK_H, HALF], tl.float32)
    dkw1 = tl.zeros([BLOCK_G, HALF], tl.float32)
    dkw2 = tl.zeros([BLOCK_G, HALF], tl.float32)
    for row in range(program, num_tokens, tl.num_programs(0)):
        token = tl.cast(row, tl.int64)
        c = load_table(cos, token, cos_stride, column, D)
        s = load_table(sin, token, sin_stride, column, D)
        dqw1, dqw2 = rotate_heads_bwd(
            dq_out + token * (H * D), dq + token * (H * D), q + token * q_stride, q_weight, c, s, eps,
            q_head_units * Q_ALIGN, dqw1, dqw2, Q_NORM, H, D, HALF, BLOCK_H)  # fmt: skip
        dkw1, dkw2 = rotate_heads_bwd(
            dk_out + token * (G * D), dk + token * (G * D), k + token * k_stride, k_weight, c, s, eps,
            k_head_units * K_ALIGN, dkw1, dkw2, K_NORM, G, D, HALF, BLOCK_G)  # fmt: skip
    row = program * (2 * D)  # of the partial sums, [programs, 2, D]
    if Q_NORM:
        store_sums(partial + row, dqw1, dqw2, D, HALF)
    if K_NORM:
        store_sums(partial + row + D, dkw1, dkw2, D, HALF)


@triton.jit
def sum_columns(
    partial, out, first, programs, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    column = first + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for base in range(0, programs, BLOCK_P):
        program = base + tl.arange(0, BLOCK_P)
        mask = (program[:, None] < programs) & (column[None, :] < D)
        total += tl.load(partial + program[:, None] * (2 * D) + column[None, :], mask=mask, other=0.0)  # fmt: skip
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < D)


@triton.jit
def norm_rope_bwd_reduce_kernel(partial, dq_weight, dk_weight, programs, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                                D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * BLOCK_C
    if Q_NORM:
        sum_columns(partial, dq_weight, first, programs, D, BLOCK_P, BLOCK_C)
    if K_NORM:
        sum_columns(partial + D, dk_weight, first, programs, D, BLOCK_P, BLOCK_C)


def problem(q, k, q_weight, k_weight, cos, sin):
    """Strides and compile-time sizes that both directions pass. A head stride goes in as units x alignment, which
    tells the compiler how wide its loads may be for strides that are no multiple of 16 (D = 72)."""
    q_align, k_align = math.gcd(q.stride(1), 16), math.gcd(k.stride(1), 16)
    strides = (
        q.stride(0), k.stride(0), q.stride(1) // q_align, k.stride(1) // k_align, cos.stride(0), sin.stride(0)
    )  # fmt: skip
    sizes = dict(
        Q_NORM=q_weight is not None, K_NORM=k_weight is not None, Q_ALIGN=q_align, K_ALIGN=k_align, H=q.shape[1],
        G=k.shape[1], D=q.shape[2], HALF=triton.next_power_of_2(q.shape[2] // 2),
        BLOCK_H=min(triton.next_power_of_2(max(q.shape[1], 1)), BLOCK_H),
        BLOCK_G=min(triton.next_power_of_2(max(k.shape[1], 1)), BLOCK_H),
    )  # fmt: skip
    return strides, sizes


def norm_rope(q, k, q_weight, k_weight, cos, sin, eps):
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.shape[0] == 0:
        return q_out, k_out
    strides, sizes = problem(q, k, q_weight, k_weight, cos, sin)
    norm_rope_fwd_kernel[(q.shape[0],)](
        q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps, *strides, **sizes, num_warps=FWD_WARPS,
    )  # fmt: skip
    return q_out, k_out


def norm_rope_bwd(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, deterministic):
    num_tokens, head_dim = q.shape[0], q.shape[2]
    q_grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_grad = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dq_weight, dk_weight = (
        q.new_empty(0) if weight is None else torch.zeros_like(weight)
        for weight in (q_weight, k_weight)
    )
    if num_tokens == 0:
        return q_grad, k_grad, dq_weight, dk_weight
    programs = min(num_tokens, MAX_PROGRAMS)
    strides, sizes = problem(q, k, q_weight, k_weight, cos, sin)
    norms = dict(Q_NORM=sizes["Q_NORM"], K_NORM=sizes["K_NORM"])
    partial = None
    if any(norms.values()):
        partial = torch.empty((programs, 2, head_dim), dtype=torch.float32, device=q.device)
    norm_rope_bwd_kernel[(programs,)](
        dq, dk, q, k, q_weight, k_weight, cos, sin, q_grad, k_grad, partial, eps, num_tokens, *strides, **sizes,
        num_warps=BWD_WARPS,
    )  # fmt: skip
    if partial is not None:
        norm_rope_bwd_reduce_kernel[(triton.cdiv(head_dim, REDUCE_COLUMNS),)](
            partial, dq_weight, dk_weight, programs, **norms, D=head_dim, BLOCK_P=REDUCE_PROGRAMS,
            BLOCK_C=REDUCE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return q_grad, k_grad, dq_weight, dk_weight
