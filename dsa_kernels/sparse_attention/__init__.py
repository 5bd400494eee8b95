"""sparse_attention: GQA attention of every token over the keys selected for it, packed varlen."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..checks import FLOATS, FP32, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register
from . import union  # noqa: F401  (registers build_union)

HEAD_DIMS = (64, 128)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends from every token to the keys selected for it; one set per token, shared by all heads.

    With S(t) the set of token t, g the KV head of head h and s = softmax_scale:

        lse[t, h] = log sum_{j in S(t)} exp(s q[t, h].k[j, g])
        out[t, h] = sum_{j in S(t)} exp(s q[t, h].k[j, g] - lse[t, h]) v[j, g]

    Causality is not applied again: the selection did. Both outputs are differentiable (q, k, v).

    Args:
        q: [T, H, D] float32 or bfloat16, last dimension contiguous; D is 64 or 128, H a multiple of G.
        k: [L, G, D] of q's dtype, last dimension contiguous.
        v: [L, G, D] of q's dtype, last dimension contiguous.
        indices: [T, K] int32, ascending positions relative to the token's own sequence, last dimension contiguous.
            Entries outside [0, Lk) of the sequence (-1 in the tail) are empty; an entry equal to its predecessor
            counts once.
        cu_seqlens_q: [S + 1] int32, contiguous: sequence i holds the tokens [cu_seqlens_q[i], cu_seqlens_q[i + 1]).
        cu_seqlens_k: [S + 1] int32, contiguous: the same for the keys. Both are clamped to the arrays and to their
            running maximum.
        softmax_scale: default D^-0.5.
        deterministic: the backward gives the same bits on every run (slower on a GPU: it visits every key block of
            a sequence; see README.md).

    Returns:
        out: [T, H, D] of q's dtype. lse: [T, H] float32, natural logarithm. Tokens without a key or a sequence:
        out 0, lse -inf, gradients 0.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride, device or range.

    Source: DeepSeek-V3.2 (arXiv 2512.02556) section 2.1, for GQA.

    Exact for any sets and any overlap, fp32 softmax and sums; rows of k and v that no token selects are never used,
    but a NaN or infinity in a row that one token selects may reach the 15 tokens that share its block on a GPU.
    Forward bitwise deterministic, backward with `deterministic`; no host sync; CUDA-graph safe; T, L, K or S = 0
    give zeros and -inf; allocates the results and on a GPU at most 256 MB of workspace (backward: also fp32 dk, dv).
    """
    if softmax_scale is None:
        shape: tuple[int, ...] = tuple(
            getattr(q, "shape", ())
        )  # the check reports a q that has none
        softmax_scale = shape[-1] ** -0.5 if len(shape) == 3 and shape[-1] > 0 else 1.0
    return _op(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic)


def _check_inputs(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    deterministic: bool,
) -> Arguments:
    a = Arguments(op)
    a.tensor("q", q, "T H D", FLOATS)
    a.tensor("k", k, "L G D", (q.dtype,))
    a.tensor("v", v, "L G D", (q.dtype,))
    a.require(a["D"] in HEAD_DIMS, "q", "head dim D = 64 or 128", a["D"])
    a.require(a["G"] > 0, "k", "at least one KV head", a["G"])
    a.require(a["H"] % a["G"] == 0, "q", f"H a multiple of G = {a['G']}", a["H"])
    a.tensor("indices", indices, "T K", INT32)
    a.tensor("cu_seqlens_q", cu_seqlens_q, "N", INT32, contiguous=True)
    a.require(a["N"] > 0, "cu_seqlens_q", "shape [S+1]", "shape [0]")
    a.tensor("cu_seqlens_k", cu_seqlens_k, "N", INT32, contiguous=True)
    a.number("softmax_scale", softmax_scale)
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
    indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    deterministic: bool,
) -> None:
    a = _check_inputs(
        "sparse_attention_bwd", q, k, v, indices, cu_seqlens_q, cu_seqlens_k, softmax_scale, deterministic
    )  # fmt: skip
    a.tensor("dout", dout, "T H D", (q.dtype,))
    a.tensor("out", out, "T H D", (q.dtype,))
    a.tensor("lse", lse, "T H", FP32, contiguous=True)
    a.optional("dlse", dlse, "T H", FP32, contiguous=True)


def _fake_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.softmax_scale, ctx.deterministic = inputs
    q, k, v, indices, cu_seqlens_q, cu_seqlens_k = tensors
    ctx.save_for_backward(q, k, v, *output, indices, cu_seqlens_q, cu_seqlens_k)


def _backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = torch.ops.dsa_kernels.sparse_attention_bwd(
        dout.contiguous(), dlse.contiguous(), *ctx.saved_tensors, ctx.softmax_scale,
        ctx.deterministic,
    )  # fmt: skip
    return *gradients, None, None, None, None, None


def _tilelang_declines(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    if q.dtype != torch.bfloat16:
        return "serves bfloat16"
    if q.shape[1] // k.shape[1] not in (4, 8):
        return "serves groups of 4 or 8 query heads a KV head"
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        return "serves contiguous q, k and v"
    return None


_op = register(
    "sparse_attention",
    room=__name__,
    check=partial(_check_inputs, "sparse_attention"),
    fake=_fake,
    table=[
        TRITON,
        Implementation("tilelang", "tilelang", declines=_tilelang_declines),
        CPU,
        REFERENCE,
    ],
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "sparse_attention_bwd",
    room=__name__,
    check=_check_bwd,
    fake=_fake_bwd,
    table=[Implementation("triton", "triton_bwd"), CPU, REFERENCE],
)
