"""The definitions of norm_rope and its gradient."""

import torch


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def norm_rope(q, k, q_weight, k_weight, cos, sin, eps):
    def one(x, weight):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if weight is not None:
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(y.dtype)
        return rotate(y, cos, sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def norm_rope_bwd(dq, dk, q, k, q_weight, k_weight, cos, sin, eps, deterministic):
    def one(dout, x, weight):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        dy = rotate(dout.to(y.dtype), cos, -sin)
        if weight is None:
            return dy.to(x.dtype), x.new_empty(0)
        inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = y * inverse
        dweight = (dy * y).sum((0, 1)).to(weight.dtype)
        dy = dy * weight.to(y.dtype)
        return (inverse * (dy - y * (dy * y).mean(-1, keepdim=True))).to(x.dtype), dweight

    dq, dq_weight = one(dq, q, q_weight)
    dk, dk_weight = one(dk, k, k_weight)
    return dq, dk, dq_weight, dk_weight
