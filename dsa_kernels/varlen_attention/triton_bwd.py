"""varlen_attention_bwd in Triton: three kernels, no atomics, the same bits on every run.

1. rows: delta = sum(out * dout) - dlse and lse in base 2, both as [H, T] (contiguous along the rows of a tile).
2. dq: tiles of queries as in the forward; per key block S = Q K^T, dP = dO V^T, dS = P (dP - delta), dQ += dS K.
3. dk, dv: tiles of keys; one program walks the queries of all heads of its group in a single flat loop, so that the
   loads of the next head are in flight while the last block of this one is computed. Everything transposed: S^T = K Q^T,
   dV += P^T dO, dP^T = V dO^T, dK += dS^T Q.

Seven products where a backward with atomic dq needs five: the price of determinism here. Keys and queries outside all
sequences have tiles of their own (triton_sequences.py) and get 0.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import LOG2_E, mma
from ..triton_sequences import boundary_block, find_tile, most_tiles
from .triton import columns, load_rows, store_rows, tiles_for

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by head dim; M queries, N keys
DQ_HOPPER = {64: (128, 64, 8, 3), 72: (128, 64, 8, 2), 128: (128, 64, 8, 2)}
DQ = {64: (64, 32, 4, 2), 72: (64, 32, 4, 2), 128: (64, 32, 4, 2)}
DKV_HOPPER = {64: (64, 128, 8, 3), 72: (64, 128, 8, 2), 128: (64, 128, 8, 2)}
DKV = {64: (32, 64, 4, 2), 72: (16, 64, 4, 2), 128: (32, 64, 8, 2)}
FP32 = {64: (16, 16, 4, 1), 72: (16, 16, 4, 1), 128: (16, 16, 4, 1)}
ROWS = 64  # rows of a program of the first kernel


@triton.jit
def varlen_attention_bwd_rows_kernel(dout, dlse, out, lse, row_lse, delta, T, H: tl.constexpr, D: tl.constexpr,
                                     D_PADDED: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head = tl.program_id(0) % H
    rows = tl.program_id(0) // H * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PADDED)
    inside = rows < T
    scalars = rows.to(tl.int64) * H + head
    offsets = scalars[:, None] * D + d[None, :]
    mask = inside[:, None] & (d[None, :] < D)
    product = tl.load(out + offsets, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(dout + offsets, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(product, 1)
    if HAS_DLSE:
        total -= tl.load(dlse + scalars, mask=inside, other=0.0)
    log2 = tl.load(lse + scalars, mask=inside, other=0.0) * LOG2_E
    log2 = tl.where(
        log2 == -float("inf"), float("inf"), log2
    )  # no visible key: p = exp2(s - inf) = 0
    to = tl.cast(head, tl.int64) * T + rows
    tl.store(row_lse + to, log2, mask=inside)
    tl.store(delta + to, total, mask=inside)


@triton.jit
def gather_dq(dq, dq_hi, q, q_hi, grad, grad_hi, row_lse, delta, k, v, begin, end, keys, visible,
              scale_log2, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, BLOCK_N: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Adds dS K over the keys [begin, end); row r sees the keys below visible[r]."""
    for n in tl.range(begin, end, BLOCK_N):
        k_lo = load_rows(k, K_STRIDE, n, keys, D, 0, LO, BLOCK_N, MASKED)
        v_lo = load_rows(v, V_STRIDE, n, keys, D, 0, LO, BLOCK_N, MASKED)
        s = mma(q, k_lo.T)
        dp = mma(grad, v_lo.T)
        if HI > 0:
            k_hi = load_rows(k, K_STRIDE, n, keys, D, LO, HI, BLOCK_N, MASKED)
            v_hi = load_rows(v, V_STRIDE, n, keys, D, LO, HI, BLOCK_N, MASKED)
            s = mma(q_hi, k_hi.T, s)
            dp = mma(grad_hi, v_hi.T, dp)
        p = tl.exp2(s * scale_log2 - row_lse[:, None])
        if MASKED:
            column = n + tl.arange(0, BLOCK_N)
            p = tl.where(column[None, :] < visible[:, None], p, 0.0)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = mma(ds, k_lo, dq)
        if HI > 0:
            dq_hi = mma(ds, k_hi, dq_hi)
    return dq, dq_hi


