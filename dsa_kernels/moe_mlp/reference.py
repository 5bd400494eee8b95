"""The definition of moe_mlp, one pass over the experts, and of its gradient (autograd of the definition)."""

from itertools import pairwise

import torch
import torch.nn.functional as F


def moe_mlp(x, w13, w2, weights, offsets, row_token, slot_row, save_h):
    rows = row_token.numel()
    known = (row_token >= 0) & (row_token < x.shape[0])
    x_rows = torch.where(
        known[:, None], x[row_token.clamp(0, max(x.shape[0] - 1, 0))], 0
    )  # [N, Hd]
    bounds = offsets.clamp(0, rows).cummax(0).values.tolist()

    h = x.new_zeros(rows, w13.shape[1])
    y = x.new_zeros(rows, x.shape[1])
    for e, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            gate_up = F.linear(x_rows[begin:end], w13[e])
            gate, up = gate_up.chunk(2, dim=1)
            h[begin:end] = gate_up
            y[begin:end] = F.linear(F.silu(gate) * up, w2[e])

    has_row = (slot_row >= 0) & (slot_row < rows)
    of_slot = torch.where(
        has_row[..., None], y[slot_row.clamp(0, max(rows - 1, 0))], 0
    )  # [T, K, Hd]
    out = torch.einsum("tk,tkh->th", weights, of_slot.to(weights.dtype)).to(x.dtype)
    return out, h if save_h else h[:0]


def moe_mlp_bwd(dout, x, h, w13, w2, weights, offsets, row_token, slot_row):
    inputs = [t.detach().requires_grad_() for t in (x, w13, w2, weights)]
    with torch.enable_grad():
        out, _ = moe_mlp(*inputs, offsets, row_token, slot_row, True)
    return torch.autograd.grad(out, inputs, dout, materialize_grads=True)
