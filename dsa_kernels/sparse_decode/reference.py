"""The definition of sparse_decode: gather the selected rows of the paged cache, then a masked softmax."""

import torch


def sparse_decode(q, k_cache, v_cache, indices, page_table, lengths, cu_seqlens_q, softmax_scale):
    dtype = torch.promote_types(q.dtype, torch.float32)
    tokens, kv_heads = q.shape[0], k_cache.shape[2]
    request = torch.searchsorted(
        cu_seqlens_q.cummax(0).values, torch.arange(tokens, device=q.device).int(), right=True
    )
    outside = (request == 0) | (request == cu_seqlens_q.shape[0])
    request = (request - 1).clamp(0, max(lengths.shape[0] - 1, 0))
    if lengths.shape[0] == 0 or page_table.shape[1] == 0 or k_cache.shape[0] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)

    position = indices.long()
    page = position.div(64, rounding_mode="floor")  # [T, K]
    first = torch.nn.functional.pad(position[:, 1:] != position[:, :-1], (1, 0), value=True)
    first = first[:, : indices.shape[1]]
    valid = first & (position >= 0) & (position < lengths[request][:, None]) & ~outside[:, None]
    valid &= page < page_table.shape[1]
    page = page_table[request].long().gather(1, page.clamp(0, page_table.shape[1] - 1))
    valid &= (page >= 0) & (page < k_cache.shape[0])
    page = page.clamp(0, k_cache.shape[0] - 1)

    keys, values = (
        torch.where(valid[..., None, None], cache[page, position % 64].to(dtype), 0)
        for cache in (k_cache, v_cache)
    )  # [T, K, G, D]
    queries = q.to(dtype).unflatten(1, (kv_heads, -1))
    scores = torch.einsum("tghd,tkgd->tghk", queries, keys) * softmax_scale
    empty = ~valid.any(-1)[:, None, None, None]
    scores = scores.masked_fill(~(valid[:, None, None] | empty), -torch.inf)
    weights = scores.softmax(-1).masked_fill(empty, 0)
    out = torch.einsum("tghk,tkgd->tghd", weights, values).reshape(q.shape).to(q.dtype)
    return out, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf).flatten(1, 2)
