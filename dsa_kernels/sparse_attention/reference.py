"""The definition of sparse_attention: a softmax over the selected keys of a dense score matrix, one sequence at a time."""

import torch


def sparse_attention(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=lse_dtype)
    for rows, _, chosen, queries, keys_s, values_s in _sequences(
        q, k, v, indices, cu_seqlens_q, cu_seqlens_k
    ):
        empty = ~chosen.any(-1)[:, None, None, None]
        scores = torch.einsum("tghd,lgd->tghl", queries, keys_s) * softmax_scale
        scores = scores.masked_fill(~(chosen[:, None, None] | empty), -torch.inf)
        weights = scores.softmax(-1).masked_fill(empty, 0)
        out[rows] = torch.einsum("tghl,lgd->tghd", weights, values_s).flatten(1, 2).to(q.dtype)
        lse[rows] = scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf).flatten(1, 2)
    return out, lse


def sparse_attention_bwd(
    dout, dlse, q, k, v, out, lse, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic
):
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    heads = (k.shape[1], -1)
    for rows, keys, chosen, queries, keys_s, values_s in _sequences(
        q, k, v, indices, cu_seqlens_q, cu_seqlens_k
    ):
        grad = dout[rows].to(queries.dtype).unflatten(1, heads)  # [Tq, G, H/G, D]
        delta = (grad * out[rows].to(queries.dtype).unflatten(1, heads)).sum(-1)
        if dlse is not None:
            delta = delta - dlse[rows].to(queries.dtype).unflatten(1, heads)
        scores = torch.einsum("tghd,lgd->tghl", queries, keys_s) * softmax_scale
        scores = scores - lse[rows].to(queries.dtype).unflatten(1, heads)[..., None]
        weights = scores.masked_fill(~chosen[:, None, None], -torch.inf).exp()
        dweights = torch.einsum("tghd,lgd->tghl", grad, values_s)
        dscores = weights * (dweights - delta[..., None]) * softmax_scale
        dscores = dscores.masked_fill(~chosen[:, None, None], 0)
        dq[rows] = torch.einsum("tghl,lgd->tghd", dscores, keys_s).flatten(1, 2).to(q.dtype)
        dk[keys] = torch.einsum("tghl,tghd->lgd", dscores, queries).to(k.dtype)
        dv[keys] = torch.einsum("tghl,tghd->lgd", weights, grad).to(v.dtype)
    return dq, dk, dv


def _sequences(q, k, v, indices, cu_seqlens_q, cu_seqlens_k):
    """Per sequence: its slices of the packed tokens and keys, chosen [Tq, Lk] and q, k, v in float32 or float64.

    Lengths that decrease or leave the arrays give empty sequences. Keys that no token chose count as 0: what they
    hold does not matter.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    ends_q = cu_seqlens_q.clamp(0, q.shape[0]).cummax(0).values.tolist()
    ends_k = cu_seqlens_k.clamp(0, k.shape[0]).cummax(0).values.tolist()
    for s in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[s : s + 2]), slice(*ends_k[s : s + 2])
        length = keys.stop - keys.start
        if rows.start == rows.stop or length == 0:
            continue
        ids = indices[rows].long()
        ids = torch.where((ids >= 0) & (ids < length), ids, length)
        chosen = torch.zeros(ids.shape[0], length + 1, dtype=torch.bool, device=q.device)
        chosen = chosen.scatter(1, ids, True)[:, :length]
        used = chosen.any(0)[:, None, None]
        queries = q[rows].to(dtype).unflatten(1, (k.shape[1], -1))
        keys_s, values_s = (torch.where(used, x[keys].to(dtype), 0) for x in (k, v))
        yield rows, keys, chosen, queries, keys_s, values_s