@triton.jit
def varlen_attention_bwd_dq_kernel(dout, row_lse, delta, q, k, v, dq_out, cu_q, cu_k,
                                   num_seqs, T, L, num_tiles, scale, scale_log2, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, H: tl.constexpr,
                                   GROUP: tl.constexpr, D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
                                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEQS: tl.constexpr,
                                   CAUSAL: tl.constexpr):  # fmt: skip
    head = tl.program_id(0) % H
    tile = num_tiles - 1 - tl.program_id(0) // H
    row, begin_q, end_q, begin_k, end_k = find_tile(cu_q, cu_k, num_seqs, T, L, tile, BLOCK_M, SEQS)
    if row >= end_q:
        return
    keys = end_k - begin_k
    k_base = k + begin_k.to(tl.int64) * K_STRIDE + head // GROUP * D
    v_base = v + begin_k.to(tl.int64) * V_STRIDE + head // GROUP * D
    q_lo = load_rows(q + head * D, Q_STRIDE, row, end_q, D, 0, LO, BLOCK_M, True)
    grad_lo = load_rows(dout + head * D, H * D, row, end_q, D, 0, LO, BLOCK_M, True)
    q_hi = q_lo
    grad_hi = grad_lo
    if HI > 0:
        q_hi = load_rows(q + head * D, Q_STRIDE, row, end_q, D, LO, HI, BLOCK_M, True)
        grad_hi = load_rows(dout + head * D, H * D, row, end_q, D, LO, HI, BLOCK_M, True)
    rows = row + tl.arange(0, BLOCK_M)
    scalars = tl.cast(head, tl.int64) * T + rows
    lse_of_row = tl.load(row_lse + scalars, mask=rows < end_q, other=float("inf"))
    delta_of_row = tl.load(delta + scalars, mask=rows < end_q, other=0.0)

    visible = tl.zeros([BLOCK_M], tl.int32) + keys
    end = keys
    full = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        offset = keys - (end_q - begin_q)
        visible = tl.minimum(rows - begin_q + offset + 1, keys)
        end = tl.minimum(tl.maximum(row - begin_q + BLOCK_M + offset, 0), keys)
        full = tl.minimum(tl.maximum(row - begin_q + offset + 1, 0), keys) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, LO], tl.float32)
    dq_hi = tl.zeros([BLOCK_M, 16], tl.float32)
    dq, dq_hi = gather_dq(
        dq, dq_hi, q_lo, q_hi, grad_lo, grad_hi, lse_of_row, delta_of_row, k_base, v_base, 0, full,
        keys, visible, scale_log2, K_STRIDE, V_STRIDE, D, LO, HI, BLOCK_N, False,
    )  # fmt: skip
    dq, dq_hi = gather_dq(
        dq, dq_hi, q_lo, q_hi, grad_lo, grad_hi, lse_of_row, delta_of_row, k_base, v_base, full,
        end, keys, visible, scale_log2, K_STRIDE, V_STRIDE, D, LO, HI, BLOCK_N, True,
    )  # fmt: skip
    store_rows(dq_out + head * D, H * D, row, end_q, dq * scale, D, 0, LO, BLOCK_M)
    if HI > 0:
        store_rows(dq_out + head * D, H * D, row, end_q, dq_hi * scale, D, LO, HI, BLOCK_M)


