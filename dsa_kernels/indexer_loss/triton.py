"""indexer_loss in Triton, forward; what both passes share.

Dense: a program owns a tile of BLOCK_T tokens and walks over blocks of BLOCK_S keys. Per block it sums the Hi index
heads into I, then for each of the G groups the exponentials of its H / G attention heads into p: three [BLOCK_T,
BLOCK_S] tiles of registers (I, p, the product of one head), queries streamed from L2 head by head, keys of a group
kept in shared memory. Where few tiles exist the key blocks are split over programs, whose sums (lse of I, sum of p,
sum of p (log p - I)) are added in a fixed order afterwards.

Sparse: a program owns one token; BLOCK_S gathered keys are the rows of the products, the heads (padded to 16) their
columns.

A tile finds its sequence on the device, in offsets that the launch has made monotone. Bound by the multiply-adds and
the exponentials of the target (H D against Hi Di) when dense, by the gathered bytes when sparse.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import LOG2_E, mma

# (BLOCK_T, BLOCK_S) dense and BLOCK_S sparse; "fp32" is any fp32 operand: FMA units, twice the shared memory.
BLOCKS = {"bf16": (64, 128), "fp32": (32, 64)}
SPARSE_BLOCK_S = {"bf16": 64, "fp32": 32}
NUM_WARPS, NUM_STAGES = 8, 2
SPARSE_NUM_WARPS, SPARSE_NUM_STAGES = 4, 1  # two stages take 166 KB of shared memory
PROGRAMS_PER_SM = 2
MAX_SPLITS = 32
CHUNK = 128  # sequences looked at together when a tile finds its own


@triton.jit
def find_tile(offsets, num_sequences, tile, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sequence and first row of the tile-th block of rows; the sequence is num_sequences if there is none."""
    before = tl.full([], 0, tl.int32)
    sequence = tl.full([], 0, tl.int32) + num_sequences
    row = tl.full([], 0, tl.int32)
    for base in range(0, num_sequences, CHUNK):
        s = base + tl.arange(0, CHUNK)
        begin = tl.load(offsets + s, mask=s < num_sequences, other=0)
        end = tl.load(offsets + s + 1, mask=s < num_sequences, other=0)
        tiles = (end - begin + BLOCK - 1) // BLOCK
        upto = before + tl.cumsum(tiles, 0)
        hit = (tile < upto) & (tile >= upto - tiles)
        sequence += tl.sum(tl.where(hit, s - num_sequences, 0))
        row += tl.sum(tl.where(hit, begin + (tile - upto + tiles) * BLOCK, 0))
        before += tl.sum(tiles)
    return sequence, row


@triton.jit
def load_rows(base, rows, stride, inside, d):
    """base[rows, d], 0 outside."""
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=inside[:, None], other=0.0)  # fmt: skip


@triton.jit
def index_scores(index_q, index_q_stride, index_q_head, weights, weights_stride, t, inside, keys, HI: tl.constexpr,
                 DI: tl.constexpr):  # fmt: skip
    """I of the tokens t and the keys [BLOCK_S, DI]."""
    d = tl.arange(0, DI)
    w_rows = weights + t.to(tl.int64) * weights_stride
    keys_t = tl.trans(keys)
    scores = tl.zeros([t.shape[0], keys.shape[0]], tl.float32)
    for j in range(HI):
        query = load_rows(index_q + tl.cast(j, tl.int64) * index_q_head, t, index_q_stride, inside, d)  # fmt: skip
        logits = mma(query, keys_t)
        scores += tl.load(w_rows + j, mask=inside, other=0.0)[:, None] * tl.maximum(logits, 0.0)
    return scores


@triton.jit
def add_group(p, q, q_stride, q_head, lse, lse_stride, t, inside, keys, first_head, scale_log2, HEADS: tl.constexpr,
              D: tl.constexpr):  # fmt: skip
    """p plus exp(scale q . k - lse) of the heads [first_head, first_head + HEADS) and their keys [BLOCK_S, D]."""
    d = tl.arange(0, D)
    lse_rows = lse + t.to(tl.int64) * lse_stride
    keys_t = tl.trans(keys)
    for h in range(first_head, first_head + HEADS):
        query = load_rows(q + tl.cast(h, tl.int64) * q_head, t, q_stride, inside, d)
        normaliser = tl.load(lse_rows + h, mask=inside, other=0.0) * LOG2_E
        s = mma(query, keys_t)
        p += tl.exp2(s * scale_log2 - normaliser[:, None])
    return p


@triton.jit
def cross_terms(p, scores):
    """p (log p - I), 0 where p is."""
    return tl.where(p > 0, p * (tl.log(tl.where(p > 0, p, 1.0)) - scores), 0.0)


