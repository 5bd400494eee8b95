"""The definitions of moe_router and routing_map."""

import torch


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
