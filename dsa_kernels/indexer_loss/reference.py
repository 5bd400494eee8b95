"""The definition of indexer_loss and of its gradient, in blocks of tokens."""

import torch

CHUNK = 128


def _blocks(index_q, index_k, index_weights, q, k, lse, indices, cu_seqlens_q, cu_seqlens_k, scale):
    """Yields per block of tokens with a key: tokens t, key rows n [N] or [t, N], visible [t, N], the keys, the head
    logits [t, Hi, N], the scores I [t, N] and log p [t, G, N]."""
    precise = torch.float64 if index_q.dtype == torch.float64 else torch.float32
    offsets_q = cu_seqlens_q.clamp(0, q.shape[0]).cummax(0).values.tolist()
    offsets_k = cu_seqlens_k.clamp(0, k.shape[0]).cummax(0).values.tolist()
    for qb, qe, kb, ke in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:]):
        for begin in range(qb, qe, CHUNK):
            t = torch.arange(begin, min(begin + CHUNK, qe), device=q.device)
            n = torch.arange(ke - kb, device=q.device)
            visible = n <= (ke - kb) - (qe - qb) + (t - qb)[:, None]
            if indices is not None:
                n = indices[t].long()
                visible = (n >= 0) & (n < ke - kb)
                visible[:, 1:] &= n[:, 1:] != n[:, :-1]
                n = torch.where(visible, n, 0)
            some = visible.any(1)
            if not some.any():
                continue
            t, visible, n = t[some], visible[some], kb + (n if indices is None else n[some])
            tn = "n" if indices is None else "tn"
            keys = index_k[n].to(precise)
            logits = torch.einsum(f"thd,{tn}d->thn", index_q[t].to(precise), keys)
            scores = torch.einsum("th,thn->tn", index_weights[t].to(precise), logits.relu())
            queries = q[t].to(precise).unflatten(1, (k.shape[1], -1))
            s = torch.einsum(f"tghd,{tn}gd->tghn", queries, k[n].to(precise)) * scale
            s = s - lse[t].to(precise).unflatten(1, (k.shape[1], -1))[..., None]
            log_p = s.logsumexp(2) - torch.tensor(s.shape[2], dtype=precise).log()
            log_p = log_p.masked_fill(~visible[:, None], -torch.inf)
            yield t, n, visible, keys, logits, scores, log_p


def indexer_loss(index_q, index_k, index_weights, q, k, lse, indices, cu_seqlens_q, cu_seqlens_k,
                 softmax_scale, deterministic):  # fmt: skip
    precise = torch.float64 if index_q.dtype == torch.float64 else torch.float32
    loss, mass = torch.zeros(2, q.shape[0], dtype=precise, device=q.device)
    index_lse = torch.full_like(loss, -torch.inf)
    blocks = _blocks(index_q, index_k, index_weights, q, k, lse, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale)  # fmt: skip
    for t, _, visible, _, _, scores, log_p in blocks:
        normaliser = scores.masked_fill(~visible, -torch.inf).logsumexp(1)
        p = log_p.exp()
        log_ratio = log_p - (scores - normaliser[:, None])[:, None]
        loss = loss.index_put((t,), torch.where(p > 0, p * log_ratio, 0).sum((1, 2)))
        index_lse = index_lse.index_put((t,), normaliser)
        mass = mass.index_put((t,), p.sum((1, 2)))
    return loss, index_lse, mass


def indexer_loss_bwd(dloss, index_q, index_k, index_weights, q, k, lse, index_lse, mass, indices, cu_seqlens_q,
                     cu_seqlens_k, softmax_scale, deterministic):  # fmt: skip
    precise = torch.float64 if index_q.dtype == torch.float64 else torch.float32
    dq, dw = torch.zeros_like(index_q), torch.zeros_like(index_weights)
    dk = torch.zeros_like(index_k, dtype=precise)
    blocks = _blocks(index_q, index_k, index_weights, q, k, lse, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale)  # fmt: skip
    for t, n, visible, keys, logits, scores, log_p in blocks:
        softmax = (scores - index_lse[t, None]).exp().masked_fill(~visible, 0)
        di = dloss[t, None] * (mass[t, None] * softmax - log_p.exp().sum(1))
        dlogits = di[:, None] * index_weights[t][..., None] * (logits > 0)
        dlogits = dlogits.to(index_q.dtype).to(precise)  # as the matrix units take it
        tn = "n" if indices is None else "tn"
        dq[t] = torch.einsum(f"thn,{tn}d->thd", dlogits, keys).to(dq.dtype)
        dw[t] = (di[:, None] * logits.relu()).sum(2).to(dw.dtype)
        dkeys = torch.einsum(f"thn,thd->{tn}d", dlogits, index_q[t].to(precise))
        dk.index_add_(0, n.flatten(), dkeys.flatten(0, -2))
    return dq, dk.to(index_k.dtype), dw
