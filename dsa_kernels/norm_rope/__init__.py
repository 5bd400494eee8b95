"""norm_rope: per-head RMSNorm and rotary embedding of q and k, in one pass."""

from __future__ import annotations

from functools import partial

import torch

from ..dispatch import CPU, REFERENCE, TRITON, register
from .autograd import backward, check_inputs, setup_context


def norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises and rotates every head of q and k.

    y = x / sqrt(mean(x^2) + eps) * weight (y = x where the weight is None), then, with halves y1, y2 of the head
    (NeoX, "rotate half"): out = [y1 * cos[t] - y2 * sin[t], y2 * cos[t] + y1 * sin[t]]. The position of a token, M-RoPE
    sections included, lies in its row of the tables.

    Args:
        q: [T, H, D] float32 or bfloat16, last dimension contiguous; D even, at most 256, need not be a power of two.
        k: [T, G, D], dtype of q. q and k may be views of one fused projection.
        q_weight, k_weight: [D] float32 or bfloat16, contiguous; None for rotation alone.
        cos, sin: [T, D/2] float32, last dimension contiguous; they get no gradient.
        eps: added to the mean square.
        deterministic: taken for symmetry with other ops; the backward is always deterministic and this costs nothing.

    Returns:
        q_out [T, H, D] and k_out [T, G, D], contiguous, dtype of q.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, D odd or above 256, or eps not positive.

    float32 throughout, rounded once to the output's dtype. Hugging Face's Qwen3 in bfloat16 also rounds after the norm,
    after the weight and after each product of the rotation; this is the value those roundings approximate. Forward and
    backward are bitwise deterministic: the weights' gradients are summed in two stages of fixed order. No host sync;
    CUDA-graph safe; T = 0 gives empty outputs and zero weight gradients; allocates the outputs, and in the backward
    2 x D float32 of partial sums a program (at most 1024) or block of 64 tokens (CPU).
    """
    return _op(q, k, q_weight, k_weight, cos, sin, eps)


def _fake(q: torch.Tensor, k: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_op = register(
    "norm_rope",
    room=__name__,
    check=partial(check_inputs, "norm_rope"),
    fake=_fake,
    table=[TRITON, CPU, REFERENCE],
    setup_context=setup_context,
    backward=backward,
)
