"""varlen_attention in Triton: FlashAttention-2 over packed sequences.

One program owns BLOCK_M queries of one head and walks the keys in blocks of BLOCK_N with an online softmax in base 2:
first the blocks that all its rows see, without a mask, then the few at the diagonal or the end of the sequence. A head
dim of 72 is split into 64 + 16 columns (8 of them masked), not padded to 128.

The grid needs no longest sequence: each program finds its tile (triton_sequences.py), and surplus tiles exit. Heads run
fastest, so the programs of a KV group share its keys in L2; heavy causal tiles start first.

Bound by the tensor cores and, at D = 72, as much by exp2.
"""

import torch
import triton
import triton.language as tl

from ..dispatch import is_hopper
from ..triton_math import LN_2, LOG2_E, mma
from ..triton_sequences import boundary_block, find_tile, most_tiles

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by head dim
TILES_HOPPER = {64: (128, 128, 8, 3), 72: (128, 64, 8, 3), 128: (128, 64, 8, 3)}
TILES = {64: (64, 64, 4, 2), 72: (64, 64, 4, 2), 128: (64, 64, 4, 2)}
TILES_FP32 = {64: (16, 32, 4, 1), 72: (16, 32, 4, 1), 128: (16, 32, 4, 1)}


@triton.jit
def load_rows(base, STRIDE: tl.constexpr, row, limit, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
              ROWS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Columns [FROM, FROM + WIDTH) of the rows row + [0, ROWS); 0 from row `limit` (if MASKED) and from column D."""
    r = tl.arange(0, ROWS)[:, None]
    d = FROM + tl.arange(0, WIDTH)[None, :]
    pointers = base + tl.cast(row, tl.int64) * STRIDE + (r * STRIDE + d)
    if FROM + WIDTH > D and MASKED:
        return tl.load(pointers, mask=(row + r < limit) & (d < D), other=0.0)
    elif FROM + WIDTH > D:
        return tl.load(pointers, mask=d < D, other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=row + r < limit, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, STRIDE: tl.constexpr, row, limit, x, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    r = tl.arange(0, ROWS)[:, None]
    d = FROM + tl.arange(0, WIDTH)[None, :]
    pointers = base + tl.cast(row, tl.int64) * STRIDE + (r * STRIDE + d)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(row + r < limit) & (d < D))


@triton.jit
def attend(acc, acc_hi, highest, total, q, q_hi, k, v, begin, end, keys, visible, scale_log2,
           K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, D: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The online softmax over the keys [begin, end); row r sees the keys below visible[r]."""
    for n in tl.range(begin, end, BLOCK_N):
        k_lo = load_rows(k, K_STRIDE, n, keys, D, 0, LO, BLOCK_N, MASKED)
        s = mma(q, k_lo.T)
        if HI > 0:
            k_hi = load_rows(k, K_STRIDE, n, keys, D, LO, HI, BLOCK_N, MASKED)
            s = mma(q_hi, k_hi.T, s)
        if MASKED:
            column = n + tl.arange(0, BLOCK_N)
            s = tl.where(column[None, :] < visible[:, None], s, -float("inf"))
        now = tl.maximum(highest, tl.max(s, 1) * scale_log2)
        shift = now
        if MASKED:
            shift = tl.where(now == -float("inf"), 0.0, now)
        p = tl.exp2(s * scale_log2 - shift[:, None])
        alpha = tl.exp2(highest - shift)
        total = total * alpha + tl.sum(p, 1)
        highest = now
        p = p.to(q.dtype)
        v_lo = load_rows(v, V_STRIDE, n, keys, D, 0, LO, BLOCK_N, MASKED)
        acc = mma(p, v_lo, acc * alpha[:, None])
        if HI > 0:
            v_hi = load_rows(v, V_STRIDE, n, keys, D, LO, HI, BLOCK_N, MASKED)
            acc_hi = mma(p, v_hi, acc_hi * alpha[:, None])
    return acc, acc_hi, highest, total


@triton.jit
def varlen_attention_fwd_kernel(q, k, v, out, lse, cu_q, cu_k, num_seqs, T, L,
                                num_tiles, scale_log2, Q_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
                                LO: tl.constexpr, HI: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                SEQS: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    head = tl.program_id(0) % H
    tile = num_tiles - 1 - tl.program_id(0) // H
    row, begin_q, end_q, begin_k, end_k = find_tile(cu_q, cu_k, num_seqs, T, L, tile, BLOCK_M, SEQS)
    if row >= end_q:
        return
    keys = end_k - begin_k
    q_base = q + head * D
    k_base = k + begin_k.to(tl.int64) * K_STRIDE + head // GROUP * D
    v_base = v + begin_k.to(tl.int64) * V_STRIDE + head // GROUP * D
    q_lo = load_rows(q_base, Q_STRIDE, row, end_q, D, 0, LO, BLOCK_M, True)
    q_hi = q_lo
    acc_hi = tl.zeros([BLOCK_M, 16], tl.float32)
    if HI > 0:
        q_hi = load_rows(q_base, Q_STRIDE, row, end_q, D, LO, HI, BLOCK_M, True)

    position = row - begin_q + tl.arange(0, BLOCK_M)
    visible = tl.zeros([BLOCK_M], tl.int32) + keys
    end = keys
    full = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        offset = keys - (end_q - begin_q)
        visible = tl.minimum(position + offset + 1, keys)
        end = tl.minimum(tl.maximum(row - begin_q + BLOCK_M + offset, 0), keys)
        full = tl.minimum(tl.maximum(row - begin_q + offset + 1, 0), keys) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, LO], tl.float32)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, acc_hi, highest, total = attend(
        acc, acc_hi, highest, total, q_lo, q_hi, k_base, v_base, 0, full, keys, visible,
        scale_log2, K_STRIDE, V_STRIDE, D, LO, HI, BLOCK_N, False,
    )  # fmt: skip
    acc, acc_hi, highest, total = attend(
        acc, acc_hi, highest, total, q_lo, q_hi, k_base, v_base, full, end, keys, visible,
        scale_log2, K_STRIDE, V_STRIDE, D, LO, HI, BLOCK_N, True,
    )  # fmt: skip

    seen = total != 0.0
    factor = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    out_base = out + head * D
    store_rows(out_base, H * D, row, end_q, acc * factor[:, None], D, 0, LO, BLOCK_M)
    if HI > 0:
        store_rows(out_base, H * D, row, end_q, acc_hi * factor[:, None], D, LO, HI, BLOCK_M)
    row_lse = tl.where(seen, highest * LN_2 + tl.log(tl.where(seen, total, 1.0)), -float("inf"))
    rows = row + tl.arange(0, BLOCK_M)
    tl.store(lse + rows.to(tl.int64) * H + head, row_lse, mask=rows < end_q)


