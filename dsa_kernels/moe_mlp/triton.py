"""moe_mlp forward in Triton: tile list, up, down, combine; four launches, no atomics.

up       One program per tile of an expert's rows and block of BLOCK_F activations. The rows of x are gathered by
         row_token in the A load; B holds BLOCK_F gate rows and BLOCK_F up rows of w13, interleaved, so that gate and up
         of one activation are neighbours in the accumulator and SwiGLU is a register split. 128 rows x 256 (128 gate +
         128 up) x 64: 128 accumulators a thread of 8 warps, 48 KB a stage. Writes act [N, F], and h [N, 2F] only when
         gradients are needed.
down     y = act w2^T: grouped_gemm's kernel on the same tile list.
combine  out[t] = sum_j weights[t, j] y[slot_row[t, j]] in fp32, j ascending: one program a token.

Few rows an expert (decoding) take tiles of 16 or 32 rows and narrow column blocks, so that enough programs stream the
weights. Bound by the weights' bytes up to about 2000 tokens of 8 experts in 128, by the tensor cores above.
"""

import math

import torch
import triton
import triton.language as tl

from ..grouped_gemm.triton import add_products, config, is_small, multiply
from ..grouped_gemm.triton_tiles import NO_TILE, fitting_stages, tile_and_column, tile_list

GROUP_M = 8
# (rows an expert up to, BLOCK_M, BLOCK_F, BLOCK_K, warps, stages): up; BLOCK_M is also down's
UP = (
    ("small", 32, 32, 32, 4, 2),
    (16, 16, 32, 128, 4, 5),
    (32, 32, 32, 128, 4, 4),
    (64, 64, 64, 64, 4, 4),
    (math.inf, 128, 128, 64, 8, 4),
)
# BLOCK_M -> (BLOCK_N, BLOCK_K, warps, stages): down
DOWN = {16: (64, 128, 4, 3), 32: (64, 128, 4, 4), 64: (128, 64, 4, 4), 128: (256, 64, 8, 4)}
DOWN_SMALL = (64, 32, 4, 2)
COMBINE_BLOCK = 2048  # hidden columns of a program
COMBINE_WARPS = 4


@triton.jit
def halves(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and right columns of x; both lie in the same threads, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), (0, 2, 1)))


