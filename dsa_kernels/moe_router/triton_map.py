"""routing_map in Triton: a stable counting sort of the slots by expert, in two launches (one for small inputs).

The slots are cut into at most MAX_BLOCKS equal blocks. Launch 1 counts the experts of each block. Launch 2, one program
a block, sums those counts over all blocks (an expert's first row) and over the blocks before its own (how many of the
expert's rows are taken), then walks its block in chunks: a one-hot [CHUNK, E] of the ids, its running sum down the
column, and a sum along the row give each slot its rank. Up to SINGLE_SLOTS slots one program does all of it.

Nothing is sorted and no atomic is used; every value is a sum of integers. Bound by latency: 9 bytes a slot move, and
E additions a slot; the histogram that launch 2 reads stays in L2 (64 KB for 128 experts).
"""

import torch
import triton
import triton.language as tl

MAX_BLOCKS = 128
MIN_BLOCK = 256  # slots of a block
SINGLE_SLOTS = 512  # up to here one launch of one program
ONE_HOT = 8192  # elements of the one-hot, 32 a thread
NUM_WARPS = 8


@triton.jit
def load_experts(ids, slot, n, ids_stride, num_experts, TOPK: tl.constexpr):
    """The expert of each slot, -1 where it is dropped."""
    address = ids + (slot // TOPK).to(tl.int64) * ids_stride + slot % TOPK
    expert = tl.load(address, mask=slot < n, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, -1)


@triton.jit
def count_experts(ids, first, block_size, n, ids_stride, num_experts, TOPK: tl.constexpr,
                  CHUNK: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """How many slots of [first, first + block_size) go to each expert, [E]."""
    experts = tl.arange(0, E)
    counts = tl.zeros([E], tl.int32)
    for base in range(0, block_size, CHUNK):
        slot = first + base + tl.arange(0, CHUNK)
        expert = load_experts(ids, slot, n, ids_stride, num_experts, TOPK)
        counts += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    return counts


@triton.jit
def routing_map_count_kernel(ids, histogram, block_size, n, ids_stride, num_experts,
                             TOPK: tl.constexpr, CHUNK: tl.constexpr, E: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    first = block * block_size
    counts = count_experts(ids, first, block_size, n, ids_stride, num_experts, TOPK, CHUNK, E)
    experts = tl.arange(0, E)
    tl.store(histogram + block * num_experts + experts, counts, mask=experts < num_experts)


@triton.jit
def routing_map_place_kernel(ids, histogram, offsets, row_token, slot_row, block_size, n, ids_stride, num_experts,
                             num_blocks, SINGLE: tl.constexpr, TOPK: tl.constexpr, CHUNK: tl.constexpr,
                             E: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    first = block * block_size
    experts = tl.arange(0, E)
    if SINGLE:
        total = count_experts(ids, first, block_size, n, ids_stride, num_experts, TOPK, CHUNK, E)
        before = tl.zeros([E], tl.int32)
    else:
        total = tl.zeros([E], tl.int32)
        before = tl.zeros([E], tl.int32)
        for base in range(0, num_blocks, CHUNK):
            other = base + tl.arange(0, CHUNK)
            counts = tl.load(
                histogram + other[:, None] * num_experts + experts[None, :],
                mask=(other[:, None] < num_blocks) & (experts[None, :] < num_experts),
                other=0,
            )
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where(other[:, None] < block, counts, 0), 0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + experts, end, mask=experts < num_experts)

    next_row = end - total + before  # of each expert, in this block
    num_rows = tl.sum(total)
    for base in range(0, block_size, CHUNK):
        slot = first + base + tl.arange(0, CHUNK)
        expert = load_experts(ids, slot, n, ids_stride, num_experts, TOPK)
        one_hot = (expert[:, None] == experts[None, :]).to(tl.int32)  # [CHUNK, E]
        row = tl.sum(one_hot * (next_row[None, :] + tl.cumsum(one_hot, 0) - 1), 1)
        next_row += tl.sum(one_hot, 0)
        kept = expert >= 0
        tl.store(row_token + row, slot // TOPK, mask=kept)
        tl.store(slot_row + slot, tl.where(kept, row, -1), mask=slot < n)
        # The rows after the last one have no token; this chunk's share of them.
        tl.store(row_token + slot, tl.full([CHUNK], -1, tl.int32), mask=(slot >= num_rows) & (slot < n))  # fmt: skip


def routing_map(ids, num_experts):
    n, topk = ids.numel(), ids.shape[1]
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    row_token = torch.empty(n, dtype=torch.int32, device=ids.device)
    slot_row = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if n == 0:
        return offsets.zero_(), row_token, slot_row
    padded_experts = triton.next_power_of_2(num_experts)
    chunk = max(min(ONE_HOT // padded_experts, MIN_BLOCK, triton.next_power_of_2(n)), 16)
    single = n <= SINGLE_SLOTS
    block_size = n if single else max(triton.cdiv(n, MAX_BLOCKS), MIN_BLOCK)
    block_size = triton.cdiv(block_size, chunk) * chunk
    num_blocks = triton.cdiv(n, block_size)
    problem = (block_size, n, ids.stride(0), num_experts)
    sizes = dict(TOPK=topk, CHUNK=chunk, E=padded_experts, num_warps=NUM_WARPS)
    histogram = None
    if not single:
        histogram = torch.empty((num_blocks, num_experts), dtype=torch.int32, device=ids.device)
        routing_map_count_kernel[(num_blocks,)](ids, histogram, *problem, **sizes)
    routing_map_place_kernel[(num_blocks,)](
        ids, histogram, offsets, row_token, slot_row, *problem, num_blocks, SINGLE=single, **sizes
    )
    return offsets, row_token, slot_row
