"""grouped_gemm_fp8 in Triton: e4m3 operands with scales of 1 x 128 and 128 x 128 blocks.

A step along k is one scale block: the tensor cores multiply 128 products into a fresh accumulator, which is scaled and
added to the fp32 one on the CUDA cores (two accumulators of 64 registers a thread at 128 x 128, 8 warps). FP8 wgmma
keeps about 14 bits within a step; below compute capability 8.9 the operands become fp16, which holds every e4m3 value
exactly.
"""

import math

import torch
import triton
import triton.language as tl

from ..dispatch import has_fp8_units
from ..triton_math import e4m3_to_fp16
from .triton_tiles import NO_TILE, fitting_stages, tile_and_column, tile_list

GROUP_M = 8
BLOCK = 128  # a scale block; BLOCK_N and BLOCK_K
# (rows an expert up to, BLOCK_M, warps, stages)
CONFIGS = ((16, 16, 4, 4), (32, 32, 4, 4), (64, 64, 4, 4), (math.inf, 128, 8, 4))


@triton.jit
def grouped_gemm_fp8_kernel(a, a_scale, b, b_scale, out, tiles, num_tiles, N, K, NATIVE: tl.constexpr,
                            BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    tile, column = tile_and_column(N // BLOCK, num_tiles, GROUP_M)
    expert = tl.load(tiles + tile * 4)
    if expert != NO_TILE:
        first = tl.load(tiles + tile * 4 + 1)
        end = tl.load(tiles + tile * 4 + 2)
        m = first + tl.arange(0, BLOCK_M)
        n = column * BLOCK + tl.arange(0, BLOCK)
        k = tl.arange(0, BLOCK)
        blocks = K // BLOCK
        acc = tl.zeros([BLOCK_M, BLOCK], tl.float32)
        if expert >= 0:
            source = tl.minimum(m, end - 1).to(tl.int64)
            a_ptrs = a + source[:, None] * K + k[None, :]
            a_scales = a_scale + source * blocks
            b_row = expert.to(tl.int64) * N
            b_ptrs = b + (b_row + n)[None, :] * K + k[:, None]
            b_scales = b_scale + (expert.to(tl.int64) * (N // BLOCK) + column) * blocks
            scale = tl.load(a_scales) * tl.load(b_scales)
            for block in range(blocks):
                ahead = tl.minimum(block + 1, blocks - 1)  # the next scales arrive during the dot
                next_scale = tl.load(a_scales + ahead) * tl.load(b_scales + ahead)
                x = tl.load(a_ptrs)
                y = tl.load(b_ptrs)
                if not NATIVE:
                    x = e4m3_to_fp16(x)
                    y = e4m3_to_fp16(y)
                acc += tl.dot(x, y) * scale[:, None]
                scale = next_scale
                a_ptrs += BLOCK
                b_ptrs += BLOCK
        out_ptrs = out + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptrs, acc.to(tl.bfloat16), mask=m[:, None] < end)


def grouped_gemm_fp8(a, a_scale, b, b_scale, offsets):
    rows, width = a.shape[0], b.shape[1]
    out = torch.empty((rows, width), dtype=torch.bfloat16, device=a.device)
    if out.numel() == 0:
        return out
    native = has_fp8_units(a.device)
    if not native:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    block_m, warps, stages = next(c[1:] for c in CONFIGS if rows <= c[0] * max(b.shape[0], 1))
    tiles = tile_list(offsets, rows, block_m)
    grouped_gemm_fp8_kernel[(tiles.shape[0] * (width // BLOCK),)](
        a, a_scale, b, b_scale, out, tiles, tiles.shape[0], width, a.shape[1], NATIVE=native, BLOCK_M=block_m,
        BLOCK=BLOCK, GROUP_M=GROUP_M, num_warps=warps,
        num_stages=fitting_stages(stages, block_m, BLOCK, BLOCK, a),
    )  # fmt: skip
    return out
