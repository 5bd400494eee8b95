"""sparse_decode in Triton: flash-decoding over the selected tokens, then a combine.

1. One program per (token, split of SPLIT entries, KV head): finds the token's request, turns entries into cache
   addresses through the page table, gathers K and V rows once for all query heads of the group (padded to 16 rows, the
   smallest MMA), and writes the split's maximum, sum and unnormalised output in fp32. All loads of a split are issued
   before the first use: a program is three dependent trips to memory (boundaries, page table, rows).
2. One program per (token, head) combines the splits in a fixed order.

SPLIT is a constant, so a token's bits depend on its own entries alone, not on the batch. KV heads run fastest: the
programs that read the parts of one cache row run together. Bound by the gather, 512 bytes an entry and KV head at
D = 128; the partial results add 1/16 to that twice.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import LN_2, LOG2_E, mma
from ..triton_sequences import boundary_block

SPLIT = {torch.bfloat16: 128, torch.float32: 32}  # entries a program
PARTIAL_WARPS = 4
COMBINE_WARPS = 4
COMBINE_BLOCK = 16  # splits combined at once
PAGE = tl.constexpr(64)


@triton.jit
def request_of(token, cu_q, num_requests, REQUESTS: tl.constexpr):
    """The boundary before the first one above the token; -1 or num_requests if the token has no request."""
    above = num_requests + 1
    for base in range(0, num_requests + 1, REQUESTS):
        s = base + tl.arange(0, REQUESTS)
        boundary = tl.load(cu_q + s, mask=s <= num_requests, other=0)
        later = (s <= num_requests) & (boundary > token)
        above = tl.minimum(above, tl.min(tl.where(later, s, num_requests + 1)))
    return above - 1


@triton.jit
def sparse_decode_partial_kernel(q, k_cache, v_cache, indices, page_table, lengths, cu_q, partial, highest, total,
                                 q_stride, k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, indices_stride,
                                 table_stride, K, max_pages, num_pages, num_requests, num_splits, scale_log2,
                                 H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                                 SPLIT: tl.constexpr, REQUESTS: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = H // G
    kv_head = tl.program_id(0) % G
    split = tl.program_id(0) // G % num_splits
    token = tl.program_id(0) // G // num_splits
    token64 = tl.cast(token, tl.int64)

    entry = split * SPLIT + tl.arange(0, SPLIT)
    row = indices + token64 * indices_stride
    position = tl.load(row + entry, mask=entry < K, other=-1)
    previous = tl.load(row + entry - 1, mask=(entry > 0) & (entry < K), other=-1)
    request = request_of(token, cu_q, num_requests, REQUESTS)
    known = (request >= 0) & (request < num_requests)
    length = tl.load(lengths + request, mask=known, other=0)
    valid = (position >= 0) & (position < length) & (position != previous)
    valid &= position // PAGE < max_pages
    table = page_table + tl.cast(request, tl.int64) * table_stride
    page = tl.load(table + position // PAGE, mask=valid, other=-1)
    valid &= (page >= 0) & (page < num_pages)
    page64 = tl.where(valid, page, 0).to(tl.int64)
    slot = tl.where(valid, position % PAGE, 0)

    d = tl.arange(0, D)
    k_rows = k_cache + kv_head * D + (page64 * k_page_stride + slot * k_slot_stride)
    v_rows = v_cache + kv_head * D + (page64 * v_page_stride + slot * v_slot_stride)
    k = tl.load(k_rows[:, None] + d[None, :], mask=valid[:, None], other=0.0)  # [SPLIT, D]
    v = tl.load(v_rows[:, None] + d[None, :], mask=valid[:, None], other=0.0)
    h = tl.arange(0, ROWS)
    heads = kv_head * GROUP + h
    queries = tl.load(
        q + token64 * q_stride + (heads * D)[:, None] + d[None, :], mask=h[:, None] < GROUP, other=0.0
    )  # fmt: skip

    s = mma(queries, k.T) * scale_log2
    s = tl.where(valid[None, :], s, -float("inf"))
    m = tl.max(s, 1)
    p = tl.exp2(s - tl.where(m == -float("inf"), 0.0, m)[:, None])
    acc = mma(p.to(v.dtype), v)

    at = (token64 * H + heads) * num_splits + split
    tl.store(highest + at, m, mask=h < GROUP)
    tl.store(total + at, tl.sum(p, 1), mask=h < GROUP)
    tl.store(partial + at[:, None] * D + d[None, :], acc, mask=h[:, None] < GROUP)


@triton.jit
def sparse_decode_combine_kernel(partial, highest, total, out, lse, num_splits, D: tl.constexpr,
                                 BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = row * num_splits
    d = tl.arange(0, D)
    m = tl.full([], -float("inf"), tl.float32)
    weight = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([D], tl.float32)
    for base in range(0, num_splits, BLOCK):
        split = base + tl.arange(0, BLOCK)
        inside = split < num_splits
        logits = tl.load(highest + first + split, mask=inside, other=-float("inf"))
        totals = tl.load(total + first + split, mask=inside, other=0.0)
        parts = tl.load(
            partial + (first + split)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0
        )
        top = tl.maximum(m, tl.max(logits))
        shift = tl.where(top == -float("inf"), 0.0, top)
        factor = tl.exp2(logits - shift)
        before = tl.exp2(m - shift)
        weight = weight * before + tl.sum(factor * totals)
        acc = acc * before + tl.sum(factor[:, None] * parts, 0)
        m = top
    seen = weight != 0.0
    weight = tl.where(seen, weight, 1.0)
    tl.store(out + row * D + d, (acc / weight).to(out.dtype.element_ty))
    tl.store(lse + row, tl.where(seen, m * LN_2 + tl.log(weight), -float("inf")))


def sparse_decode(q, k_cache, v_cache, indices, page_table, lengths, cu_seqlens_q, softmax_scale):
    (T, H, D), (num_pages, _, G, _), K = q.shape, k_cache.shape, indices.shape[1]
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((T, H), dtype=torch.float32, device=q.device)
    if T == 0:
        return out, lse
    split, num_requests = SPLIT[q.dtype], lengths.shape[0]
    num_splits = triton.cdiv(K, split)
    partial = torch.empty((T, H, num_splits, D), dtype=torch.float32, device=q.device)
    highest, total = torch.empty((2, T, H, num_splits), dtype=torch.float32, device=q.device)
    if num_splits > 0:
        sparse_decode_partial_kernel[(T * num_splits * G,)](
            q, k_cache, v_cache, indices, page_table, lengths, cu_seqlens_q, partial, highest, total, q.stride(0),
            k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1), indices.stride(0),
            page_table.stride(0), K, page_table.shape[1], num_pages, num_requests, num_splits,
            softmax_scale * LOG2_E.value, H=H, G=G, D=D, ROWS=max(16, triton.next_power_of_2(H // G)), SPLIT=split,
            REQUESTS=boundary_block(num_requests), num_warps=PARTIAL_WARPS,
        )  # fmt: skip
    sparse_decode_combine_kernel[(T * H,)](
        partial,
        highest,
        total,
        out,
        lse,
        num_splits,
        D=D,
        BLOCK=COMBINE_BLOCK,
        num_warps=COMBINE_WARPS,
    )
    return out, lse
