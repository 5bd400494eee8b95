"""topk_select in Triton: a program streams over its row and keeps candidates, as the C++ does.

Scores become uint32 keys that sort alike: 0 where there is no column, 1 for NaN, -0.0 = +0.0. BLOCK columns a step, the
keys above a bound are appended, in position order, to the row's buffer of CAPACITY candidates (a scan gives the places).
When another block might not fit, all but the best topk candidates go: the topk-th largest key is found by bisection,
about 22 counts over the buffer, and it is the bound from then on. A later key that does not exceed the bound cannot
belong to the set, since topk earlier ones are at least as good. For scores in random order the bound rises after every
doubling of what was read, 5 times a row of 131072; scores in ascending order make it rise every topk columns.

Every step is a count, a scan or a comparison of integers: the same bits on every run. The row is read once. Many rows:
one warp each, so that no step waits at a barrier and a dozen rows share an SM; bound by the instructions of a step, some
30 a key. Few rows: eight warps each; bound by the chain of a step (load, scan over the warps, store).
"""

import torch
import triton
import triton.language as tl

WORKSPACE_BYTES = 48 << 20
MANY_ROWS = 512


@triton.jit
def order_key(score):
    bits = score.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)  # -0.0
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score == score, key, 1).to(tl.uint32)


@triton.jit
def load_keys(row, columns, n):
    score = tl.load(row + columns, mask=columns < n, other=0.0)
    return tl.where(columns < n, order_key(score), 0).to(tl.uint32)


