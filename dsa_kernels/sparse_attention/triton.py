"""sparse_attention forward in Triton: 16 query tokens x 8 heads share every K and V row they need.

Union kernel: one program per (tile of 16 tokens, KV head). The 128 rows (token, head) of q stay in shared memory; the
loop walks the tile's ascending key list (triton_union.py), BLOCK_N keys a step: gathered K rows, S = q K^T, online
softmax in base 2, P V. Which tokens select a key (16 bits of a mask) enters S on the tensor cores: S starts as the
product of a 0/1 matrix [rows, 16] with a matrix [16, keys] of 0 and -3e38, which costs less than a test of every score
and 16 registers of masks. K and V rows are prefetched NUM_STAGES deep, the list one stage further. Neighbouring tiles of one KV head run together, so the rows that they share come from L2. Issued
multiply-adds are rho times the useful ones (rho = distinct keys / K), bytes rho / 16 of those of a gather by token.

Gather kernel: serves the tiles whose list overflowed, GATHER_TOKENS tokens a program, one KV head after another over
the grid (67 MB of K and V a head at 131072 keys: nearly in L2); 16 rows of which 8 are padding for a group of 8. Bound
by bytes: 4.2 MB a token. Both kernels are launched; programs of tiles that the other one serves return at once.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import LN_2, LOG2_E, mma
from .triton_union import BLOCK_T, TILE_FIELDS, can_overflow, load_tile, union_chunks

BLOCK_N = 64
NUM_WARPS = 8
NUM_STAGES = 3
MAX_REGISTERS = 128  # two blocks of 8 warps an SM; a few spills cost less than half the warps
GATHER_TOKENS = 4
GATHER_BLOCK_N = 128
GATHER_WARPS = 4
GATHER_STAGES = 2
FORCE_GATHER = False  # benchmarks: the plain gather by token, whatever the overlap

PENALTY = tl.constexpr(-3e38)  # of a key that a token does not select


@triton.jit
def tile_rows(first, tokens, kv_head, group, BLOCK_T: tl.constexpr, HEADS: tl.constexpr):
    """The (token, head) rows of one program: kv_head counts KV heads times blocks of HEADS of their group."""
    blocks = tl.cdiv(group, HEADS)
    m = tl.arange(0, BLOCK_T * HEADS)
    t = m // HEADS
    member = (kv_head % blocks) * HEADS + m % HEADS
    inside = (t < tokens) & (member < group)
    head = (kv_head // blocks) * group + member
    return t, (first + t).to(tl.int64), head, inside, (kv_head // blocks).to(tl.int64)


@triton.jit
def softmax_step(scores, top, total, scale_log2):
    """One step of the online softmax: weights, the factor for what was summed before, maximum (unscaled), total.
    Scores below PENALTY / 3 are those of keys not selected."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top < PENALTY / 3, 0.0, new_top * scale_log2)
    weights = tl.exp2(scores * scale_log2 - base[:, None])
    factor = tl.exp2(top * scale_log2 - base)
    return weights, factor, new_top, total * factor + tl.sum(weights, 1)


