"""topk_select in Triton: a program streams over its row and keeps candidates, as the C++ does.

A candidate is a score that exceeds a bound, with its column, appended in position order to the row's buffer. LANES x BITS
scores a step: the passing ones of a lane become the bits of a word, a scan of the words' counts gives every
lane its places, and a loop as long as the fullest word takes the bits out one by one. Few scores pass, so a step costs a
comparison a score and a short loop.

When another step might not fit, candidates go, and the bound rises: bisection over the order-preserving integer form of
the scores (NaN 1, -0.0 = +0.0) finds a value that between topk and topk + SLACK candidates reach; about ten counts over the
buffer. A later score that does not exceed it cannot belong to the set, since topk earlier ones are at least as good. Where
equal scores allow no such value it is the topk-th largest, and only its first ties stay. The end of a row does the same
without slack: what stays is the set.

For scores in random order the bound rises after every doubling of what was read, 5 times a row of 131072; scores in
ascending order make it rise every topk columns. Every step is a count, a scan or a comparison of integers: the same bits
on every run. The row is read once. Many rows: four warps each, so that eight rows share an SM; few rows: eight warps.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import popcount

WORKSPACE_BYTES = 48 << 20
MANY_ROWS = 264


@triton.jit
def order_key(score):
    bits = score.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)  # -0.0
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score == score, key, 1).to(tl.uint32)


@triton.jit
def score_of(key):
    """The inverse of order_key; NaN for the keys 0 and 1."""
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return tl.where(key <= 1, 0x7FC00000, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def load_candidates(keys, entries, count):
    return tl.load(keys + entries, mask=entries < count, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def count_reaching(keys, count, value, SEARCH: tl.constexpr):
    reaching = tl.zeros([SEARCH], tl.int32)
    for base in range(0, count, SEARCH):
        reaching += (load_candidates(keys, base + tl.arange(0, SEARCH), count) >= value).to(
            tl.int32
        )
    return tl.sum(reaching)


@triton.jit
def find_bound(keys, count, topk, slack, SEARCH: tl.constexpr):
    """A key that at least topk and, unless ties forbid, at most topk + slack of `count` >= topk candidates reach; how
    many reach it, and how many exceed the topk-th largest (where it is that one)."""
    low = tl.full([], 0, tl.uint32)
    high = tl.full([], 0xFF800001, tl.uint32)  # above +inf
    reach_low = count
    reach_high = 0
    while (reach_low > topk + slack) & (high - low > 1):
        middle = low + (high - low) // 2
        reaching = count_reaching(keys, count, middle, SEARCH)
        enough = reaching >= topk
        reach_low = tl.where(enough, reaching, reach_low)
        reach_high = tl.where(enough, reach_high, reaching)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low, reach_low, reach_high


@triton.jit
def drop_candidates(keys, columns, count, topk, slack, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """Keeps at least topk, and at most topk + slack, best candidates in place and in order; returns how many, and the
    bound that later keys must exceed."""
    tl.debug_barrier()  # the appended candidates are visible to the whole program
    bound, reaching, over = find_bound(keys, count, topk, slack, SEARCH)
    ties = tl.where(reaching > topk + slack, topk - over, reaching)  # of the bound itself that stay
    filled = 0
    tied = 0
    for base in range(0, count, BLOCK):
        entries = base + tl.arange(0, BLOCK)
        key = load_candidates(keys, entries, count)
        column = tl.load(columns + entries, mask=entries < count, other=0)
        equal = ((key == bound) & (entries < count)).to(tl.int32)
        nth = tied + tl.cumsum(equal, 0)
        keep = ((key > bound) | ((equal == 1) & (nth <= ties))).to(tl.int32)
        position = filled + tl.cumsum(keep, 0) - 1
        tl.debug_barrier()  # all of the block is read before its start is overwritten
        tl.store(keys + position, key.to(tl.int32, bitcast=True), mask=keep == 1)
        tl.store(columns + position, column, mask=keep == 1)
        filled += tl.sum(keep)
        tied += tl.sum(equal)
    tl.debug_barrier()
    return filled, bound


@triton.jit
def feed_row(row, base, stop, topk, count, bound, keys, columns, LANES: tl.constexpr, BITS: tl.constexpr,
             SEARCH: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """Appends what exceeds the bound (a score; NaN: none yet) among the columns [base, stop), whose scores start at
    `row`; returns the new count and bound. NaN scores always pass; they rank below whatever the bound is."""
    BLOCK: tl.constexpr = LANES * BITS
    lane = tl.arange(0, LANES) * BITS
    bit = tl.arange(0, BITS)[None, :]
    column = lane[:, None] + bit
    ahead = tl.load(row + column, mask=column < stop - base, other=0.0)
    for first in range(base, stop, BLOCK):
        score = ahead.to(tl.float32)
        passes = (first + column < stop) & ((score <= bound) == 0)
        column_ahead = first - base + BLOCK + column
        ahead = tl.load(
            row + column_ahead, mask=column_ahead < stop - base, other=0.0
        )  # arrives meanwhile
        words = tl.sum(tl.where(passes, 1 << bit, 0), 1)
        found = tl.sum(passes.to(tl.int32), 1)
        most = tl.max(found, 0)
        if most > 0:
            place = count + tl.cumsum(found, 0) - found
            for _ in range(most):
                live = words != 0
                chosen = first + lane + popcount((words & -words) - 1)
                key = order_key(tl.load(row + (chosen - base), mask=live, other=0.0))
                tl.store(keys + place, key.to(tl.int32, bitcast=True), mask=live)
                tl.store(columns + place, chosen, mask=live)
                words = words & (words - 1)
                place += 1
            count += tl.sum(found)
            if count > CAPACITY - BLOCK:
                count, key = drop_candidates(keys, columns, count, topk, topk // 4, SEARCH, SEARCH)
                bound = score_of(key)
    return count, bound


@triton.jit
def finish_row(n, topk, count, keys, columns, out, SEARCH: tl.constexpr):
    """Writes the chosen columns of a row of n, ascending, -1 in the tail."""
    if n <= topk:
        for base in range(0, topk, SEARCH):
            position = base + tl.arange(0, SEARCH)
            tl.store(out + position, tl.where(position < n, position, -1), mask=position < topk)
    else:
        if count > topk:
            drop_candidates(keys, columns, count, topk, 0, SEARCH, SEARCH)
        tl.debug_barrier()
        for base in range(0, topk, SEARCH):
            position = base + tl.arange(0, SEARCH)
            column = tl.load(columns + position, mask=position < topk, other=0)
            tl.store(out + position, column, mask=position < topk)
        tl.debug_barrier()  # the buffer is used again for the program's next row


@triton.jit
def topk_select_kernel(scores, starts, lengths, out, candidates, rows, width, row_stride, topk,
                       HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr,
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
        count = 0
        if n > topk:
            bound = tl.full([], float("nan"), tl.float32)
            count, bound = feed_row(scores + row64 * row_stride + start, 0, n, topk, count, bound, keys, columns, LANES,
                                    BITS, SEARCH, CAPACITY)  # fmt: skip
        finish_row(n, topk, count, keys, columns, out + row64 * topk, SEARCH)


def sizes(topk: int, width: int, rows: int) -> dict[str, int]:
    """Compile-time sizes and warps: room for the candidates that stay, nearly as many again and a step."""
    lanes, bits, search, warps = (128, 16, 1024, 4) if rows >= MANY_ROWS else (256, 8, 2048, 8)
    capacity = triton.cdiv(2 * min(topk, width), 1024) * 1024 + lanes * bits
    return {"LANES": lanes, "BITS": bits, "SEARCH": search, "CAPACITY": capacity, "num_warps": warps}  # fmt: skip


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