@triton.jit
def load_candidates(keys, entries, count):
    return tl.load(keys + entries, mask=entries < count, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def count_reaching(keys, count, value, SEARCH: tl.constexpr):
    reaching = 0
    for base in range(0, count, SEARCH):
        part = load_candidates(keys, base + tl.arange(0, SEARCH), count)
        reaching += tl.sum((part >= value).to(tl.int32))
    return reaching


@triton.jit
def kth_largest(keys, count, k, bound, SEARCH: tl.constexpr):
    """The k-th largest of `count` >= k candidates, none below `bound`, and how many exceed it."""
    high = tl.full([], 0, tl.uint32)
    for base in range(0, count, SEARCH):
        part = load_candidates(keys, base + tl.arange(0, SEARCH), count)
        high = tl.maximum(high, tl.max(part, 0))
    high += 1
    low = bound  # at least k candidates reach low, `over` < k reach high
    over = 0
    while high - low > 1:
        middle = low + (high - low) // 2
        reaching = count_reaching(keys, count, middle, SEARCH)
        over = tl.where(reaching >= k, over, reaching)
        high = tl.where(reaching >= k, high, middle)
        low = tl.where(reaching >= k, middle, low)
    return low, over


@triton.jit
def keep_best(keys, columns, count, topk, bound, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """Drops all but the best topk of the `count` candidates, in place and in order; returns the worst that stays."""
    tl.debug_barrier()  # the appended candidates are visible to the whole program
    threshold, over = kth_largest(keys, count, topk, bound, SEARCH)
    ties = topk - over
    filled = 0
    tied = 0
    for base in range(0, count, BLOCK):
        entries = base + tl.arange(0, BLOCK)
        key = load_candidates(keys, entries, count)
        column = tl.load(columns + entries, mask=entries < count, other=0)
        equal = ((key == threshold) & (entries < count)).to(tl.int32)
        nth = tied + tl.cumsum(equal, 0)
        keep = ((key > threshold) | ((equal == 1) & (nth <= ties))).to(tl.int32)
        position = filled + tl.cumsum(keep, 0) - 1
        tl.debug_barrier()  # all of the block is read before its start is overwritten
        tl.store(keys + position, key.to(tl.int32, bitcast=True), mask=keep == 1)
        tl.store(columns + position, column, mask=keep == 1)
        filled += tl.sum(keep)
        tied += tl.sum(equal)
    tl.debug_barrier()
    return threshold


@triton.jit
def feed_row(row, base, stop, topk, count, bound, keys, columns, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
             CAPACITY: tl.constexpr):  # fmt: skip
    """Appends what exceeds the bound among the columns [base, stop), whose scores start at `row`; returns the new count
    and bound."""
    ahead = load_keys(row, tl.arange(0, BLOCK), stop - base)
    for first in range(base, stop, BLOCK):
        column = first + tl.arange(0, BLOCK)
        key = ahead
        ahead = load_keys(row, column - base + BLOCK, stop - base)  # arrives while this block is scanned
        passes = (key > bound).to(tl.int32)
        found = tl.sum(passes)
        if found > 0:
            position = count + tl.cumsum(passes, 0) - 1
            tl.store(keys + position, key.to(tl.int32, bitcast=True), mask=passes == 1)
            tl.store(columns + position, column, mask=passes == 1)
            count += found
            if count > CAPACITY - BLOCK:
                bound = keep_best(keys, columns, count, topk, bound, BLOCK, SEARCH)
                count = topk
    return count, bound


@triton.jit
def finish_row(n, topk, count, bound, keys, columns, out, BLOCK: tl.constexpr, SEARCH: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Writes the chosen columns of a row of n, ascending, -1 in the tail."""
    if n <= topk:
        for base in range(0, topk, BLOCK):
            position = base + tl.arange(0, BLOCK)
            tl.store(out + position, tl.where(position < n, position, -1), mask=position < topk)
    else:
        if count > topk:
            keep_best(keys, columns, count, topk, bound, BLOCK, SEARCH)
        tl.debug_barrier()
        for base in range(0, topk, BLOCK):
            position = base + tl.arange(0, BLOCK)
            column = tl.load(columns + position, mask=position < topk, other=0)
            tl.store(out + position, column, mask=position < topk)
        tl.debug_barrier()  # the buffer is used again for the program's next row


@triton.jit
def topk_select_kernel(scores, starts, lengths, out, candidates, rows, width, row_stride, topk,
                       HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
                       SEARCH: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    keys = candidates + program.to(tl.int64) * (2 * CAPACITY)
    columns = keys + CAPACITY
    for row in range(program, rows, tl.num_programs(0)):
        start = 0
        if HAS_STARTS:
            start = tl.minimum(tl.maximum(tl.load(starts + row), 0), width)
        n = width - start
        if HAS_LENGTHS:
            n = tl.minimum(tl.maximum(tl.load(lengths + row), 0), n)
        row64 = tl.cast(row, tl.int64)
        bound = tl.full([], 0, tl.uint32)
        count = 0
        if n > topk:
            count, bound = feed_row(scores + row64 * row_stride + start, 0, n, topk, count, bound, keys, columns, BLOCK,
                                    SEARCH, CAPACITY)  # fmt: skip
        finish_row(n, topk, count, bound, keys, columns, out + row64 * topk, BLOCK, SEARCH, CAPACITY)


def sizes(topk: int, width: int, rows: int) -> dict[str, int]:
    """Compile-time sizes and warps: room for the candidates that stay, as many again and a block."""
    block, search, warps = (512, 1024, 1) if rows >= MANY_ROWS else (2048, 8192, 8)
    capacity = triton.cdiv(2 * min(topk, width), 1024) * 1024 + block
    return {"BLOCK": block, "SEARCH": search, "CAPACITY": capacity, "num_warps": warps}


def num_programs(rows: int, capacity: int) -> int:
    return min(rows, max(WORKSPACE_BYTES // (8 * capacity), 1))


def topk_select(scores, topk, starts, lengths):
    rows, width = scores.shape
    out = torch.empty((rows, topk), dtype=torch.int32, device=scores.device)
    if rows == 0:
        return out
    size = sizes(topk, width, rows)
    programs = num_programs(rows, size["CAPACITY"])
    candidates = torch.empty((programs, 2, size["CAPACITY"]), dtype=torch.int32, device=scores.device)  # fmt: skip
    topk_select_kernel[(programs,)](
        scores, starts, lengths, out, candidates, rows, width, scores.stride(0), topk, HAS_STARTS=starts is not None,
        HAS_LENGTHS=lengths is not None, **size,
    )  # fmt: skip
    return out
