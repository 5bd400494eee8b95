"""indexer_loss in Triton, backward: dI is recomputed block by block from the saved lse of I and sum of p.

Dense: as in the forward a program walks over key blocks for one tile of tokens. Once dI of a block stands in
registers, a second loop over the index heads takes each head's logits again and adds dI w [logits > 0] keys to d
index_q and its transpose times the queries to the block's d index_k. d index_q of a tile (Hi Di floats a token) does
not fit in registers; it is added in global memory, 256 KB that stay in L2 while the tile runs. Default: both
by atomics, so the key blocks can be split over programs. Deterministic: one program a tile adds d index_q
with plain loads and stores, and a second kernel, one program a key block, recomputes dI and keeps d index_k in registers.

Sparse: a program owns one token; d index_q and d weights stay in registers, d index_k goes out by atomics. Deterministic:
dI and the key row of each (token, entry) pair are written out, a stable sort of the rows inverts the selection, and one
program a key adds the pairs of its key in token order.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import LOG2_E, mma
from .triton import (
    CHUNK,
    add_group,
    find_tile,
    gathered_group,
    index_scores,
    load_rows,
    monotone,
    num_splits,
    padded,
    precision,
    selected_keys,
)

BLOCKS = {"bf16": (64, 64), "fp32": (32, 32)}  # one more tile in registers than the forward
SPARSE_BLOCK_S = {"bf16": 64, "fp32": 32}
NUM_WARPS, NUM_STAGES = 8, 2
SPARSE_NUM_WARPS, SPARSE_NUM_STAGES = 4, 1
BLOCK_P = 64  # pairs that the deterministic sparse kernel takes at a time
KEY_NUM_WARPS = 4


@triton.jit
def add_to(pointers, values, mask, DETERMINISTIC: tl.constexpr):
    if DETERMINISTIC:  # the only program that touches these addresses
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + values, mask=mask)
    else:
        tl.atomic_add(pointers, values, mask=mask, sem="relaxed")


@triton.jit
def score_gradients(
    index_q, weights, q, k, lse, dloss, index_lse, mass, t, inside, visible, index_keys, key_rows, stored,
    index_q_stride, index_q_head, weights_stride, q_stride, q_head, k_stride, k_head, lse_stride, scale_log2,
    HI: tl.constexpr, DI: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dI = dloss (mass softmax(I) - sum_g p) of the tokens t and one block of keys; 0 where not visible."""
    scores = index_scores(index_q, index_q_stride, index_q_head, weights, weights_stride, t, inside, index_keys, HI, DI)  # fmt: skip
    normaliser = tl.load(index_lse + t, mask=inside, other=0.0)
    softmax = tl.exp(scores - normaliser[:, None]) * tl.load(mass + t, mask=inside, other=0.0)[:, None]  # fmt: skip
    p = tl.zeros([t.shape[0], index_keys.shape[0]], tl.float32)
    for g in range(G):
        keys = load_rows(k + tl.cast(g, tl.int64) * k_head, key_rows, k_stride, stored, tl.arange(0, D))  # fmt: skip
        p = add_group(p, q, q_stride, q_head, lse, lse_stride, t, inside, keys, g * HEADS, scale_log2, HEADS, D)  # fmt: skip
    d_scores = tl.load(dloss + t, mask=inside, other=0.0)[:, None] * (softmax - p * (1.0 / HEADS))
    return tl.where(visible, d_scores, 0.0)