@triton.jit
def store_rows(
    out, lse, token, head, inside, num_heads, sums, top, total, scale_log2, D: tl.constexpr
):
    row = token * num_heads + head
    d = tl.arange(0, D)
    result = sums / tl.where(total > 0, total, tl.where(total == total, 1.0, total))[:, None]
    tl.store(out + row[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=inside[:, None])  # fmt: skip
    tl.store(lse + row, (top * scale_log2 + tl.log2(total)) * LN_2, mask=inside)


@triton.jit
def sparse_attention_fwd_kernel(q, k, v, out, lse, tiles, keys, masks, counts, stride_qt, stride_qh, stride_kl,
                                stride_kg, stride_vl, stride_vg, num_heads, group, capacity, scale_log2,
                                WIDE: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, HEADS: tl.constexpr,
                                BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    count = tl.load(counts + tile)
    first, tokens, first_key, _ = load_tile(tiles, tile)
    if (count > capacity) | (tokens == 0):
        return
    t, token, head, inside, g = tile_rows(first, tokens, tl.program_id(1), group, BLOCK_T, HEADS)
    d = tl.arange(0, D)
    bits = tl.arange(0, BLOCK_T)
    token_of_row = tl.where(t[:, None] == bits[None, :], 1.0, 0.0).to(q.dtype.element_ty)
    queries = tl.load(q + (token * stride_qt + head * stride_qh)[:, None] + d[None, :], mask=inside[:, None], other=0.0)  # fmt: skip
    k += first_key.to(tl.int64) * stride_kl + g * stride_kg
    v += first_key.to(tl.int64) * stride_vl + g * stride_vg
    keys += tile.to(tl.int64) * capacity
    masks += tile.to(tl.int64) * capacity

    top = tl.full([BLOCK_T * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T * HEADS], tl.float32)
    sums = tl.zeros([BLOCK_T * HEADS, D], tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = tl.load(keys + n)
        mask = tl.load(masks + n)
        if WIDE:
            key = key.to(tl.int64)
        k_rows = tl.load(k + (key * stride_kl)[:, None] + d[None, :])
        v_rows = tl.load(v + (key * stride_vl)[:, None] + d[None, :])
        selected = ((mask[:, None] >> bits[None, :]) & 1) != 0
        penalty = tl.where(selected, 0.0, PENALTY).to(k_rows.dtype)
        scores = mma(token_of_row, tl.trans(penalty), None, PRECISION)
        scores = mma(queries, tl.trans(k_rows), scores, PRECISION)
        weights, factor, top, total = softmax_step(scores, top, total, scale_log2)
        sums = mma(weights.to(v_rows.dtype), v_rows, sums * factor[:, None], PRECISION)
    # The row addresses anew, from a fresh load: kept across the loop they would take registers that it needs.
    first = tl.load(tiles + tile.to(tl.int64) * TILE_FIELDS, volatile=True)
    t, token, head, inside, g = tile_rows(first, tokens, tl.program_id(1), group, BLOCK_T, HEADS)
    store_rows(out, lse, token, head, inside, num_heads, sums, top, total, scale_log2, D)


@triton.jit
def sparse_attention_gather_fwd_kernel(q, k, v, out, lse, indices, tiles, counts, stride_qt, stride_qh, stride_kl,
                                       stride_kg, stride_vl, stride_vg, index_stride, topk, num_heads, group,
                                       capacity, scale_log2, WIDE: tl.constexpr, D: tl.constexpr,
                                       BLOCK_T: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
                                       PRECISION: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0) // (BLOCK_T // TOKENS)
    part = tl.program_id(0) % (BLOCK_T // TOKENS)
    if tl.load(counts + tile) <= capacity:
        return
    first, tokens, first_key, length = load_tile(tiles, tile)
    d = tl.arange(0, D)
    for i in range(part * TOKENS, tl.minimum(part * TOKENS + TOKENS, tokens)):
        _, token, head, inside, g = tile_rows(first + i, 1, tl.program_id(1), group, 1, HEADS)
        queries = tl.load(q + (token * stride_qt + head * stride_qh)[:, None] + d[None, :], mask=inside[:, None], other=0.0)  # fmt: skip
        k_head = k + first_key.to(tl.int64) * stride_kl + g * stride_kg
        v_head = v + first_key.to(tl.int64) * stride_vl + g * stride_vg
        ids = indices + tl.cast(first + i, tl.int64) * index_stride
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        sums = tl.zeros([HEADS, D], tl.float32)
        for start in range(0, topk, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            key = tl.load(ids + n, mask=n < topk, other=-1)
            previous = tl.load(ids + n - 1, mask=(n > 0) & (n < topk), other=-1)
            valid = (key >= 0) & (key < length) & (key != previous)
            if WIDE:
                key = key.to(tl.int64)
            k_rows = tl.load(k_head + (key * stride_kl)[:, None] + d[None, :], mask=valid[:, None], other=0.0)  # fmt: skip
            v_rows = tl.load(v_head + (key * stride_vl)[:, None] + d[None, :], mask=valid[:, None], other=0.0)  # fmt: skip
            scores = mma(queries, tl.trans(k_rows), None, PRECISION)
            scores = tl.where(valid[None, :], scores, PENALTY)
            weights, factor, top, total = softmax_step(scores, top, total, scale_log2)
            sums = mma(weights.to(v_rows.dtype), v_rows, sums * factor[:, None], PRECISION)
        store_rows(out, lse, token, head, inside, num_heads, sums, top, total, scale_log2, D)


def tile_shape(group, dtype):
    """(heads a program of the union kernels takes, its keys a step, dot precision). float32 has no exact tensor-core
    product: small tiles on the CUDA cores."""
    heads = triton.next_power_of_2(group)
    return (min(heads, 2), 32, "ieee") if dtype == torch.float32 else (min(heads, 8), BLOCK_N, "tf32")  # fmt: skip


def needs_int64(k, v):
    """Whether an offset into k or v can exceed int32; with 32 bits the union loop computes addresses in half the
    instructions."""
    return k.shape[0] * max(k.stride(0), v.stride(0)) >= 2**31


def gather_overflowed(q, k, v, out, lse, indices, tiles, counts, capacity, softmax_scale):
    """Serves the tiles whose union has more than `capacity` keys, token by token."""
    num_heads, dim = q.shape[1:]
    num_groups = k.shape[1]
    group = num_heads // num_groups
    grid = (tiles.shape[0] * (BLOCK_T // GATHER_TOKENS), num_groups * triton.cdiv(group, 16))
    sparse_attention_gather_fwd_kernel[grid](
        q, k, v, out, lse, indices, tiles, counts, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        indices.stride(0), indices.shape[1], num_heads, group, capacity, softmax_scale * LOG2_E.value,
        WIDE=needs_int64(k, v), D=dim, BLOCK_T=BLOCK_T, TOKENS=GATHER_TOKENS, HEADS=16, BLOCK_N=GATHER_BLOCK_N,
        PRECISION=tile_shape(group, q.dtype)[2], num_warps=GATHER_WARPS, num_stages=GATHER_STAGES,
    )  # fmt: skip


def sparse_attention(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic):
    num_tokens, num_heads, dim = q.shape
    num_keys, num_groups = k.shape[:2]
    group = num_heads // num_groups
    out = torch.empty((num_tokens, num_heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    heads, block_n, precision = tile_shape(group, q.dtype)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    scale_log2, wide = softmax_scale * LOG2_E.value, needs_int64(k, v)
    for tiles, keys, masks, counts in union_chunks(indices, cu_seqlens_q, cu_seqlens_k, num_keys):
        capacity = -1 if FORCE_GATHER else keys.shape[1]
        if capacity > 0:
            sparse_attention_fwd_kernel[(tiles.shape[0], num_groups * triton.cdiv(group, heads))](
                q, k, v, out, lse, tiles, keys, masks, counts, *strides, num_heads, group,
                capacity, scale_log2, WIDE=wide, D=dim, BLOCK_T=BLOCK_T, HEADS=heads, BLOCK_N=block_n,
                PRECISION=precision, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
                maxnreg=MAX_REGISTERS,
            )  # fmt: skip
        if FORCE_GATHER or can_overflow(indices.shape[1], num_keys):
            gather_overflowed(q, k, v, out, lse, indices, tiles, counts, capacity, softmax_scale)
    return out, lse
