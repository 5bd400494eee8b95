"""varlen_attention: dense attention over packed sequences, causal or bidirectional."""

from __future__ import annotations

from functools import partial

import torch

from ..checks import FLOATS, FP32, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register
from . import autograd

HEAD_DIMS = (64, 72, 128)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys of its own sequence.

    out[t, h] = sum_j softmax_j(softmax_scale * q[t, h] . k[j, h // (H/G)]) v[j, h // (H/G)], and
    lse[t, h] = log sum_j exp(softmax_scale * q[t, h] . k[j, h // (H/G)]), over the keys j visible to t.

    Sequence s owns the tokens [cu_seqlens_q[s], cu_seqlens_q[s+1]) and the keys [cu_seqlens_k[s], cu_seqlens_k[s+1]).
    causal: the query at local position u sees the keys j <= Lk - Lq + u (aligned at the bottom right); otherwise all.

    Args:
        q: [T, H, D] float32 or bfloat16, the last two dimensions contiguous; H a multiple of G, D in {64, 72, 128}.
        k, v: [L, G, D], dtype of q, the last two dimensions contiguous.
        cu_seqlens_q, cu_seqlens_k: [S+1] int32 on the device. Read as their running maximum clamped to the arrays,
            so no content leads out of bounds; a token outside all sequences has no visible key.
        causal: see above.
        softmax_scale: default D ** -0.5.
        deterministic: accepted for symmetry with the other ops. The backward has no atomics and is deterministic either
            way, at no cost.

    Returns:
        out: [T, H, D] contiguous, dtype of q. Rows without a visible key are 0, and so are their gradients.
        lse: [T, H] float32, natural logarithm, -inf for rows without a visible key. Gradients flow through both.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact softmax in fp32 (bf16 inputs: probabilities rounded to bf16 for the second product on GPUs); forward and
    backward bitwise deterministic; no host sync; CUDA-graph safe; T, L or S = 0 give empty or zero results; allocates
    the results, and in the backward fp32 [T, H]. Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _op(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, deterministic)


def _check_inputs(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    softmax_scale: float,
    deterministic: bool,
) -> Arguments:
    a = Arguments(op)
    a.tensor("q", q, "T H D", FLOATS, inner=2)
    a.require(a["D"] in HEAD_DIMS, "q", f"a head dim in {HEAD_DIMS}", a["D"])
    a.tensor("k", k, "L G D", (q.dtype,), inner=2)
    divides = a["H"] > 0 and a["G"] > 0 and a["H"] % a["G"] == 0
    a.require(divides, "k", f"a number of heads that divides q's {a['H']}", a["G"])
    a.tensor("v", v, "L G D", (q.dtype,), inner=2)
    a.tensor("cu_seqlens_q", cu_seqlens_q, "N", INT32, contiguous=True)
    a.require(a["N"] >= 1, "cu_seqlens_q", "shape [S+1]", list(cu_seqlens_q.shape))
    a.tensor("cu_seqlens_k", cu_seqlens_k, "N", INT32, contiguous=True)
    a.number("softmax_scale", softmax_scale)
    a.one_of("causal", causal, (True, False))
    a.one_of("deterministic", deterministic, (True, False))
    return a


def _fake(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _check_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool,
    softmax_scale: float,
    deterministic: bool,
) -> None:
    a = _check_inputs(
        "varlen_attention_bwd", q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale, deterministic
    )  # fmt: skip
    a.tensor("dout", dout, "T H D", (q.dtype,), contiguous=True)
    a.optional("dlse", dlse, "T H", FP32, contiguous=True)
    a.tensor("out", out, "T H D", (q.dtype,), contiguous=True)
    a.tensor("lse", lse, "T H", FP32, contiguous=True)


def _fake_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_op = register(
    "varlen_attention",
    room=__name__,
    check=partial(_check_inputs, "varlen_attention"),
    fake=_fake,
    table=[TRITON, CPU, REFERENCE],
    setup_context=autograd.setup_context,
    backward=autograd.backward,
)
register(
    "varlen_attention_bwd",
    room=__name__,
    check=_check_bwd,
    fake=_fake_bwd,
    table=[Implementation("triton", "triton_bwd"), CPU, REFERENCE],
)
