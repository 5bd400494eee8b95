"""indexer_loss: the KL divergence that trains the indexer towards the attention it selects for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ..checks import FLOATS, FP32, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register
from .autograd import backward, setup_context

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class AttentionTarget:
    """The attention that the indexer imitates, a constant to the loss: no gradient reaches it.

    Attributes:
        q: [T, H, D] float32 or bfloat16 queries, after norm and RoPE. D 64 or 128.
        k: [L, G, D] keys, dtype of q. H is a multiple of G.
        lse: [T, H] float32 natural-log normalisers: those of the dense attention in the dense form, those of the
            sparse attention in the sparse form (`varlen_attention` and `sparse_attention` return them).
        softmax_scale: the attention's scale.
    """

    q: torch.Tensor
    k: torch.Tensor
    lse: torch.Tensor
    softmax_scale: float


def indexer_loss(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    target: AttentionTarget,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    indices: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Computes the loss of every token without a T x L matrix, forward and backward.

        loss[t] = sum_g KL(p[t, :, g] || softmax_s I[t, :]) = sum_g sum_s p[t,s,g] (log p[t,s,g] - I[t,s] + lse_I[t])
        I[t, s] = sum_j index_weights[t, j] relu(index_q[t, j] . index_k[s])
        p[t, s, g] = mean over the heads h of group g of exp(softmax_scale q[t, h] . k[s, g] - lse[t, h])

    over the keys that t sees: the causal, bottom-right aligned ones (dense form, for the warm-up) or those in
    `indices` (sparse form). Its gradient is dI = dloss ((sum_s,g p) softmax(I) - sum_g p), on to index_q, index_k and
    index_weights; relu'(0) = 0.

    Args:
        index_q: [T, Hi, Di] float32 or bfloat16 indexer queries. Di 64 or 128.
        index_k: [L, Di] indexer keys, dtype of index_q.
        index_weights: [T, Hi] float32 head weights.
        target: the attention to imitate.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 first row of each sequence in the packed queries and keys. Values
            are clamped to [0, T] and [0, L] and to be no less than their predecessor.
        indices: [T, K] int32 selected keys of each token, relative to its sequence, ascending; an entry outside
            [0, Lk) or equal to its predecessor is empty. They are taken as they are: causality is the selection's.
        deterministic: the backward without float atomics; costs a second pass over the keys in the dense form, a sort
            of T K pairs in the sparse form, with 20 bytes of workspace a pair besides the sort's own.

    Returns:
        loss: [T] float32; 0 for a token that sees no key or belongs to no sequence, and its gradient is 0.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Source: Keye-VL-2.0 (arXiv 2606.10651), section 2.3.3; the target is the mean of post-softmax heads.

    Exact up to rounding (fp32 accumulation and softmax; the backward's dlogits are rounded to index_q's dtype for the
    matrix units). The forward is bitwise deterministic, the backward with `deterministic=True` (always on the CPU).
    No host sync; CUDA-graph safe; T = 0, L = 0 and K = 0 give zeros; allocates O(T + L) (the backward: gradients in
    float32, on the CPU up to 16 copies of index_k's).
    """
    if not isinstance(target, AttentionTarget):
        Arguments("indexer_loss").fail("target", "an AttentionTarget", type(target).__name__)
    return _op(
        index_q, index_k, index_weights, target.q, target.k, target.lse, indices, cu_seqlens_q, cu_seqlens_k,
        target.softmax_scale, deterministic,
    )[0]  # fmt: skip


def _check_inputs(
    op: str, index_q: torch.Tensor, index_k: torch.Tensor, index_weights: torch.Tensor, q: torch.Tensor,
    k: torch.Tensor, lse: torch.Tensor, indices: torch.Tensor | None, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, softmax_scale: float, deterministic: bool,
) -> Arguments:  # fmt: skip
    a = Arguments(op)
    a.tensor("index_q", index_q, "T Hi Di", FLOATS)
    a.require(a["Di"] in HEAD_DIMS, "index_q", "Di = 64 or 128", list(index_q.shape))
    a.require(a["Hi"] >= 1, "index_q", "at least one head", list(index_q.shape))
    a.tensor("index_k", index_k, "L Di", (index_q.dtype,))
    a.tensor("index_weights", index_weights, "T Hi", FP32)
    a.tensor("q", q, "T H D", FLOATS)
    a.require(a["D"] in HEAD_DIMS, "q", "D = 64 or 128", list(q.shape))
    a.tensor("k", k, "L G D", (q.dtype,))
    a.require(a["G"] >= 1 and a["H"] >= 1, "k", "at least one head", list(k.shape))
    a.require(a["H"] % a["G"] == 0, "k", f"a number of heads that divides q's {a['H']}", a["G"])
    a.tensor("lse", lse, "T H", FP32)
    a.optional("indices", indices, "T K", INT32)
    a.tensor("cu_seqlens_q", cu_seqlens_q, "N", INT32, contiguous=True)
    a.require(a["N"] >= 1, "cu_seqlens_q", "S + 1 >= 1 entries", list(cu_seqlens_q.shape))
    a.tensor("cu_seqlens_k", cu_seqlens_k, "N", INT32, contiguous=True)
    a.number("softmax_scale", softmax_scale)
    a.require(isinstance(deterministic, bool), "deterministic", "a bool", repr(deterministic))
    return a


def _fake(
    index_q: torch.Tensor, index_k: torch.Tensor, index_weights: torch.Tensor, *rest: object
) -> Triple:
    rows = index_weights.shape[:1]
    loss, index_lse, mass = (index_weights.new_empty(rows) for _ in range(3))
    return loss, index_lse, mass


def _check_bwd(
    dloss: torch.Tensor, index_q: torch.Tensor, index_k: torch.Tensor, index_weights: torch.Tensor, q: torch.Tensor,
    k: torch.Tensor, lse: torch.Tensor, index_lse: torch.Tensor, mass: torch.Tensor, indices: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, softmax_scale: float, deterministic: bool,
) -> None:  # fmt: skip
    a = _check_inputs("indexer_loss_bwd", index_q, index_k, index_weights, q, k, lse, indices, cu_seqlens_q,
                      cu_seqlens_k, softmax_scale, deterministic)  # fmt: skip
    for name, value in (("dloss", dloss), ("index_lse", index_lse), ("mass", mass)):
        a.tensor(name, value, "T", FP32, contiguous=True)


def _fake_bwd(
    dloss: torch.Tensor, index_q: torch.Tensor, index_k: torch.Tensor, index_weights: torch.Tensor, *rest: object
) -> Triple:  # fmt: skip
    return (
        index_q.new_empty(index_q.shape),
        index_k.new_empty(index_k.shape),
        index_weights.new_empty(index_weights.shape),
    )


_op = register(
    "indexer_loss",
    room=__name__,
    check=partial(_check_inputs, "indexer_loss"),
    fake=_fake,
    table=[TRITON, CPU, REFERENCE],
    setup_context=setup_context,
    backward=backward,
)
register(
    "indexer_loss_bwd",
    room=__name__,
    check=_check_bwd,
    fake=_fake_bwd,
    table=[Implementation("triton", "triton_bwd"), CPU, REFERENCE],
)
