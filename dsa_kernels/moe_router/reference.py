"""The definitions of moe_router, its gradient, and routing_map."""

import torch


def moe_router(logits, topk, normalize):
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    prob = scores.softmax(-1)  # [T, E]

    # Both sorts are stable: by score with NaN as -inf, then NaN behind everything.
    inf = torch.inf
    order = scores.detach().nan_to_num(-inf, inf, -inf).sort(dim=-1, descending=True, stable=True)
    nan_last = scores.isnan().gather(1, order.indices).int().sort(dim=-1, stable=True)
    ids = order.indices.gather(1, nan_last.indices)[:, :topk]

    weights = prob.gather(1, ids)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    chosen = ids.flatten()
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    return weights, ids.int(), counts.int(), prob.sum(0)


def moe_router_bwd(dweights, dprob_sum, logits, ids, normalize):
    prob = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    valid = (ids >= 0) & (ids < logits.shape[1])
    index = torch.where(valid, ids, 0).long()
    if normalize:
        chosen = torch.where(valid, prob.gather(1, index), 0)
        total = chosen.sum(-1, keepdim=True)
        dweights = (dweights - (dweights * chosen / total).sum(-1, keepdim=True)) / total
    dprob = torch.zeros_like(prob) if dprob_sum is None else dprob_sum.expand(prob.shape)
    dprob = dprob.scatter_add(1, index, torch.where(valid, dweights, 0))
    return (prob * (dprob - (prob * dprob).sum(-1, keepdim=True))).to(logits.dtype)


def routing_map(ids, num_experts):
    topk = ids.shape[1]
    flat = ids.flatten()
    expert = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts).long()
    slots = expert.sort(stable=True).indices  # slot of each row; the dropped ones last
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    offsets = torch.nn.functional.pad(counts[:-1].cumsum(0), (1, 0)).int()
    row = torch.arange(flat.numel(), device=ids.device)
    kept = row < offsets[-1]
    row_token = torch.where(kept, slots // topk, -1).int()
    slot_row = torch.empty_like(slots).scatter_(0, slots, torch.where(kept, row, -1))
    return offsets, row_token, slot_row.int().view(ids.shape)
