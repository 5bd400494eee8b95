"""The definition of topk_select: a stable sort of every row."""

import torch


def topk_select(scores, topk, starts, lengths):
    rows, width = scores.shape
    position = torch.arange(width, device=scores.device)
    start = torch.zeros(rows, device=scores.device) if starts is None else starts.clamp(0, width)
    stop = torch.full_like(start, width) if lengths is None else start + lengths.clamp(min=0)
    visible = (position >= start[:, None]) & (position < stop[:, None])  # [R, L]

    # Sort by score, NaN as -inf, then by class (0 a number, 1 NaN, 2 not visible). Both sorts are stable, so the
    # order within a class stays (score descending, position ascending).
    score = scores.double()
    by_score = score.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(
        dim=-1, descending=True, stable=True
    )
    order = by_score.indices
    rank = torch.where(visible, score.isnan().long(), 2).gather(1, order)
    order = order.gather(1, rank.sort(dim=-1, stable=True).indices)[:, :topk]

    # Chosen positions relative to the row's start, ascending, -1 in the tail.
    empty = 2**31 - 1
    chosen = torch.where(visible.gather(1, order), order - start[:, None].long(), empty)
    chosen = torch.nn.functional.pad(chosen, (0, max(topk - width, 0)), value=empty).sort(-1).values
    return torch.where(chosen == empty, -1, chosen).int()
