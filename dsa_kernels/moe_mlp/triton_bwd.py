"""moe_mlp backward in Triton: six launches on the saved x and h, no atomics, every sum in a fixed order.

dh       dact = dout w2 for gathered rows of dout (the A load, by row_token), 128 x 128 tiles. The epilogue reads the
         tile of h and writes dh = dswiglu(s dact), s * act (for dw2) and the tile's part of dact . act, which is the
         gradient of the routing weight s: y is never formed again.
dw2      sum of dout^T (s act), dw13: sum of dh^T x, rows of dout and x gathered (grouped_gemm's gradient kernel).
dx rows  dh w13 (grouped_gemm's kernel on the transposed view), then combine adds the rows of each token.

The weight s of a row is the weight of its token's slot that names the row.
"""

import math

import torch
import triton
import triton.language as tl

from ..grouped_gemm.triton import add_products, config, is_small, multiply, weight_gradient
from ..grouped_gemm.triton_tiles import fitting_stages, tile_and_column, tile_list
from .triton import combine, halves

GROUP_M = 8
# (rows an expert up to, BLOCK_M, BLOCK_F, BLOCK_K, warps, stages)
DH = (
    ("small", 32, 32, 32, 4, 2),
    (16, 16, 64, 128, 4, 4),
    (32, 32, 64, 128, 4, 4),
    (64, 64, 128, 64, 4, 4),
    (math.inf, 128, 128, 64, 8, 4),
)
# BLOCK_M -> (BLOCK_N, BLOCK_K, warps, stages)
DX = {16: (64, 128, 4, 4), 32: (64, 128, 4, 4), 64: (128, 64, 4, 4), 128: (256, 64, 8, 4)}
DX_SMALL = (64, 32, 4, 2)


@triton.jit
def swiglu_backward(dact, s, h, dh, act, m, end, column, F, BLOCK: tl.constexpr):
    """Writes dh and s * act for BLOCK columns of the tile; returns the row sums of dact . act."""
    f = column + tl.arange(0, BLOCK)
    inside = (m[:, None] < end) & (f[None, :] < F)
    row = m.to(tl.int64)[:, None]
    at = row * 2 * F + f[None, :]
    gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    scaled = (silu * up * s[:, None]).to(act.dtype.element_ty)
    tl.store(act + row * F + f[None, :], scaled, mask=inside)
    ds = dact * s[:, None]
    tl.store(dh + at + F, (ds * silu).to(dh.dtype.element_ty), mask=inside)
    dgate = ds * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dh + at, dgate.to(dh.dtype.element_ty), mask=inside)
    return tl.sum(dact * silu * up, 1)


@triton.jit
def moe_mlp_bwd_dh_kernel(dout, w2, h, dh, act, parts, weights, slot_row, row_token, tiles, num_tiles, num_tokens,
                          F, K, dout_row, w_expert, w_row, topk, EVEN_F: tl.constexpr, EVEN_K: tl.constexpr,
                          TOPK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
                          BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK_F)
    tile, column = tile_and_column(blocks, num_tiles, GROUP_M)
    expert = tl.load(tiles + tile * 4)
    if expert >= 0:
        first = tl.load(tiles + tile * 4 + 1)
        end = tl.load(tiles + tile * 4 + 2)
        m = first + tl.arange(0, BLOCK_M)
        f = column * BLOCK_F + tl.arange(0, BLOCK_F)
        k = tl.arange(0, BLOCK_K)
        token = tl.load(row_token + tl.minimum(m, end - 1))
        known = (token >= 0) & (token < num_tokens)
        token = tl.where(known, token, 0).to(tl.int64)
        a_ptrs = dout + token[:, None] * dout_row + k[None, :]
        w_ptrs = w2 + expert.to(tl.int64) * w_expert + k.to(tl.int64)[:, None] * w_row + f[None, :]
        step = tl.cast(w_row, tl.int64) * BLOCK_K
        acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        acc = add_products(acc, a_ptrs, w_ptrs, step, f, F, K, EVEN_F, EVEN_K, BLOCK_K)

        j = tl.arange(0, TOPK)
        slot = token[:, None] * topk + j[None, :]
        is_slot = known[:, None] & (j[None, :] < topk)
        mine = is_slot & (tl.load(slot_row + slot, mask=is_slot, other=-1) == m[:, None])
        s = tl.sum(tl.load(weights + slot, mask=mine, other=0.0), 1)

        # Quarters of the tile one after another: a whole one would need five tiles of registers.
        low, high = halves(tl.where(known[:, None], acc, 0.0), BLOCK_M, BLOCK_F // 2)
        part = tl.zeros([BLOCK_M], tl.float32)
        for half in tl.static_range(2):
            left, right = halves(low if half == 0 else high, BLOCK_M, BLOCK_F // 4)
            at = column * BLOCK_F + half * (BLOCK_F // 2)
            part += swiglu_backward(left, s, h, dh, act, m, end, at, F, BLOCK_F // 4)
            at += BLOCK_F // 4
            part += swiglu_backward(right, s, h, dh, act, m, end, at, F, BLOCK_F // 4)
        tl.store(parts + m.to(tl.int64) * blocks + column, part, mask=m < end)


def moe_mlp_bwd(dout, x, h, w13, w2, weights, offsets, row_token, slot_row):
    rows, (experts, depth, width) = row_token.numel(), w2.shape
    if rows == 0 or x.numel() == 0:
        like = torch.contiguous_format
        return tuple(torch.zeros_like(t, memory_format=like) for t in (x, w13, w2, weights))
    small = is_small(x, dout, w13, w2)
    block_m, block_f, block_k, warps, stages = config(small, rows, experts, DH)
    tiles = tile_list(offsets, rows, block_m)
    dh = torch.empty((rows, 2 * width), dtype=x.dtype, device=x.device)
    act = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(width, block_f)
    parts = torch.empty((rows, blocks), dtype=torch.float32, device=x.device)
    topk = slot_row.shape[1]
    moe_mlp_bwd_dh_kernel[(tiles.shape[0] * blocks,)](
        dout, w2, h, dh, act, parts, weights, slot_row, row_token, tiles, tiles.shape[0], x.shape[0], width, depth,
        dout.stride(0), w2.stride(0), w2.stride(1), topk, EVEN_F=width % block_f == 0, EVEN_K=depth % block_k == 0,
        TOPK=triton.next_power_of_2(topk), BLOCK_M=block_m, BLOCK_F=block_f, BLOCK_K=block_k, GROUP_M=GROUP_M,
        num_warps=warps, num_stages=fitting_stages(stages, block_m, block_f, block_k, x),
    )  # fmt: skip
    dw2 = weight_gradient(dout, act, offsets, rows, row_token, gather_dc=True)
    dw13 = weight_gradient(dh, x, offsets, rows, row_token, gather_a=True)
    shape = (block_m, *(DX_SMALL if small else DX[block_m]))
    dx_rows = multiply(dh, w13.transpose(1, 2), tiles, shape)
    dx, dweights = combine(dx_rows, slot_row, parts=parts)
    return dx, dw13, dw2, dweights
