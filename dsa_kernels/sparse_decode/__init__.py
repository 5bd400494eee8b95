"""sparse_decode: attention over the selected tokens of a paged KV cache."""

from __future__ import annotations

import torch

from ..checks import FLOATS, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, register

HEAD_DIMS = (64, 128)


def sparse_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indices: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query token over its selected positions of a paged cache.

    out[t, h] = sum_i softmax_i(softmax_scale * q[t, h] . k[i]) v[i] and lse[t, h] = log sum_i exp(...), over the
    positions i in indices[t]; k[i] = k_cache[page_table[b, i // 64], i % 64, h // (H/G)], v[i] likewise, and b the
    request with cu_seqlens_q[b] <= t < cu_seqlens_q[b+1].

    Args:
        q: [T, H, D] float32 or bfloat16, the last two dimensions contiguous; H a multiple of G, D in {64, 128}.
        k_cache, v_cache: [pages, 64, G, D], dtype of q, the last two dimensions contiguous.
        indices: [T, K] int32, relative to the request, ascending, -1 filling the tail. An entry equal to the one
            before it counts once; an entry outside [0, lengths[b]), or whose page lies outside page_table or the
            cache, counts as empty: nothing is read for it.
        page_table: [B, max_pages] int32.
        lengths: [B] int32, keys in the cache, the new tokens included. A token sees whatever it selected below it.
        cu_seqlens_q: [B+1] int32, read as its running maximum. A token outside all requests has no keys.
        softmax_scale: default D ** -0.5.

    Returns:
        out: [T, H, D] contiguous, dtype of q; 0 for a token without a valid entry.
        lse: [T, H] float32, natural logarithm; -inf for a token without a valid entry.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact softmax in fp32; bitwise deterministic, and a token's bits do not depend on the batch around it (the split of
    its entries depends on K alone); no host sync; CUDA-graph safe, lengths and page tables may change between
    replays; T, B or K = 0 give empty or zero results; allocates the results, and on GPUs fp32 partial results of
    T * H * (D + 1) for every 128 selected tokens. No gradient.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _op(q, k_cache, v_cache, indices, page_table, lengths, cu_seqlens_q, scale)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indices: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
) -> None:
    a = Arguments("sparse_decode")
    a.tensor("q", q, "T H D", FLOATS, inner=2)
    a.require(a["D"] in HEAD_DIMS, "q", f"a head dim in {HEAD_DIMS}", a["D"])
    a.tensor("k_cache", k_cache, "P 64 G D", (q.dtype,), inner=2)
    divides = a["H"] > 0 and a["G"] > 0 and a["H"] % a["G"] == 0
    a.require(divides, "k_cache", f"a number of heads that divides q's {a['H']}", a["G"])
    a.tensor("v_cache", v_cache, "P 64 G D", (q.dtype,), inner=2)
    a.tensor("indices", indices, "T K", INT32)
    a.tensor("page_table", page_table, "B M", INT32)
    a.tensor("lengths", lengths, "B", INT32, contiguous=True)
    a.tensor("cu_seqlens_q", cu_seqlens_q, "B+1", INT32, contiguous=True)
    a.number("softmax_scale", softmax_scale)


def _fake(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


_op = register(
    "sparse_decode", room=__name__, check=_check, fake=_fake, table=[TRITON, CPU, REFERENCE]
)
