"""The tile list of a ragged GEMM, built on the device, and the order in which programs walk it.

`tile_list` turns offsets into rows of (group, first row, last row + 1), expert-major, BLOCK_M rows a tile. The host
only knows a bound on their number, min(M, M / BLOCK_M + E + 2); unused entries hold NO_TILE and their programs return at once.
Rows outside [offsets[0], offsets[E]) form tiles of the group OUTSIDE, whose outputs are zero. One small program per
group: it finds its bounds by a scan over all offsets (clamped, then a running maximum), so no program waits for
another.

The GEMM kernels launch tiles x column blocks programs. `tile_and_column` orders them in bands of GROUP_M tiles, tiles
fastest: programs that run together share column blocks of an expert's weights in L2 (an expert of 512 rows is four
tiles) and the rows of their own tiles.
"""

import torch
import triton
import triton.language as tl

OUTSIDE = -1
NO_TILE = -2
STORE = 128  # list entries a program writes at a time


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def tile_list_kernel(offsets, tiles, experts, rows, bound, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
                     STORE: tl.constexpr):  # fmt: skip
    """Groups 0 (before the first expert), 1..E (experts), E+1 (after the last); bounds[i] = end of group i."""
    group = tl.program_id(0)
    i = tl.arange(0, GROUPS)
    bounds = tl.load(offsets + i, mask=i <= experts, other=0)
    bounds = tl.where(i <= experts, tl.minimum(tl.maximum(bounds, 0), rows), rows)
    ends = tl.associative_scan(bounds, 0, _maximum)
    starts = tl.load(offsets + i - 1, mask=(i > 0) & (i <= experts + 1), other=0)
    starts = tl.where(i <= experts + 1, tl.minimum(tl.maximum(starts, 0), rows), rows)
    starts = tl.associative_scan(starts, 0, _maximum)
    counts = (ends - starts + BLOCK_M - 1) // BLOCK_M

    first = tl.sum(tl.where(i < group, counts, 0))
    count = tl.sum(tl.where(i == group, counts, 0))
    start = tl.sum(tl.where(i == group, starts, 0))
    end = tl.sum(tl.where(i == group, ends, 0))
    inside = (group >= 1) & (group <= experts)
    for base in range(0, count, STORE):
        tile = base + tl.arange(0, STORE)
        entry = tiles + (first + tile) * 4
        tl.store(entry, tl.where(inside, group - 1, -1), mask=tile < count)
        tl.store(entry + 1, start + tile * BLOCK_M, mask=tile < count)
        tl.store(entry + 2, tl.minimum(start + (tile + 1) * BLOCK_M, end), mask=tile < count)
    if group == experts + 1:
        for base in range(first + count, bound, STORE):
            tile = base + tl.arange(0, STORE)
            tl.store(tiles + tile * 4, -2, mask=tile < bound)


@triton.jit
def tile_and_column(columns, num_tiles, GROUP_M: tl.constexpr):
    """This program's tile and column block."""
    program = tl.program_id(0)
    band = program // (GROUP_M * columns)
    height = tl.minimum(num_tiles - band * GROUP_M, GROUP_M)
    inside = program - band * GROUP_M * columns
    return band * GROUP_M + inside % height, inside // height


@triton.jit
def expert_rows(offsets, expert, experts, rows, GROUPS: tl.constexpr):
    """First and last+1 row of one expert, from the raw offsets."""
    i = tl.arange(0, GROUPS)
    bounds = tl.load(offsets + i, mask=i <= experts, other=0)
    bounds = tl.minimum(tl.maximum(bounds, 0), rows)
    return tl.max(tl.where(i <= expert, bounds, 0)), tl.max(tl.where(i <= expert + 1, bounds, 0))


def num_groups(offsets: torch.Tensor) -> int:
    """Lanes that hold every bound and the two outer groups."""
    return triton.next_power_of_2(offsets.numel() + 1)


def tile_list(offsets, rows, block_m):
    """[bound, 4] int32 on the device: group, first row, last row + 1, unused."""
    experts = offsets.numel() - 1
    bound = min(rows, rows // block_m + experts + 2)  # every tile has a row
    tiles = torch.empty((bound, 4), dtype=torch.int32, device=offsets.device)
    tile_list_kernel[(experts + 2,)](
        offsets, tiles, experts, rows, bound, BLOCK_M=block_m, GROUPS=num_groups(offsets), STORE=STORE,
        num_warps=1,
    )  # fmt: skip
    return tiles
