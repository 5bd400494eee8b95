"""The definition of indexer_logits, in the precision of `weights` (float64 weights give float64 maths)."""

import torch


def indexer_logits(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_k):
    logits = weights.new_full((q.shape[0], max_seqlen_k), -torch.inf)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        score = scores(q[q0:q1], weights[q0:q1], k[k0:k1], k_scale[k0:k1])
        logits[q0:q1, : k1 - k0] = score[:, :max_seqlen_k]
    return logits


def indexer_logits_paged(q, weights, index_cache, page_table, lengths, cu_seqlens_q):
    logits = weights.new_full((q.shape[0], page_table.shape[1] * 64), -torch.inf)
    bounds_q = cu_seqlens_q.tolist()
    for b in range(len(lengths)):
        q0, q1 = bounds_q[b], bounds_q[b + 1]
        k, k_scale, exists = gather(index_cache, page_table[b], int(lengths[b]), q.shape[2])
        score = scores(q[q0:q1], weights[q0:q1], k, k_scale).masked_fill(~exists, -torch.inf)
        logits[q0:q1, : len(k)] = score
    return logits


def scores(q, weights, k, k_scale):
    """[Lq, Lk] of one sequence, -inf where not visible."""
    dtype = weights.dtype
    dot = torch.einsum("qhd,kd->qhk", q.to(dtype), k.to(dtype)).relu()
    score = torch.einsum("qhk,qh->qk", dot, weights) * k_scale.to(dtype)
    hidden = torch.ones_like(score, dtype=torch.bool).triu(len(k) - len(q) + 1)
    return score.masked_fill(hidden, -torch.inf)


def gather(index_cache, pages, length, dim):
    """Keys, scales and existence of the first `length` keys of one request."""
    length = min(max(length, 0), len(pages) * 64)
    pages = pages[: (length + 63) // 64].long()
    exists = (pages >= 0) & (pages < len(index_cache))
    page = index_cache[torch.where(exists, pages, 0)]  # [pages, 64 * (D + 4)]
    k = page[:, : 64 * dim].reshape(-1, dim)[:length].view(torch.float8_e4m3fn)
    k_scale = page[:, 64 * dim :].reshape(-1).view(torch.float32)[:length]
    return k, k_scale, exists.repeat_interleave(64)[:length]
