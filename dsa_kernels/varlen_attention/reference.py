"""The definition of varlen_attention: a masked softmax over a dense score matrix, one sequence at a time."""

import torch


def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, deterministic
):  # fmt: skip
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    for rows, keys, visible in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal):
        queries = q[rows].to(dtype).unflatten(1, (k.shape[1], -1))  # [Lq, G, H/G, D]
        dead = ~visible.any(-1)[:, None]
        scores = torch.einsum("tghd,lgd->ghtl", queries, k[keys].to(dtype)) * softmax_scale
        scores = scores.masked_fill(~(visible | dead), -torch.inf)
        weights = scores.softmax(-1).masked_fill(dead, 0)
        out[rows] = (
            torch.einsum("ghtl,lgd->tghd", weights, v[keys].to(dtype)).flatten(1, 2).to(q.dtype)
        )
        lse[rows] = scores.logsumexp(-1).flatten(0, 1).T.masked_fill(dead, -torch.inf)
    return out, lse


def varlen_attention_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, deterministic
):
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, visible in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal):
        queries, grads, outs = (
            x[rows].to(dtype).unflatten(1, (k.shape[1], -1)) for x in (q, dout, out)
        )
        row_lse, delta = lse[rows].to(dtype), (grads * outs).sum(-1).flatten(1, 2)
        delta = delta if dlse is None else delta - dlse[rows].to(dtype)
        row_lse, delta = (x.T.unflatten(0, (k.shape[1], -1))[..., None] for x in (row_lse, delta))
        scores = torch.einsum("tghd,lgd->ghtl", queries, k[keys].to(dtype)) * softmax_scale
        weights = (scores - row_lse).masked_fill(~visible, -torch.inf).exp()
        dweights = torch.einsum("tghd,lgd->ghtl", grads, v[keys].to(dtype))
        dscores = weights * (dweights - delta) * softmax_scale
        dq[rows] = (
            torch.einsum("ghtl,lgd->tghd", dscores, k[keys].to(dtype)).flatten(1, 2).to(q.dtype)
        )
        dk[keys] = torch.einsum("ghtl,tghd->lgd", dscores, queries).to(k.dtype)
        dv[keys] = torch.einsum("ghtl,tghd->lgd", weights, grads).to(v.dtype)
    return dq, dk, dv


def _sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal):
    """Rows, keys and visible [Lq, Lk] of every sequence that has both."""
    ends_q = cu_seqlens_q.clamp(0, q.shape[0]).cummax(0).values.tolist()
    ends_k = cu_seqlens_k.clamp(0, k.shape[0]).cummax(0).values.tolist()
    for s in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[s : s + 2]), slice(*ends_k[s : s + 2])
        num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
        if num_rows and num_keys:
            visible = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device)
            yield rows, keys, visible.tril(num_keys - num_rows) if causal else visible