@triton.jit
def indexer_loss_dense_bwd_dq_kernel(
    index_q, index_k, weights, q, k, lse, dloss, index_lse, mass, offsets_q, offsets_k, d_index_q, d_index_k,
    d_weights, num_sequences, num_splits, index_q_stride, index_q_head, index_k_stride, weights_stride, q_stride,
    q_head, k_stride, k_head, lse_stride, scale_log2,
    HI: tl.constexpr, DI: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """d index_q and d weights of a tile of tokens; by default its part of d index_k, too."""
    sequence, first = find_tile(offsets_q, num_sequences, tl.program_id(0), BLOCK_T, CHUNK)
    if sequence < num_sequences:
        q_end = tl.load(offsets_q + sequence + 1)
        k_begin = tl.load(offsets_k + sequence)
        num_keys = tl.load(offsets_k + sequence + 1) - k_begin
        t = first + tl.arange(0, BLOCK_T)
        d = tl.arange(0, DI)
        inside = t < q_end
        limit = num_keys - (q_end - t) + 1  # keys that t sees
        last = tl.minimum(first + BLOCK_T, q_end) - 1
        blocks = tl.cdiv(tl.maximum(num_keys - (q_end - last) + 1, 0), BLOCK_S)
        share = tl.cdiv(blocks, num_splits)
        begin = tl.program_id(1) * share
        w_rows = weights + t.to(tl.int64) * weights_stride
        for block in range(begin, tl.minimum(begin + share, blocks)):
            s = block * BLOCK_S + tl.arange(0, BLOCK_S)
            stored = s < num_keys
            visible = (s[None, :] < limit[:, None]) & inside[:, None]
            rows = k_begin + s
            index_keys = load_rows(index_k, rows, index_k_stride, stored, d)
            d_scores = score_gradients(
                index_q, weights, q, k, lse, dloss, index_lse, mass, t, inside, visible, index_keys, rows, stored,
                index_q_stride, index_q_head, weights_stride, q_stride, q_head, k_stride, k_head, lse_stride,
                scale_log2, HI, DI, G, HEADS, D,
            )  # fmt: skip
            d_keys = tl.zeros([BLOCK_S, DI], tl.float32)
            for j in range(HI):
                query = load_rows(index_q + tl.cast(j, tl.int64) * index_q_head, t, index_q_stride, inside, d)  # fmt: skip
                logits = mma(query, tl.trans(index_keys))
                head = t.to(tl.int64) * HI + j
                add_to(d_weights + head, tl.sum(d_scores * tl.maximum(logits, 0.0), 1), inside, DETERMINISTIC)  # fmt: skip
                w = tl.load(w_rows + j, mask=inside, other=0.0)
                d_logits = tl.where(logits > 0, d_scores * w[:, None], 0.0)
                add_to(d_index_q + head[:, None] * DI + d[None, :], mma(d_logits, index_keys), inside[:, None], DETERMINISTIC)  # fmt: skip
                if not DETERMINISTIC:
                    d_keys += mma(tl.trans(d_logits), query)
            if DETERMINISTIC:
                tl.debug_barrier()  # the next block adds to what this one stored
            else:
                pointers = d_index_k + rows.to(tl.int64)[:, None] * DI + d[None, :]
                tl.atomic_add(pointers, d_keys, mask=stored[:, None], sem="relaxed")


@triton.jit
def indexer_loss_dense_bwd_dk_kernel(
    index_q, index_k, weights, q, k, lse, dloss, index_lse, mass, offsets_q, offsets_k, d_index_k,
    num_sequences, index_q_stride, index_q_head, index_k_stride, weights_stride, q_stride, q_head, k_stride, k_head,
    lse_stride, scale_log2,
    HI: tl.constexpr, DI: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """d index_k of a block of keys, over the tiles of tokens that see it, in order."""
    sequence, first = find_tile(offsets_k, num_sequences, tl.program_id(0), BLOCK_S, CHUNK)
    if sequence < num_sequences:
        q_begin = tl.load(offsets_q + sequence)
        q_end = tl.load(offsets_q + sequence + 1)
        k_begin = tl.load(offsets_k + sequence)
        k_end = tl.load(offsets_k + sequence + 1)
        num_keys = k_end - k_begin
        d = tl.arange(0, DI)
        rows = first + tl.arange(0, BLOCK_S)
        stored = rows < k_end
        index_keys = load_rows(index_k, rows, index_k_stride, stored, d)
        d_keys = tl.zeros([BLOCK_S, DI], tl.float32)
        for base in range(tl.maximum(q_begin, q_end - (k_end - first)), q_end, BLOCK_T):
            t = base + tl.arange(0, BLOCK_T)
            inside = t < q_end
            limit = num_keys - (q_end - t) + 1  # keys that t sees
            visible = (
                ((rows - k_begin)[None, :] < limit[:, None]) & inside[:, None] & stored[None, :]
            )
            d_scores = score_gradients(
                index_q, weights, q, k, lse, dloss, index_lse, mass, t, inside, visible, index_keys, rows, stored,
                index_q_stride, index_q_head, weights_stride, q_stride, q_head, k_stride, k_head, lse_stride,
                scale_log2, HI, DI, G, HEADS, D,
            )  # fmt: skip
            w_rows = weights + t.to(tl.int64) * weights_stride
            for j in range(HI):
                query = load_rows(index_q + tl.cast(j, tl.int64) * index_q_head, t, index_q_stride, inside, d)  # fmt: skip
                logits = mma(query, tl.trans(index_keys))
                w = tl.load(w_rows + j, mask=inside, other=0.0)
                d_logits = tl.where(logits > 0, d_scores * w[:, None], 0.0)
                d_keys += mma(tl.trans(d_logits), query)
        pointers = d_index_k + rows.to(tl.int64)[:, None] * DI + d[None, :]
        tl.store(pointers, d_keys, mask=stored[:, None])


@triton.jit
def indexer_loss_sparse_bwd_kernel(
    index_q, index_k, weights, q, k, lse, dloss, index_lse, mass, indices, offsets_q, offsets_k, d_index_q, d_index_k,
    d_weights, d_scores_out, key_rows, num_sequences, topk, index_q_stride, index_q_head, index_k_stride,
    weights_stride, q_stride, q_head, k_stride, k_head, lse_stride, indices_stride, scale_log2,
    HI: tl.constexpr, HI_PADDED: tl.constexpr, DI: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """d index_q and d weights of one token; its part of d index_k, or (deterministic) the pairs that make it."""
    sequence, t32 = find_tile(offsets_q, num_sequences, tl.program_id(0), 1, CHUNK)
    if sequence < num_sequences:
        k_begin = tl.load(offsets_k + sequence)
        num_keys = tl.load(offsets_k + sequence + 1) - k_begin
        t = t32.to(tl.int64)
        d = tl.arange(0, DI)
        j = tl.arange(0, HI_PADDED)
        index_query = load_rows(index_q + t * index_q_stride, j, index_q_head, j < HI, d)
        w = tl.load(weights + t * weights_stride + j, mask=j < HI, other=0.0)
        scale = tl.load(dloss + t)
        normaliser = tl.load(index_lse + t)
        sum_of_p = tl.load(mass + t)
        d_query = tl.zeros([HI_PADDED, DI], tl.float32)
        d_w = tl.zeros([HI_PADDED], tl.float32)
        for base in range(0, topk, BLOCK_S):
            rows, valid = selected_keys(indices + t * indices_stride, base, topk, k_begin, num_keys, BLOCK_S)  # fmt: skip
            index_keys = load_rows(index_k, rows, index_k_stride, valid, d)
            logits = mma(index_keys, tl.trans(index_query))  # [BLOCK_S, HI_PADDED]
            active = tl.maximum(logits, 0.0)
            scores = tl.sum(w[None, :] * active, 1)
            p = tl.zeros([BLOCK_S], tl.float32)
            for g in tl.static_range(G):
                p += gathered_group(q + t * q_stride, q_head, lse + t * lse_stride, k + tl.cast(g, tl.int64) * k_head,
                                    k_stride, rows, valid, g * HEADS, scale_log2, HEADS, HEADS_PADDED, D)  # fmt: skip
            d_scores = scale * (sum_of_p * tl.exp(scores - normaliser) - p * (1.0 / HEADS))
            d_scores = tl.where(valid, d_scores, 0.0)
            d_w += tl.sum(d_scores[:, None] * active, 0)
            d_logits = tl.where(logits > 0, d_scores[:, None] * w[None, :], 0.0)
            d_query += mma(tl.trans(d_logits), index_keys)
            if DETERMINISTIC:
                pair = t * topk + base + tl.arange(0, BLOCK_S)
                tl.store(d_scores_out + pair, d_scores, mask=valid)
                tl.store(key_rows + pair, rows, mask=valid)
            else:
                pointers = d_index_k + rows.to(tl.int64)[:, None] * DI + d[None, :]
                tl.atomic_add(
                    pointers, mma(d_logits, index_query), mask=valid[:, None], sem="relaxed"
                )
        tl.store(
            d_index_q + (t * HI + j)[:, None] * DI + d[None, :], d_query, mask=(j < HI)[:, None]
        )
        tl.store(d_weights + t * HI + j, d_w, mask=j < HI)


@triton.jit
def indexer_loss_sparse_bwd_dk_kernel(
    index_q, index_k, weights, d_scores, order, starts, d_index_k, topk, index_q_stride, index_q_head,
    index_k_stride, weights_stride, HI: tl.constexpr, DI: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """d index_k of one key, over the pairs [starts[r], starts[r + 1]) of the sorted order."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DI)
    key = tl.load(index_k + r * index_k_stride + d).to(tl.float32)
    d_key = tl.zeros([DI], tl.float32)
    end = tl.load(starts + r + 1)
    for base in range(tl.load(starts + r), end, BLOCK_P):
        position = base + tl.arange(0, BLOCK_P)
        inside = position < end
        pair = tl.load(order + position, mask=inside, other=0)
        t = pair // topk
        d_score = tl.load(d_scores + pair, mask=inside, other=0.0)
        for j in range(HI):
            query = load_rows(index_q + tl.cast(j, tl.int64) * index_q_head, t, index_q_stride, inside, d)  # fmt: skip
            query = query.to(tl.float32)
            active = tl.sum(query * key[None, :], 1) > 0
            w = tl.load(weights + t * weights_stride + j, mask=inside, other=0.0)
            d_key += tl.sum(tl.where(active, d_score * w, 0.0)[:, None] * query, 0)
    tl.store(d_index_k + r * DI + d, d_key)


def indexer_loss_bwd(dloss, index_q, index_k, index_weights, q, k, lse, index_lse, mass, indices, cu_seqlens_q,
                     cu_seqlens_k, softmax_scale, deterministic):  # fmt: skip
    num_tokens, num_keys, num_sequences = q.shape[0], k.shape[0], cu_seqlens_q.shape[0] - 1
    d_index_q = lse.new_zeros(index_q.shape)
    d_index_k = lse.new_zeros(index_k.shape)
    d_weights = lse.new_zeros(index_weights.shape)
    tensors = (index_q, index_k, index_weights, q, k, lse, dloss, index_lse, mass)
    offsets = monotone(cu_seqlens_q, num_tokens), monotone(cu_seqlens_k, num_keys)
    strides = (*index_q.stride()[:2], index_k.stride(0), index_weights.stride(0), *q.stride()[:2], *k.stride()[:2],
               lse.stride(0))  # fmt: skip
    scale_log2 = softmax_scale * LOG2_E.value
    heads = {"HI": index_q.shape[1], "DI": index_q.shape[2]}
    sizes = {**heads, "G": k.shape[1], "HEADS": q.shape[1] // k.shape[1], "D": q.shape[2]}
    if 0 in (num_tokens, num_keys, num_sequences) or (
        indices is not None and indices.shape[1] == 0
    ):
        return d_index_q.to(index_q.dtype), d_index_k.to(index_k.dtype), d_weights
    if indices is not None:
        pairs = indices.shape if deterministic else (0, 0)
        d_scores = lse.new_zeros(pairs)
        key_rows = indices.new_full(pairs, num_keys)
        indexer_loss_sparse_bwd_kernel[(num_tokens,)](
            *tensors, indices, *offsets, d_index_q, d_index_k, d_weights, d_scores, key_rows, num_sequences,
            indices.shape[1], *strides, indices.stride(0), scale_log2,
            **sizes, HI_PADDED=padded(sizes["HI"]), HEADS_PADDED=padded(sizes["HEADS"]), BLOCK_S=SPARSE_BLOCK_S[precision(q, index_q)],
            CHUNK=CHUNK, DETERMINISTIC=deterministic, num_warps=SPARSE_NUM_WARPS, num_stages=SPARSE_NUM_STAGES,
        )  # fmt: skip
        if deterministic:
            rows, order = key_rows.flatten().sort(stable=True)
            every_key = torch.arange(num_keys + 1, dtype=torch.int32, device=k.device)
            starts = torch.searchsorted(rows, every_key)
            indexer_loss_sparse_bwd_dk_kernel[(num_keys,)](
                index_q, index_k, index_weights, d_scores, order, starts, d_index_k, indices.shape[1], *strides[:4],
                **heads, BLOCK_P=BLOCK_P, num_warps=KEY_NUM_WARPS,
            )  # fmt: skip
    else:
        block_t, block_s = BLOCKS[precision(q, index_q)]
        blocks = {"BLOCK_T": block_t, "BLOCK_S": block_s, "CHUNK": CHUNK}
        launch = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
        tiles = triton.cdiv(num_tokens, block_t) + num_sequences
        splits = 1 if deterministic else num_splits(tiles, num_keys, block_s, q.device)
        indexer_loss_dense_bwd_dq_kernel[(tiles, splits)](
            *tensors, *offsets, d_index_q, d_index_k, d_weights, num_sequences, splits, *strides, scale_log2,
            **sizes, **blocks, DETERMINISTIC=deterministic, **launch,
        )  # fmt: skip
        if deterministic:
            indexer_loss_dense_bwd_dk_kernel[(triton.cdiv(num_keys, block_s) + num_sequences,)](
                *tensors, *offsets, d_index_k, num_sequences, *strides, scale_log2, **sizes, **blocks, **launch,
            )  # fmt: skip
    return d_index_q.to(index_q.dtype), d_index_k.to(index_k.dtype), d_weights