@triton.jit
def indexer_loss_dense_fwd_kernel(
    index_q, index_k, weights, q, k, lse, offsets_q, offsets_k, partial,
    num_tokens, num_sequences, num_splits, index_q_stride, index_q_head, index_k_stride, weights_stride, q_stride,
    q_head, k_stride, k_head, lse_stride, scale_log2,
    HI: tl.constexpr, DI: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    sequence, first = find_tile(offsets_q, num_sequences, tl.program_id(0), BLOCK_T, CHUNK)
    if sequence < num_sequences:
        q_end = tl.load(offsets_q + sequence + 1)
        k_begin = tl.load(offsets_k + sequence)
        num_keys = tl.load(offsets_k + sequence + 1) - k_begin
        t = first + tl.arange(0, BLOCK_T)
        inside = t < q_end
        limit = num_keys - (q_end - t) + 1  # keys that t sees
        last = tl.minimum(first + BLOCK_T, q_end) - 1
        blocks = tl.cdiv(tl.maximum(num_keys - (q_end - last) + 1, 0), BLOCK_S)
        share = tl.cdiv(blocks, num_splits)
        begin = split * share
        top = tl.full([BLOCK_T], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        mass = tl.zeros([BLOCK_T], tl.float32)
        cross = tl.zeros([BLOCK_T], tl.float32)
        for block in range(begin, tl.minimum(begin + share, blocks)):
            s = block * BLOCK_S + tl.arange(0, BLOCK_S)
            stored = s < num_keys
            visible = (s[None, :] < limit[:, None]) & inside[:, None]
            index_keys = load_rows(index_k, k_begin + s, index_k_stride, stored, tl.arange(0, DI))
            scores = index_scores(index_q, index_q_stride, index_q_head, weights, weights_stride, t, inside,
                                  index_keys, HI, DI)  # fmt: skip
            seen = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(seen, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(seen - shift[:, None]), 1)
            top = new_top
            for g in range(G):
                keys = load_rows(k + tl.cast(g, tl.int64) * k_head, k_begin + s, k_stride, stored, tl.arange(0, D))  # fmt: skip
                p = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
                p = add_group(p, q, q_stride, q_head, lse, lse_stride, t, inside, keys, g * HEADS, scale_log2, HEADS, D)  # fmt: skip
                p = tl.where(visible, p * (1.0 / HEADS), 0.0)
                mass += tl.sum(p, 1)
                cross += tl.sum(cross_terms(p, scores), 1)
        out = partial + split.to(tl.int64) * 3 * num_tokens + t
        tl.store(out, top + tl.log(total), mask=inside)
        tl.store(out + tl.cast(num_tokens, tl.int64), mass, mask=inside)
        tl.store(out + 2 * tl.cast(num_tokens, tl.int64), cross, mask=inside)


@triton.jit
def selected_keys(indices, base, topk, k_begin, num_keys, BLOCK_S: tl.constexpr):
    """Entries [base, base + BLOCK_S) of a token's selection: key rows, and which of them count."""
    position = base + tl.arange(0, BLOCK_S)
    entry = tl.load(indices + position, mask=position < topk, other=-1)
    previous = tl.load(indices + position - 1, mask=(position > 0) & (position < topk), other=-1)
    valid = (entry >= 0) & (entry < num_keys) & (entry != previous)
    return k_begin + tl.where(valid, entry, 0), valid


@triton.jit
def gathered_group(q_row, q_head, lse_row, k, k_stride, rows, valid, first_head, scale_log2, HEADS: tl.constexpr,
                   HEADS_PADDED: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Sum over a group's heads of exp(scale q . k - lse) for gathered keys, [BLOCK_S]; 0 where not valid."""
    d = tl.arange(0, D)
    h = tl.arange(0, HEADS_PADDED)
    keys = load_rows(k, rows, k_stride, valid, d)
    query = load_rows(q_row, first_head + h, q_head, h < HEADS, d)
    normaliser = tl.load(lse_row + first_head + h, mask=h < HEADS, other=float("inf")) * LOG2_E
    s = mma(keys, tl.trans(query))  # [BLOCK_S, HEADS_PADDED]
    return tl.where(valid, tl.sum(tl.exp2(s * scale_log2 - normaliser[None, :]), 1), 0.0)


@triton.jit
def indexer_loss_sparse_fwd_kernel(
    index_q, index_k, weights, q, k, lse, indices, offsets_q, offsets_k, loss, index_lse, mass_out,
    num_sequences, topk, index_q_stride, index_q_head, index_k_stride, weights_stride, q_stride, q_head, k_stride,
    k_head, lse_stride, indices_stride, scale_log2,
    HI: tl.constexpr, HI_PADDED: tl.constexpr, DI: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sequence, t32 = find_tile(offsets_q, num_sequences, tl.program_id(0), 1, CHUNK)
    if sequence < num_sequences:
        k_begin = tl.load(offsets_k + sequence)
        num_keys = tl.load(offsets_k + sequence + 1) - k_begin
        t = t32.to(tl.int64)
        d = tl.arange(0, DI)
        j = tl.arange(0, HI_PADDED)
        index_query = load_rows(index_q + t * index_q_stride, j, index_q_head, j < HI, d)
        w = tl.load(weights + t * weights_stride + j, mask=j < HI, other=0.0)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        mass = tl.zeros([BLOCK_S], tl.float32)
        cross = tl.zeros([BLOCK_S], tl.float32)
        for base in range(0, topk, BLOCK_S):
            rows, valid = selected_keys(indices + t * indices_stride, base, topk, k_begin, num_keys, BLOCK_S)  # fmt: skip
            index_keys = load_rows(index_k, rows, index_k_stride, valid, d)
            logits = mma(index_keys, tl.trans(index_query))
            scores = tl.sum(w[None, :] * tl.maximum(logits, 0.0), 1)
            seen = tl.where(valid, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(seen, 0))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(seen - shift), 0)
            top = new_top
            for g in tl.static_range(G):
                p = gathered_group(q + t * q_stride, q_head, lse + t * lse_stride, k + tl.cast(g, tl.int64) * k_head,
                                   k_stride, rows, valid, g * HEADS, scale_log2, HEADS, HEADS_PADDED, D)  # fmt: skip
                p *= 1.0 / HEADS
                mass += p
                cross += cross_terms(p, scores)
        if top > float("-inf"):
            normaliser = top + tl.log(total)
            sum_of_p = tl.sum(mass, 0)
            tl.store(loss + t, tl.sum(cross, 0) + sum_of_p * normaliser)
            tl.store(index_lse + t, normaliser)
            tl.store(mass_out + t, sum_of_p)


def monotone(cu_seqlens, size):
    """Offsets in [0, size], none below its predecessor."""
    return cu_seqlens.clamp(0, size).cummax(0).values.int()


def precision(q, index_q):
    return "bf16" if q.dtype == index_q.dtype == torch.bfloat16 else "fp32"


def num_splits(tiles, num_keys, block_s, device):
    """Programs that share the keys of one tile of tokens, so that all SMs have work."""
    # The interpreter counts as four SMs: small tests take the path of split keys.
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4  # fmt: skip
    return max(1, min(PROGRAMS_PER_SM * sms // tiles, triton.cdiv(num_keys, block_s), MAX_SPLITS))


def padded(heads):
    """Heads as the columns of a product: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(heads))


def indexer_loss(index_q, index_k, index_weights, q, k, lse, indices, cu_seqlens_q, cu_seqlens_k,
                 softmax_scale, deterministic):  # fmt: skip
    num_tokens, heads, dim = q.shape
    groups, num_sequences = k.shape[1], cu_seqlens_q.shape[0] - 1
    loss, mass = lse.new_zeros(num_tokens), lse.new_zeros(num_tokens)
    index_lse = lse.new_full((num_tokens,), -torch.inf)
    if num_tokens == 0 or k.shape[0] == 0 or num_sequences == 0:
        return loss, index_lse, mass
    offsets = monotone(cu_seqlens_q, num_tokens), monotone(cu_seqlens_k, k.shape[0])
    strides = (*index_q.stride()[:2], index_k.stride(0), index_weights.stride(0), *q.stride()[:2], *k.stride()[:2],
               lse.stride(0))  # fmt: skip
    scale_log2 = softmax_scale * LOG2_E.value
    sizes = {
        "HI": index_q.shape[1], "DI": index_q.shape[2], "G": groups, "HEADS": heads // groups, "D": dim,
    }  # fmt: skip
    if indices is not None:
        indexer_loss_sparse_fwd_kernel[(num_tokens,)](
            index_q, index_k, index_weights, q, k, lse, indices, *offsets, loss, index_lse, mass,
            num_sequences, indices.shape[1], *strides, indices.stride(0), scale_log2,
            **sizes, HI_PADDED=padded(sizes["HI"]), HEADS_PADDED=padded(sizes["HEADS"]), BLOCK_S=SPARSE_BLOCK_S[precision(q, index_q)],
            CHUNK=CHUNK, num_warps=SPARSE_NUM_WARPS, num_stages=SPARSE_NUM_STAGES,
        )  # fmt: skip
        return loss, index_lse, mass
    block_t, block_s = BLOCKS[precision(q, index_q)]
    tiles = triton.cdiv(num_tokens, block_t) + num_sequences
    splits = num_splits(tiles, k.shape[0], block_s, q.device)
    partial = lse.new_zeros((splits, 3, num_tokens))
    partial[:, 0] = -torch.inf
    indexer_loss_dense_fwd_kernel[(tiles, splits)](
        index_q, index_k, index_weights, q, k, lse, *offsets, partial, num_tokens, num_sequences, splits, *strides,
        scale_log2, **sizes, BLOCK_T=block_t, BLOCK_S=block_s, CHUNK=CHUNK, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    index_lse = partial[:, 0].logsumexp(0)
    mass = partial[:, 1].sum(0)
    loss = partial[:, 2].sum(0) + torch.where(mass > 0, mass * index_lse, 0.0)
    return loss, index_lse, mass