@triton.jit
def varlen_attention_bwd_dkv_kernel(dout, row_lse, delta, q, k, v, dk_out, dv_out, cu_q, cu_k,
                                    num_seqs, T, L, scale, scale_log2, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
                                    D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, BLOCK_M: tl.constexpr,
                                    BLOCK_N: tl.constexpr, SEQS: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = H // G
    kv_head = tl.program_id(0) % G
    tile = tl.program_id(0) // G
    key, _, end_k, begin_q, end_q = find_tile(cu_k, cu_q, num_seqs, L, T, tile, BLOCK_N, SEQS)
    if key >= end_k:
        return
    k_lo = load_rows(k + kv_head * D, K_STRIDE, key, end_k, D, 0, LO, BLOCK_N, True)
    v_lo = load_rows(v + kv_head * D, V_STRIDE, key, end_k, D, 0, LO, BLOCK_N, True)
    k_hi = k_lo
    v_hi = v_lo
    if HI > 0:
        k_hi = load_rows(k + kv_head * D, K_STRIDE, key, end_k, D, LO, HI, BLOCK_N, True)
        v_hi = load_rows(v + kv_head * D, V_STRIDE, key, end_k, D, LO, HI, BLOCK_N, True)

    first = begin_q  # the first query that sees a key of the tile
    sees = key + tl.arange(0, BLOCK_N)  # the first query that sees the key
    if CAUSAL:
        to_query = end_q - end_k  # key j is seen from the query j + to_query on
        first = tl.minimum(tl.maximum(key + to_query, begin_q), end_q)
        sees += to_query
    blocks = tl.cdiv(end_q - first, BLOCK_M)
    dk = tl.zeros([BLOCK_N, LO], tl.float32)
    dv = tl.zeros([BLOCK_N, LO], tl.float32)
    dk_hi = tl.zeros([BLOCK_N, 16], tl.float32)
    dv_hi = tl.zeros([BLOCK_N, 16], tl.float32)
    for i in tl.range(0, blocks * GROUP):
        head = kv_head * GROUP + i // blocks
        row = first + i % blocks * BLOCK_M
        q_base = q + head * D
        grad_base = dout + head * D
        rows = row + tl.arange(0, BLOCK_M)
        scalars = tl.cast(head, tl.int64) * T + rows
        q_lo = load_rows(q_base, Q_STRIDE, row, end_q, D, 0, LO, BLOCK_M, True)
        grad_lo = load_rows(grad_base, H * D, row, end_q, D, 0, LO, BLOCK_M, True)
        s = mma(k_lo, q_lo.T)
        if HI > 0:
            q_hi = load_rows(q_base, Q_STRIDE, row, end_q, D, LO, HI, BLOCK_M, True)
            grad_hi = load_rows(grad_base, H * D, row, end_q, D, LO, HI, BLOCK_M, True)
            s = mma(k_hi, q_hi.T, s)
        lse_of_row = tl.load(row_lse + scalars, mask=rows < end_q, other=float("inf"))
        p = tl.exp2(s * scale_log2 - lse_of_row[None, :])
        if CAUSAL:
            p = tl.where(sees[:, None] <= rows[None, :], p, 0.0)
        dv = mma(p.to(q_lo.dtype), grad_lo, dv)
        dp = mma(v_lo, grad_lo.T)
        if HI > 0:
            dv_hi = mma(p.to(q_lo.dtype), grad_hi, dv_hi)
            dp = mma(v_hi, grad_hi.T, dp)
        delta_of_row = tl.load(delta + scalars, mask=rows < end_q, other=0.0)
        ds = (p * (dp - delta_of_row[None, :])).to(q_lo.dtype)
        dk = mma(ds, q_lo, dk)
        if HI > 0:
            dk_hi = mma(ds, q_hi, dk_hi)
    store_rows(dk_out + kv_head * D, G * D, key, end_k, dk * scale, D, 0, LO, BLOCK_N)
    store_rows(dv_out + kv_head * D, G * D, key, end_k, dv, D, 0, LO, BLOCK_N)
    if HI > 0:
        store_rows(dk_out + kv_head * D, G * D, key, end_k, dk_hi * scale, D, LO, HI, BLOCK_N)
        store_rows(dv_out + kv_head * D, G * D, key, end_k, dv_hi, D, LO, HI, BLOCK_N)


def varlen_attention_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, deterministic
):
    (T, H, D), (L, G, _), num_seqs = q.shape, k.shape, cu_seqlens_q.shape[0] - 1
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    scalars = torch.empty((2, H, T), dtype=torch.float32, device=q.device)
    inputs = (dout, scalars[0], scalars[1], q, k, v)
    lengths = (cu_seqlens_q, cu_seqlens_k, num_seqs, T, L)
    constants = {
        "Q_STRIDE": q.stride(0), "K_STRIDE": k.stride(0), "V_STRIDE": v.stride(0), **columns(D), "SEQS": boundary_block(num_seqs), "CAUSAL": causal,
    }  # fmt: skip
    scale_log2 = softmax_scale * LOG2_E.value
    if T > 0:
        varlen_attention_bwd_rows_kernel[(triton.cdiv(T, ROWS) * H,)](
            dout, dlse, out, lse, scalars[0], scalars[1], T, H=H, D=D, D_PADDED=triton.next_power_of_2(D),
            HAS_DLSE=dlse is not None, BLOCK=ROWS, num_warps=4,
        )  # fmt: skip
        block_m, block_n, num_warps, num_stages = tiles_for(q, DQ_HOPPER, DQ, FP32)
        tiles = most_tiles(T, num_seqs, block_m)
        varlen_attention_bwd_dq_kernel[(tiles * H,)](
            *inputs, dq, *lengths, tiles, softmax_scale, scale_log2, H=H, GROUP=H // G, BLOCK_M=block_m,
            BLOCK_N=block_n, **constants, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if L > 0:
        block_m, block_n, num_warps, num_stages = tiles_for(q, DKV_HOPPER, DKV, FP32)
        varlen_attention_bwd_dkv_kernel[(most_tiles(L, num_seqs, block_n) * G,)](
            *inputs, dk, dv, *lengths, softmax_scale, scale_log2, H=H, G=G, BLOCK_M=block_m, BLOCK_N=block_n,
            **constants, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return dq, dk, dv
