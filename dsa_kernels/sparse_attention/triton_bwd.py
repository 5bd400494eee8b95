"""sparse_attention backward in Triton.

With P = exp(s q k^T - lse), dP = dO v^T, delta = rowsum(dO out) - dlse and dS = P (dP - delta):
dq = s dS k, dk = s dS^T q, dv = P^T dO.

Union kernel: the forward's tiles of 16 tokens x 8 heads and their key lists (built again, so nothing is kept between
the passes). A step gathers BLOCK_N rows of K and V once for all five products; dq stays in registers, the step's dk and
dv rows go to float32 buffers by atomic additions: 1 KB a listed key and KV head, rho / 16 of what a kernel by token
adds. Gather kernel: the same by token, for tiles whose list overflowed. Bound by the atomics and the five products.

Deterministic form: the same kernels without the atomics give dq; dk and dv come from one program per (64 keys, KV
head) that walks the tokens of the sequence in order, TOKENS at a time, with the selection as a bitmap [token, key]
(chunks of BITMAP_BYTES). It skips steps without a common key, so it costs at most the dense backward.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import LOG2_E, mma
from . import triton as forward
from .triton import needs_int64, tile_rows, tile_shape
from .triton_union import BLOCK_T, TILE_FIELDS, can_overflow, load_tile, map_tiles, union_chunks

BLOCK_N = 64
NUM_WARPS = 8
NUM_STAGES = 2
GATHER_BLOCK_N = 64
GATHER_WARPS = 4
GATHER_STAGES = 2
KEYS = 64  # keys a program of the deterministic kernel owns
TOKENS = 8  # its query tokens a step
OWNER_WARPS = 8
BITMAP_BYTES = 64_000_000
IDS = 1024  # ids a program of the bitmap kernel sets


@triton.jit
def delta_kernel(dout, out, dlse, delta, stride_dt, stride_dh, stride_ot, stride_oh, rows, num_heads,
                 HAS_DLSE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    token, head = row // num_heads, row % num_heads
    inside = (row < rows)[:, None]
    grad = tl.load(dout + (token * stride_dt + head * stride_dh)[:, None] + d[None, :], mask=inside, other=0.0)  # fmt: skip
    value = tl.load(out + (token * stride_ot + head * stride_oh)[:, None] + d[None, :], mask=inside, other=0.0)  # fmt: skip
    result = tl.sum(grad.to(tl.float32) * value.to(tl.float32), 1)
    if HAS_DLSE:
        result -= tl.load(dlse + row, mask=row < rows, other=0.0)
    tl.store(delta + row, result, mask=row < rows)


@triton.jit
def load_query_rows(q, dout, lse, delta, token, head, inside, stride_qt, stride_qh, stride_dt, stride_dh, num_heads,
                    D: tl.constexpr):  # fmt: skip
    d = tl.arange(0, D)[None, :]
    queries = tl.load(q + (token * stride_qt + head * stride_qh)[:, None] + d, mask=inside[:, None], other=0.0)  # fmt: skip
    grad = tl.load(dout + (token * stride_dt + head * stride_dh)[:, None] + d, mask=inside[:, None], other=0.0)  # fmt: skip
    row = token * num_heads + head
    row_lse = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
    return queries, grad, row_lse, tl.load(delta + row, mask=inside, other=0.0)


@triton.jit
def step_gradients(
    queries, grad, row_lse, row_delta, k_rows, v_rows, chosen, scale_log2, PRECISION: tl.constexpr
):
    """P and dS of one step, rows x keys; 0 where not chosen, whatever the row holds."""
    scores = mma(queries, tl.trans(k_rows), None, PRECISION)
    weights = tl.where(chosen, tl.exp2(scores * scale_log2 - row_lse[:, None]), 0.0)
    dweights = mma(grad, tl.trans(v_rows), None, PRECISION)
    return weights, tl.where(chosen, weights * (dweights - row_delta[:, None]), 0.0)


@triton.jit
def sparse_attention_bwd_kernel(dout, q, k, v, lse, delta, dq, dk, dv, tiles, keys, masks, counts, stride_dt, stride_dh,
                                stride_qt, stride_qh, stride_kl, stride_kg, stride_vl, stride_vg, num_heads, num_groups,
                                group, capacity, scale, scale_log2, ADD: tl.constexpr, WIDE: tl.constexpr,
                                D: tl.constexpr, BLOCK_T: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
                                PRECISION: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    count = tl.load(counts + tile)
    first, tokens, first_key, _ = load_tile(tiles, tile)
    if (count > capacity) | (tokens == 0):
        return
    t, token, head, inside, g = tile_rows(first, tokens, tl.program_id(1), group, BLOCK_T, HEADS)
    bit = 1 << t
    d = tl.arange(0, D)
    queries, grad, row_lse, row_delta = load_query_rows(q, dout, lse, delta, token, head, inside, stride_qt, stride_qh,
                                                        stride_dt, stride_dh, num_heads, D)  # fmt: skip
    k += first_key.to(tl.int64) * stride_kl + g * stride_kg
    v += first_key.to(tl.int64) * stride_vl + g * stride_vg
    start_kv = (first_key.to(tl.int64) * num_groups + g) * D
    keys += tile.to(tl.int64) * capacity
    masks += tile.to(tl.int64) * capacity

    dq_sums = tl.zeros([BLOCK_T * HEADS, D], tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = tl.load(keys + n)
        mask = tl.load(masks + n)
        if WIDE:
            key = key.to(tl.int64)
        k_rows = tl.load(k + (key * stride_kl)[:, None] + d[None, :])
        v_rows = tl.load(v + (key * stride_vl)[:, None] + d[None, :])
        chosen = (mask[None, :] & bit[:, None]) != 0
        weights, dscores = step_gradients(queries, grad, row_lse, row_delta, k_rows, v_rows, chosen, scale_log2, PRECISION)  # fmt: skip
        dscores = dscores.to(k_rows.dtype)
        dq_sums = mma(dscores, k_rows, dq_sums, PRECISION)
        if ADD:
            offset = start_kv + (key.to(tl.int64) * num_groups * D)[:, None] + d[None, :]
            listed = (mask != 0)[:, None]
            dv_rows = mma(tl.trans(weights.to(v_rows.dtype)), grad, None, PRECISION)
            tl.atomic_add(dv + offset, dv_rows, mask=listed, sem="relaxed")
            dk_rows = mma(tl.trans(dscores), queries, None, PRECISION)
            tl.atomic_add(dk + offset, dk_rows * scale, mask=listed, sem="relaxed")
    row = token * num_heads + head
    tl.store(dq + row[:, None] * D + d[None, :], (dq_sums * scale).to(dq.dtype.element_ty), mask=inside[:, None])  # fmt: skip


@triton.jit
def sparse_attention_gather_bwd_kernel(dout, q, k, v, lse, delta, dq, dk, dv, indices, tiles, counts, stride_dt,
                                       stride_dh, stride_qt, stride_qh, stride_kl, stride_kg, stride_vl, stride_vg,
                                       index_stride, topk, num_heads, num_groups, group, capacity, scale, scale_log2,
                                       ADD: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr,
                                       HEADS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0) // BLOCK_T
    i = tl.program_id(0) % BLOCK_T
    first, tokens, first_key, length = load_tile(tiles, tile)
    if (tl.load(counts + tile) <= capacity) | (i >= tokens):
        return
    _, token, head, inside, g = tile_rows(first + i, 1, tl.program_id(1), group, 1, HEADS)
    d = tl.arange(0, D)
    queries, grad, row_lse, row_delta = load_query_rows(q, dout, lse, delta, token, head, inside, stride_qt, stride_qh,
                                                        stride_dt, stride_dh, num_heads, D)  # fmt: skip
    k += first_key.to(tl.int64) * stride_kl + g * stride_kg
    v += first_key.to(tl.int64) * stride_vl + g * stride_vg
    start_kv = (first_key.to(tl.int64) * num_groups + g) * D
    ids = indices + (first + i).to(tl.int64) * index_stride
    dq_sums = tl.zeros([HEADS, D], tl.float32)
    for start in range(0, topk, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        key = tl.load(ids + n, mask=n < topk, other=-1)
        previous = tl.load(ids + n - 1, mask=(n > 0) & (n < topk), other=-1)
        valid = (key >= 0) & (key < length) & (key != previous)
        if WIDE:
            key = key.to(tl.int64)
        k_rows = tl.load(k + (key * stride_kl)[:, None] + d[None, :], mask=valid[:, None], other=0.0)  # fmt: skip
        v_rows = tl.load(v + (key * stride_vl)[:, None] + d[None, :], mask=valid[:, None], other=0.0)  # fmt: skip
        chosen = valid[None, :] & inside[:, None]
        weights, dscores = step_gradients(queries, grad, row_lse, row_delta, k_rows, v_rows, chosen, scale_log2, PRECISION)  # fmt: skip
        dscores = dscores.to(k_rows.dtype)
        dq_sums = mma(dscores, k_rows, dq_sums, PRECISION)
        if ADD:
            offset = start_kv + (key.to(tl.int64) * num_groups * D)[:, None] + d[None, :]
            dv_rows = mma(tl.trans(weights.to(v_rows.dtype)), grad, None, PRECISION)
            tl.atomic_add(dv + offset, dv_rows, mask=valid[:, None], sem="relaxed")
            dk_rows = mma(tl.trans(dscores), queries, None, PRECISION)
            tl.atomic_add(dk + offset, dk_rows * scale, mask=valid[:, None], sem="relaxed")
    row = token * num_heads + head
    tl.store(dq + row[:, None] * D + d[None, :], (dq_sums * scale).to(dq.dtype.element_ty), mask=inside[:, None])  # fmt: skip


@triton.jit
def set_bits_kernel(indices, tiles, bitmap, first_tile, num_tiles, start, stop, topk, index_stride, num_words,
                    BLOCK_T: tl.constexpr, IDS: tl.constexpr):  # fmt: skip
    """Bit `key` of row token - start of the bitmap, for the tokens in [start, stop)."""
    tile = first_tile + tl.program_id(0)
    if tile >= num_tiles:
        return
    first, tokens, _, length = load_tile(tiles, tile)
    n = tl.program_id(1) * IDS + tl.arange(0, IDS)
    for i in range(tokens):
        token = first + i
        if (token >= start) & (token < stop):
            key = tl.load(indices + token.to(tl.int64) * index_stride + n, mask=n < topk, other=-1)
            words = bitmap + (token - start).to(tl.int64) * num_words
            valid = (key >= 0) & (key < length)
            tl.atomic_or(words + (key >> 5), 1 << (key & 31), mask=valid, sem="relaxed")


@triton.jit
def sparse_attention_bwd_owner_kernel(dout, q, k, v, lse, delta, dk, dv, key_tiles, bitmap, start, stop, stride_dt,
                                      stride_dh, stride_qt, stride_qh, stride_kl, stride_kg, stride_vl, stride_vg,
                                      num_heads, num_groups, group, num_words, scale, scale_log2, D: tl.constexpr,
                                      KEYS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
                                      PRECISION: tl.constexpr):  # fmt: skip
    """Adds to dk and dv what the tokens in [start, stop) give to the program's keys, in the order of the tokens."""
    first_key, num_keys, first_token, num_tokens = load_tile(key_tiles, tl.program_id(0))
    begin = tl.maximum(first_token, start)
    end = tl.minimum(first_token + num_tokens, stop)
    if (num_keys == 0) | (begin >= end):
        return
    n = tl.arange(0, KEYS)
    local = tl.load(key_tiles + tl.program_id(0) * TILE_FIELDS + 4) + n  # whole bitmap words
    d = tl.arange(0, D)
    g = tl.program_id(1).to(tl.int64)
    row = (first_key + n).to(tl.int64)
    owned = (n < num_keys)[:, None]
    k_rows = tl.load(k + (row * stride_kl + g * stride_kg)[:, None] + d[None, :], mask=owned, other=0.0)  # fmt: skip
    v_rows = tl.load(v + (row * stride_vl + g * stride_vg)[:, None] + d[None, :], mask=owned, other=0.0)  # fmt: skip
    dk_sums = tl.zeros([KEYS, D], tl.float32)
    dv_sums = tl.zeros([KEYS, D], tl.float32)
    blocks = tl.cdiv(group, HEADS)
    word = tl.max(local, 0) // 32 - (KEYS // 32 - 1) + tl.arange(0, KEYS // 32)
    for t0 in range(begin, end, TOKENS):
        step = t0 + tl.arange(0, TOKENS)
        words = tl.load(bitmap + (step - start).to(tl.int64)[:, None] * num_words + word[None, :], mask=(step < end)[:, None], other=0)  # fmt: skip
        if tl.sum(tl.sum((words != 0).to(tl.int32), 1), 0) > 0:
            for block in range(blocks):
                _, token, head, inside, _ = tile_rows(t0, tl.minimum(end - t0, TOKENS), tl.program_id(1) * blocks + block,
                                                      group, TOKENS, HEADS)  # fmt: skip
                queries, grad, row_lse, row_delta = load_query_rows(q, dout, lse, delta, token, head, inside, stride_qt,
                                                                    stride_qh, stride_dt, stride_dh, num_heads, D)  # fmt: skip
                bits = tl.load(bitmap + ((token - start) * num_words)[:, None] + (local // 32)[None, :], mask=inside[:, None], other=0)  # fmt: skip
                chosen = ((bits >> (local % 32)[None, :]) & 1) == 1
                weights, dscores = step_gradients(queries, grad, row_lse, row_delta, k_rows, v_rows, chosen, scale_log2, PRECISION)  # fmt: skip
                dv_sums = mma(tl.trans(weights.to(grad.dtype)), grad, dv_sums, PRECISION)
                dk_sums = mma(tl.trans(dscores.to(queries.dtype)), queries, dk_sums, PRECISION)
    offset = ((row * num_groups + g) * D)[:, None] + d[None, :]
    tl.store(dk + offset, tl.load(dk + offset, mask=owned, other=0.0) + dk_sums * scale, mask=owned)
    tl.store(dv + offset, tl.load(dv + offset, mask=owned, other=0.0) + dv_sums, mask=owned)


def owner_shape(group, dtype):
    """(keys, tokens a step, heads a step) of the deterministic kernel; float32 runs on the CUDA cores."""
    heads = triton.next_power_of_2(group)
    if dtype == torch.float32:
        return 32, max(16 // min(heads, 2), TOKENS), min(heads, 2)
    return KEYS, max(16 // min(heads, 8), TOKENS), min(heads, 8)


def add_in_order(dout, q, k, v, lse, delta, dk, dv, indices, cu_seqlens_q, cu_seqlens_k, scale):
    """dk and dv of the deterministic form."""
    num_tokens, num_heads, dim = q.shape
    num_keys, num_groups = k.shape[:2]
    group, topk = num_heads // num_groups, indices.shape[1]
    block, step, heads = owner_shape(group, q.dtype)
    tiles = map_tiles(cu_seqlens_q, cu_seqlens_k, num_tokens, num_keys)
    key_tiles = map_tiles(cu_seqlens_k, cu_seqlens_q, num_keys, num_tokens, block)
    num_words = triton.cdiv(num_keys, KEYS) * (KEYS // 32)
    chunk = min(max(BITMAP_BYTES // (num_words * 4), 1), num_tokens)
    bitmap = torch.empty((chunk, num_words), dtype=torch.int32, device=q.device)
    precision = tile_shape(group, q.dtype)[2]
    for start in range(0, num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        bitmap.zero_()
        # Token x is in one of the tiles x // BLOCK_T to x // BLOCK_T + S + 1.
        grid = (triton.cdiv(chunk, BLOCK_T) + cu_seqlens_q.shape[0] + 1, triton.cdiv(topk, IDS))
        set_bits_kernel[grid](
            indices, tiles, bitmap, start // BLOCK_T, tiles.shape[0], start, stop, topk, indices.stride(0), num_words,
            BLOCK_T=BLOCK_T, IDS=IDS, num_warps=4,
        )  # fmt: skip
        sparse_attention_bwd_owner_kernel[(key_tiles.shape[0], num_groups)](
            dout, q, k, v, lse, delta, dk, dv, key_tiles, bitmap, start, stop, *dout.stride()[:2], *q.stride()[:2],
            *k.stride()[:2], *v.stride()[:2], num_heads, num_groups, group, num_words, scale, scale * LOG2_E.value,
            D=dim, KEYS=block, TOKENS=step, HEADS=heads, PRECISION=precision, num_warps=OWNER_WARPS, num_stages=1,
        )  # fmt: skip


def sparse_attention_bwd(
    dout, dlse, q, k, v, out, lse, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic
):
    num_tokens, num_heads, dim = q.shape
    num_keys, num_groups = k.shape[:2]
    group, topk = num_heads // num_groups, indices.shape[1]
    dq = torch.zeros((num_tokens, num_heads, dim), dtype=q.dtype, device=q.device)
    dk = torch.zeros((num_keys, num_groups, dim), dtype=torch.float32, device=q.device)
    dv = torch.zeros_like(dk)
    if q.numel() == 0 or k.numel() == 0 or topk == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    delta = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q.device)
    delta_kernel[(triton.cdiv(num_tokens * num_heads, 16),)](
        dout, out, dlse, delta, *dout.stride()[:2], *out.stride()[:2], num_tokens * num_heads, num_heads,
        HAS_DLSE=dlse is not None, D=dim, ROWS=16, num_warps=4,
    )  # fmt: skip
    heads, block_n, precision = tile_shape(group, q.dtype)
    block_n = min(block_n, BLOCK_N)
    strides = (*dout.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    scales = (softmax_scale, softmax_scale * LOG2_E.value)
    for tiles, keys, masks, counts in union_chunks(indices, cu_seqlens_q, cu_seqlens_k, num_keys):
        capacity = -1 if forward.FORCE_GATHER else keys.shape[1]
        if capacity > 0:
            sparse_attention_bwd_kernel[(tiles.shape[0], num_groups * triton.cdiv(group, heads))](
                dout, q, k, v, lse, delta, dq, dk, dv, tiles, keys, masks, counts, *strides, num_heads, num_groups,
                group, capacity, *scales, ADD=not deterministic, WIDE=needs_int64(k, v), D=dim, BLOCK_T=BLOCK_T,
                HEADS=heads, BLOCK_N=block_n, PRECISION=precision, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
            )  # fmt: skip
        if forward.FORCE_GATHER or can_overflow(topk, num_keys):
            grid = (tiles.shape[0] * BLOCK_T, num_groups * triton.cdiv(group, 16))
            sparse_attention_gather_bwd_kernel[grid](
                dout, q, k, v, lse, delta, dq, dk, dv, indices, tiles, counts, *strides, indices.stride(0), topk,
                num_heads, num_groups, group, capacity, *scales, ADD=not deterministic, WIDE=needs_int64(k, v), D=dim,
                BLOCK_T=BLOCK_T, HEADS=16, BLOCK_N=GATHER_BLOCK_N, PRECISION=precision, num_warps=GATHER_WARPS,
                num_stages=GATHER_STAGES,
            )  # fmt: skip
    if deterministic:
        add_in_order(dout, q, k, v, lse, delta, dk, dv, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale)  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)
