"""topk_select in Triton: one program per row, two reads of the row and a small exact search.

1. One pass keeps the maximum of each of GROUPS >= topk strided groups. The topk-th largest of these maxima is a lower
   bound of the topk-th largest score, since that many scores reach it; for random rows and GROUPS = 2 topk about
   1.4 topk scores do.
2. One pass appends the keys above the bound, in position order, to a buffer of CAPACITY entries a program.
3. The threshold is found bit by bit: in registers over the buffer, or it is the bound itself where fewer than topk
   scores lie above it (plateaus of equal scores), or, if the buffer overflowed, over the row (32 more reads: rows of
   many distinct scores in adversarial order).
4. One pass over the buffer (or the row) writes what lies above the threshold and the first ties, ascending.

Scores become uint32 keys that sort alike: 0 outside the row, 1 for NaN, -0.0 = +0.0. Every step is a sum, a scan or a
maximum over integers, so the result is bitwise the same on every run. Bound by reading the row twice, the second time
from L2.
"""

import torch
import triton
import triton.language as tl

CAPACITY = (
    8192  # buffer entries a program: 64 KB of keys and columns, 32 registers a thread when searched
)
PROGRAMS_PER_SM = 4


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
def kth_largest(keys, k):
    """The largest t with at least k of `keys` >= t."""
    t = tl.full([], 0, tl.uint32)
    for i in range(32):
        candidate = t | (tl.full([], 1, tl.uint32) << tl.cast(31 - i, tl.uint32))
        t = tl.where(tl.sum((keys >= candidate).to(tl.int32)) >= k, candidate, t)
    return t


@triton.jit
def kth_largest_of_row(row, n, k, BLOCK: tl.constexpr):
    t = tl.full([], 0, tl.uint32)
    for i in range(32):
        candidate = t | (tl.full([], 1, tl.uint32) << tl.cast(31 - i, tl.uint32))
        count = 0
        for base in range(0, n, BLOCK):
            keys = load_keys(row, base + tl.arange(0, BLOCK), n)
            count += tl.sum((keys >= candidate).to(tl.int32))
        t = tl.where(count >= k, candidate, t)
    return t


@triton.jit
def emit(keys, columns, threshold, ties, out, filled, tied):
    """Writes the columns above the threshold and the first `ties` equal to it; returns the advanced counters."""
    equal = (keys == threshold).to(tl.int32)
    nth = tied + tl.cumsum(equal, 0)
    keep = ((keys > threshold) | ((equal == 1) & (nth <= ties))).to(tl.int32)
    position = filled + tl.cumsum(keep, 0) - 1
    tl.store(out + position, columns, mask=keep == 1)
    return filled + tl.sum(keep), tied + tl.sum(equal)


@triton.jit
def select_row(row, n, topk, out, key_buffer, column_buffer, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
               CAPACITY: tl.constexpr):  # fmt: skip
    """Writes the best min(topk, n) positions of row[0, n) to out[0, topk), ascending, -1 in the tail."""
    if n <= topk:
        for base in range(0, topk, BLOCK):
            position = base + tl.arange(0, BLOCK)
            tl.store(out + position, tl.where(position < n, position, -1), mask=position < topk)
    else:
        best = tl.zeros([GROUPS], tl.uint32)
        for base in range(0, n, 4 * GROUPS):
            for i in tl.static_range(4):  # four loads in flight
                group = base + i * GROUPS + tl.arange(0, GROUPS)
                best = tl.maximum(best, load_keys(row, group, n))
        bound = kth_largest(best, topk)  # 0 if topk > GROUPS: no bound

        above = 0
        ahead = load_keys(row, tl.arange(0, 2 * BLOCK), n)
        for base in range(0, n, 2 * BLOCK):
            columns_2 = base + tl.arange(0, 2 * BLOCK)
            keys_2 = ahead
            ahead = load_keys(row, columns_2 + 2 * BLOCK, n)  # arrives while this block is scanned
            passes = (keys_2 > bound).to(tl.int32)
            position = above + tl.cumsum(passes, 0) - 1
            fits = (passes == 1) & (position < CAPACITY)
            tl.store(key_buffer + position, keys_2.to(tl.int32, bitcast=True), mask=fits)
            tl.store(column_buffer + position, columns_2, mask=fits)
            above += tl.sum(passes)
        tl.debug_barrier()

        filled = 0
        tied = 0
        if (above >= topk) & (above <= CAPACITY):
            entry = tl.arange(0, CAPACITY)
            kept = tl.load(key_buffer + entry, mask=entry < above, other=0).to(
                tl.uint32, bitcast=True
            )
            threshold = kth_largest(kept, topk)
            ties = topk - tl.sum((kept > threshold).to(tl.int32))
            for base in range(0, above, BLOCK):
                entries = base + tl.arange(0, BLOCK)
                inside = entries < above
                keys = tl.load(key_buffer + entries, mask=inside, other=0).to(
                    tl.uint32, bitcast=True
                )
                columns = tl.load(column_buffer + entries, mask=inside, other=0)
                filled, tied = emit(keys, columns, threshold, ties, out, filled, tied)
        else:
            threshold = bound
            ties = topk - above
            if above >= topk:
                threshold = kth_largest_of_row(row, n, topk, BLOCK)
                over = 0
                for base in range(0, n, BLOCK):
                    over += tl.sum(
                        (load_keys(row, base + tl.arange(0, BLOCK), n) > threshold).to(tl.int32)
                    )
                ties = topk - over
            for base in range(0, n, BLOCK):
                columns = base + tl.arange(0, BLOCK)
                filled, tied = emit(
                    load_keys(row, columns, n), columns, threshold, ties, out, filled, tied
                )
        tl.debug_barrier()  # the buffers are used again for the program's next row


@triton.jit
def topk_select_kernel(scores, starts, lengths, out, key_buffer, column_buffer, rows, width, row_stride, topk,
                       HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr, GROUPS: tl.constexpr,
                       BLOCK: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    buffer = program.to(tl.int64) * CAPACITY
    for row in range(program, rows, tl.num_programs(0)):
        start = 0
        if HAS_STARTS:
            start = tl.minimum(tl.maximum(tl.load(starts + row), 0), width)
        n = width - start
        if HAS_LENGTHS:
            n = tl.minimum(tl.maximum(tl.load(lengths + row), 0), n)
        row64 = tl.cast(row, tl.int64)
        select_row(scores + row64 * row_stride + start, n, topk, out + row64 * topk, key_buffer + buffer,
                   column_buffer + buffer, GROUPS, BLOCK, CAPACITY)  # fmt: skip


def num_groups(topk: int) -> int:
    """Strided groups whose maxima bound the threshold: twice topk, within what a program's registers hold."""
    return min(max(triton.next_power_of_2(2 * topk), 1024), 8192)


def num_programs(rows: int, device: torch.device) -> int:
    sms = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    return min(rows, sms * PROGRAMS_PER_SM)


def topk_select(scores, topk, starts, lengths):
    rows, width = scores.shape
    out = torch.empty((rows, topk), dtype=torch.int32, device=scores.device)
    if rows == 0:
        return out
    programs = num_programs(rows, scores.device)
    buffers = torch.empty((2, programs, CAPACITY), dtype=torch.int32, device=scores.device)
    topk_select_kernel[(programs,)](
        scores, starts, lengths, out, buffers[0], buffers[1], rows, width, scores.stride(0), topk,
        HAS_STARTS=starts is not None, HAS_LENGTHS=lengths is not None, GROUPS=num_groups(topk), BLOCK=2048,
        CAPACITY=CAPACITY, num_warps=8,
    )  # fmt: skip
    return out