def columns(dim: int) -> dict[str, int]:
    """How the head dim is split: LO columns, a power of two, and HI more."""
    return {"D": dim, "LO": 64 if dim == 72 else dim, "HI": 16 if dim == 72 else 0}


def tiles_for(x: torch.Tensor, hopper: dict, portable: dict, fp32: dict) -> tuple[int, ...]:
    if x.device.type != "cuda":
        return portable[x.shape[-1]]  # the interpreter: few large blocks
    if x.dtype == torch.float32:
        return fp32[x.shape[-1]]
    return (hopper if is_hopper(x.device.index or 0) else portable)[x.shape[-1]]


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, deterministic):
    (T, H, D), (L, G, _), num_seqs = q.shape, k.shape, cu_seqlens_q.shape[0] - 1
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((T, H), dtype=torch.float32, device=q.device)
    if T == 0:
        return out, lse
    block_m, block_n, num_warps, num_stages = tiles_for(q, TILES_HOPPER, TILES, TILES_FP32)
    tiles = most_tiles(T, num_seqs, block_m)
    varlen_attention_fwd_kernel[(tiles * H,)](
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, num_seqs, T, L, tiles,
        softmax_scale * LOG2_E.value, Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0), V_STRIDE=v.stride(0), H=H, GROUP=H // G, **columns(D), BLOCK_M=block_m, BLOCK_N=block_n,
        SEQS=boundary_block(num_seqs), CAUSAL=causal, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse
