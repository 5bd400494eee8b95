"""sparse_attention forward in TileLang for Hopper: 16 query tokens x the heads of a KV group share every row they need.

One block of 256 threads per (tile of 16 tokens, KV head): two warpgroups of 64 (token, head) rows each for a group of 8.
It walks the tile's ascending key list (triton_union.py), 64 keys a step: K and V rows come by cp.async, the next step's
while this one computes; S = q K^T on wgmma; bit t of a key's mask decides the rows of token t; online softmax in base 2;
P V on wgmma with P from registers. Tiles whose list overflowed are served by triton.py's gather kernel.

Shared memory 65 KB (q 32, K 16, V 16), 155 registers a thread, no spills (nvcc 13.0, head dim 128).
"""

import functools

import tilelang
import torch
from tilelang import language as T

from ..triton_math import LOG2_E
from .triton import gather_overflowed
from .triton_union import BLOCK_T, can_overflow, list_capacity, union_chunks

BLOCK_N = 64
NUM_STAGES = 1  # one step ahead; TileLang 0.1.15 cannot pipeline a loop of run-time length deeper
THREADS = 256
LN_2 = 0.6931471805599453


def forward_program(heads, groups, dim, capacity):
    """The TileLang program for one set of sizes known at compile time."""
    group = heads // groups
    rows = BLOCK_T * group
    num_tokens, num_keys, num_tiles = T.dynamic("tokens"), T.dynamic("keys"), T.dynamic("tiles")

    @T.prim_func
    def sparse_attention_fwd_kernel(
        q: T.Tensor([num_tokens, heads, dim], "bfloat16"),
        k: T.Tensor([num_keys, groups, dim], "bfloat16"),
        v: T.Tensor([num_keys, groups, dim], "bfloat16"),
        tiles: T.Tensor([num_tiles, 5], "int32"),
        keys: T.Tensor([num_tiles, capacity], "int32"),
        masks: T.Tensor([num_tiles, capacity], "int32"),
        counts: T.Tensor([num_tiles], "int32"),
        scale_log2: T.float32,
        out: T.Tensor([num_tokens, heads, dim], "bfloat16"),
        lse: T.Tensor([num_tokens, heads], "float32"),
    ):
        with T.Kernel(num_tiles, groups, threads=THREADS) as (b, g):
            q_shared = T.alloc_shared([rows, dim], "bfloat16")
            k_shared = T.alloc_shared([BLOCK_N, dim], "bfloat16")
            v_shared = T.alloc_shared([BLOCK_N, dim], "bfloat16")
            mask = T.alloc_shared([BLOCK_N], "int32")
            scores = T.alloc_fragment([rows, BLOCK_N], "float32")
            weights = T.alloc_fragment([rows, BLOCK_N], "bfloat16")
            sums = T.alloc_fragment([rows, dim], "float32")
            top = T.alloc_fragment([rows], "float32")
            old_top = T.alloc_fragment([rows], "float32")
            factor = T.alloc_fragment([rows], "float32")
            total = T.alloc_fragment([rows], "float32")
            step_total = T.alloc_fragment([rows], "float32")
            first, tokens, first_key = tiles[b, 0], tiles[b, 1], tiles[b, 2]
            count = T.if_then_else(counts[b] <= capacity, counts[b], 0)

            for r, d in T.Parallel(rows, dim):
                q_shared[r, d] = T.if_then_else(
                    r // group < tokens,
                    q[first + r // group, g * group + r % group, d],
                    T.cast(0, "bfloat16"),
                )
            T.fill(sums, 0)
            T.fill(total, 0)
            T.fill(
                top, -1e30
            )  # finite: a row whose first keys are all masked gives exp2(-inf) = 0, not NaN
            for n in T.Pipelined(T.ceildiv(count, BLOCK_N), num_stages=NUM_STAGES):
                for i in T.Parallel(BLOCK_N):
                    mask[i] = T.if_then_else(n * BLOCK_N + i < count, masks[b, n * BLOCK_N + i], 0)
                for i, d in T.Parallel(BLOCK_N, dim):
                    entry = T.min(n * BLOCK_N + i, count - 1)
                    k_shared[i, d] = k[first_key + keys[b, entry], g, d]
                for i, d in T.Parallel(BLOCK_N, dim):
                    entry = T.min(n * BLOCK_N + i, count - 1)
                    v_shared[i, d] = v[first_key + keys[b, entry], g, d]
                T.clear(scores)
                T.gemm(
                    q_shared, k_shared, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullRow
                )
                for r, i in T.Parallel(rows, BLOCK_N):
                    scores[r, i] = T.if_then_else(
                        (mask[i] >> (r // group)) & 1 == 1, scores[r, i], -T.infinity("float32")
                    )
                T.copy(top, old_top)
                T.reduce_max(scores, top, dim=1, clear=True)
                for r in T.Parallel(rows):
                    top[r] = T.max(old_top[r], top[r] * scale_log2)
                for r in T.Parallel(rows):
                    factor[r] = T.exp2(old_top[r] - top[r])
                for r, i in T.Parallel(rows, BLOCK_N):
                    scores[r, i] = T.exp2(scores[r, i] * scale_log2 - top[r])
                T.reduce_sum(scores, step_total, dim=1)
                for r in T.Parallel(rows):
                    total[r] = total[r] * factor[r] + step_total[r]
                for r, d in T.Parallel(rows, dim):
                    sums[r, d] *= factor[r]
                T.copy(scores, weights)
                T.gemm(weights, v_shared, sums, policy=T.GemmWarpPolicy.FullRow)

            if counts[b] <= capacity:
                for r, d in T.Parallel(rows, dim):
                    if r // group < tokens:
                        out[first + r // group, g * group + r % group, d] = T.if_then_else(
                            total[r] == 0, 0, sums[r, d] / total[r]
                        )
                for r in T.Parallel(rows):
                    if r // group < tokens:
                        lse[first + r // group, g * group + r % group] = T.if_then_else(
                            total[r] == 0,
                            -T.infinity("float32"),
                            (top[r] + T.log2(total[r])) * LN_2,
                        )

    return sparse_attention_fwd_kernel


@functools.cache
def compiled(heads, groups, dim, capacity):
    """The compiled kernel; needs no GPU. The first call takes seconds, TileLang keeps the result on disk."""
    return tilelang.compile(
        forward_program(heads, groups, dim, capacity),
        target={"kind": "cuda", "arch": "sm_90a"},
        pass_configs={
            tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
            tilelang.PassConfigKey.TL_DISABLE_TMA_LOWER: True,
            tilelang.PassConfigKey.TL_DISABLE_WARP_SPECIALIZED: True,
        },
    )


def sparse_attention(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic):
    num_tokens, num_heads, dim = q.shape
    num_keys, num_groups = k.shape[:2]
    topk = indices.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if num_keys == 0 or topk == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    kernel = compiled(num_heads, num_groups, dim, list_capacity(topk, num_keys))
    for tiles, keys, masks, counts in union_chunks(indices, cu_seqlens_q, cu_seqlens_k, num_keys):
        kernel(q, k, v, tiles, keys, masks, counts, softmax_scale * LOG2_E.value, out, lse)
        if can_overflow(topk, num_keys):
            gather_overflowed(
                q, k, v, out, lse, indices, tiles, counts, keys.shape[1], softmax_scale
            )
    return out, lse