@triton.jit
def swiglu(gate, up, h, act, m, end, column, F, SAVE_H: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK columns of act, and of h."""
    f = column + tl.arange(0, BLOCK)
    inside = (m[:, None] < end) & (f[None, :] < F)
    row = m.to(tl.int64)[:, None]
    if SAVE_H:
        at = h + row * 2 * F + f[None, :]
        tl.store(at, gate.to(h.dtype.element_ty), mask=inside)
        tl.store(at + F, up.to(h.dtype.element_ty), mask=inside)
    value = gate * tl.sigmoid(gate) * up
    tl.store(act + row * F + f[None, :], value.to(act.dtype.element_ty), mask=inside)


@triton.jit
def moe_mlp_up_kernel(x, w13, act, h, tiles, row_token, num_tiles, num_tokens, F, K, x_row, w_expert, w_row,
                      SAVE_H: tl.constexpr, EVEN_F: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    tile, column = tile_and_column(tl.cdiv(F, BLOCK_F), num_tiles, GROUP_M)
    expert = tl.load(tiles + tile * 4)
    if expert != NO_TILE:
        first = tl.load(tiles + tile * 4 + 1)
        end = tl.load(tiles + tile * 4 + 2)
        m = first + tl.arange(0, BLOCK_M)
        k = tl.arange(0, BLOCK_K)
        token = tl.load(row_token + tl.minimum(m, end - 1))
        known = (token >= 0) & (token < num_tokens)
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_F], tl.float32)
        if expert >= 0:
            pair = tl.arange(0, 2 * BLOCK_F)  # gate 0, up 0, gate 1, up 1, ...
            f = column * BLOCK_F + pair // 2
            w_at = expert.to(tl.int64) * w_expert + (f + pair % 2 * F).to(tl.int64) * w_row
            x_ptrs = x + tl.where(known, token, 0).to(tl.int64)[:, None] * x_row + k[None, :]
            w_ptrs = w13 + w_at[None, :] + k[:, None]
            acc = add_products(acc, x_ptrs, w_ptrs, BLOCK_K, f, F, K, EVEN_F, EVEN_K, BLOCK_K)
        acc = tl.where(known[:, None], acc, 0.0)
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_F, 2]))
        gate_low, gate_high = halves(gate, BLOCK_M, BLOCK_F // 2)
        up_low, up_high = halves(up, BLOCK_M, BLOCK_F // 2)
        at = column * BLOCK_F
        swiglu(gate_low, up_low, h, act, m, end, at, F, SAVE_H, BLOCK_F // 2)
        swiglu(gate_high, up_high, h, act, m, end, at + BLOCK_F // 2, F, SAVE_H, BLOCK_F // 2)


@triton.jit
def moe_mlp_combine_kernel(rows, weights, slot_row, parts, out, dweights, num_rows, hidden, num_parts,
                           TOPK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_PARTS: tl.constexpr,
                           PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out[t] = sum_j weights[t, j] * rows[slot_row[t, j]]; dweights[t, j] = sum of parts[slot_row[t, j]]."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOPK):
        row = tl.load(slot_row + t * TOPK + j)
        inside = (row >= 0) & (row < num_rows)
        row64 = row.to(tl.int64)
        y = tl.load(rows + row64 * hidden + column, mask=inside & (column < hidden), other=0.0)
        scale = 1.0
        if HAS_WEIGHTS:
            scale = tl.load(weights + t * TOPK + j)
            scale = tl.where(inside, scale, 0.0)
        acc += y.to(tl.float32) * scale
        if HAS_PARTS:
            part = tl.arange(0, PARTS)
            value = tl.load(
                parts + row64 * num_parts + part, mask=inside & (part < num_parts), other=0.0
            )
            tl.store(dweights + t * TOPK + j, tl.sum(value), mask=tl.program_id(1) == 0)
    tl.store(out + t * hidden + column, acc.to(out.dtype.element_ty), mask=column < hidden)


def combine(rows, slot_row, weights=None, parts=None):
    """[T, hidden] sums of the rows of each token's slots and, from parts [N, P], dweights [T, K]."""
    tokens, topk = slot_row.shape
    hidden = rows.shape[1]
    out = torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device)
    dweights = None
    if parts is not None:
        dweights = torch.empty((tokens, topk), dtype=torch.float32, device=rows.device)
    if out.numel() == 0:
        return out, dweights
    num_parts = 0 if parts is None else parts.shape[1]
    block = min(triton.next_power_of_2(hidden), COMBINE_BLOCK)
    moe_mlp_combine_kernel[(tokens, triton.cdiv(hidden, block))](
        rows, weights, slot_row, parts, out, dweights, rows.shape[0], hidden, num_parts, TOPK=topk,
        HAS_WEIGHTS=weights is not None, HAS_PARTS=parts is not None, PARTS=triton.next_power_of_2(max(num_parts, 1)),
        BLOCK=block, num_warps=COMBINE_WARPS,
    )  # fmt: skip
    return out, dweights


def moe_mlp(x, w13, w2, weights, offsets, row_token, slot_row, save_h):
    rows, width, depth = row_token.numel(), w2.shape[2], x.shape[1]
    h = torch.empty((rows if save_h else 0, 2 * width), dtype=x.dtype, device=x.device)
    if rows == 0 or x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), h.zero_()
    small = is_small(x, w13, w2)
    block_m, block_f, block_k, warps, stages = config(small, rows, w2.shape[0], UP)
    tiles = tile_list(offsets, rows, block_m)
    act = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    moe_mlp_up_kernel[(tiles.shape[0] * triton.cdiv(width, block_f),)](
        x, w13, act, h, tiles, row_token, tiles.shape[0], x.shape[0], width, depth, x.stride(0), w13.stride(0),
        w13.stride(1), SAVE_H=save_h, EVEN_F=width % block_f == 0, EVEN_K=depth % block_k == 0,
        BLOCK_M=block_m, BLOCK_F=block_f, BLOCK_K=block_k, GROUP_M=GROUP_M, num_warps=warps,
        num_stages=fitting_stages(stages, block_m, 2 * block_f, block_k, x),
    )  # fmt: skip
    down = DOWN_SMALL if small else DOWN[block_m]
    y = multiply(act, w2, tiles, (block_m, *down))
    return combine(y, slot_row, weights)[0], h
