"""The definition of indexer_topk: a stable sort of every row of scores, in the precision of `weights`."""

import torch


def indexer_topk(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk, max_seqlen_k):
    indices = torch.full((q.shape[0], topk), -1, dtype=torch.int32, device=q.device)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        score = scores(q[q0:q1], weights[q0:q1], k[k0:k1], k_scale[k0:k1])[:, :max_seqlen_k]
        indices[q0:q1] = best(score, topk, k1 - k0 - (q1 - q0))
    return indices


def indexer_topk_paged(q, weights, index_cache, page_table, lengths, cu_seqlens_q, topk):
    indices = torch.full((q.shape[0], topk), -1, dtype=torch.int32, device=q.device)
    bounds_q, dim = cu_seqlens_q.tolist(), q.shape[2]
    for b in range(len(lengths)):
        q0, q1 = bounds_q[b], bounds_q[b + 1]
        length = min(max(int(lengths[b]), 0), page_table.shape[1] * 64)
        pages = page_table[b, : (length + 63) // 64].long()
        exists = (pages >= 0) & (pages < len(index_cache))
        page = index_cache[torch.where(exists, pages, 0)]  # [pages, 64 * (D + 4)]
        k = page[:, : 64 * dim].reshape(-1, dim)[:length].view(torch.float8_e4m3fn)
        k_scale = page[:, 64 * dim :].reshape(-1).view(torch.float32)[:length]
        score = scores(q[q0:q1], weights[q0:q1], k, k_scale)
        score = score.masked_fill(~exists.repeat_interleave(64)[:length], -torch.inf)
        indices[q0:q1] = best(score, topk, length - (q1 - q0))
    return indices


def scores(q, weights, k, k_scale):
    dtype = weights.dtype
    dot = torch.einsum("qhd,kd->qhk", q.to(dtype), k.to(dtype)).relu()
    return torch.einsum("qhk,qh->qk", dot, weights) * k_scale.to(dtype)


def best(score, topk, offset):
    """The best positions of each row, ascending, -1 in the tail; row u sees the columns s <= offset + u.

    Sorting -score ascending puts NaN last; columns that are not visible come after the visible NaN, as NaN further
    right, because the sort is stable.
    """
    rows, width = score.shape
    visible = torch.ones_like(score, dtype=torch.bool).tril(offset)
    order = (-score).masked_fill(~visible, torch.nan).sort(dim=-1, stable=True).indices[:, :topk]
    last = torch.arange(rows, device=score.device)[:, None] + offset
    chosen = torch.where(order <= last, order, width).sort(-1).values
    chosen = torch.where(chosen == width, -1, chosen)
    return torch.nn.functional.pad(chosen, (0, max(topk - width, 0)), value=-1).int()
