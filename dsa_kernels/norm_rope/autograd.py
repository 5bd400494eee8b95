"""The gradient of norm_rope: the op norm_rope_bwd, how autograd reaches it, and the checks both directions share."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import FLOATS, FP32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, register

MAX_HEAD_DIM = 256


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    grads = torch.ops.dsa_kernels.norm_rope_bwd(
        dq.contiguous(), dk.contiguous(), q, k, q_weight, k_weight, cos, sin, ctx.eps, True
    )
    dq_weight = None if q_weight is None else grads[2]
    dk_weight = None if k_weight is None else grads[3]
    return grads[0], grads[1], dq_weight, dk_weight, None, None, None


def check_inputs(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> Arguments:
    a = Arguments(op)
    a.tensor("q", q, "T H D", FLOATS)
    head_dim = a["D"]
    even = head_dim % 2 == 0 and 2 <= head_dim <= MAX_HEAD_DIM
    a.require(even, "q", f"an even head dim from 2 to {MAX_HEAD_DIM}", head_dim)
    a.tensor("k", k, "T G D", (q.dtype,))
    a.optional("q_weight", q_weight, "D", FLOATS, contiguous=True)
    a.optional("k_weight", k_weight, "D", FLOATS, contiguous=True)
    for name, table in (("cos", cos), ("sin", sin)):
        a.tensor(name, table, "T _", FP32)
        a.require(
            table.shape[1] * 2 == head_dim, name, f"shape [T, D/2 = {head_dim // 2}]", list(table.shape)
        )  # fmt: skip
    a.number("eps", eps)
    return a


def _check(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    deterministic: bool,
) -> None:
    a = check_inputs("norm_rope_bwd", q, k, q_weight, k_weight, cos, sin, eps)
    a.tensor("dq", dq, "T H D", (q.dtype,), contiguous=True)
    a.tensor("dk", dk, "T G D", (q.dtype,), contiguous=True)


def _fake(
    dq: torch.Tensor, dk: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None, *rest: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dq_weight, dk_weight = (
        q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
        for weight in (q_weight, k_weight)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_weight, dk_weight


register(
    "norm_rope_bwd", room=__package__, check=_check, fake=_fake, table=[TRITON, CPU, REFERENCE]
)
