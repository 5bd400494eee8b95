"""indexer_logits: the index score of every visible key, for packed sequences and for a paged index cache."""

from __future__ import annotations

from functools import partial

import torch

from ..checks import FP8, FP32, INT32, UINT8, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register

PAGE_SIZE = 64


def indexer_logits(
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_k: int,
) -> torch.Tensor:
    """Computes I[t, s] = k_scale[s] * sum_j weights[t, j] * ReLU(q[t, j] . k[s]) for the keys that token t sees.

    Causality is bottom-right aligned: the token at position u of a sequence of Lq queries and Lk keys sees the keys
    s <= Lk - Lq + u.

    Args:
        q: [T, H, D] float8_e4m3fn, the last two dimensions contiguous; D = 32, 64 or 128, any H.
        weights: [T, H] float32, last dimension contiguous; the scale of q and the softmax scale folded in.
        k: [L, D] float8_e4m3fn, last dimension contiguous: the one key head that all H share.
        k_scale: [L] float32.
        cu_seqlens_q: [S+1] int32, where each sequence's queries begin.
        cu_seqlens_k: [S+1] int32, where each sequence's keys begin.
        max_seqlen_k: columns of the result; keys beyond them are not visible.

    Returns:
        logits: [T, max_seqlen_k] float32. Column s is the key s of the token's own sequence; -inf where the token
        does not see it, and in the rows of tokens that belong to no sequence.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or max_seqlen_k < 0.

    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 1.

    Exact up to the order of fp32 additions, on Hopper up to its FP8 units' accumulator; NaN propagates. Bitwise
    deterministic, whatever the batch around a row; no host sync; CUDA-graph safe; T = 0 or max_seqlen_k = 0 give an
    empty result; allocates the result.
    """
    return _op(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_k)


def indexer_logits_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
) -> torch.Tensor:
    """Computes the scores of `indexer_logits` over keys that lie in pages of an index cache.

    Key s of request b is slot s % 64 of the page page_table[b, s // 64]. Keys on a page outside the cache score -inf.

    Args:
        q: [T, H, D] float8_e4m3fn, the last two dimensions contiguous; D = 32, 64 or 128, any H.
        weights: [T, H] float32, last dimension contiguous.
        index_cache: [pages, 64 * (D + 4)] uint8, contiguous: 64 keys of D e4m3 bytes, then their 64 fp32 scales.
        page_table: [B, P] int32, last dimension contiguous. Entries past a request's length are not read.
        lengths: [B] int32, keys of each request in the cache, those of its new tokens included; at most 64 P count.
        cu_seqlens_q: [B+1] int32, where each request's query tokens begin.

    Returns:
        logits: [T, 64 P] float32, -inf where the token does not see the key.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact up to the order of fp32 additions, on Hopper up to its FP8 units' accumulator; NaN propagates. Bitwise
    deterministic, whatever the batch around a row; no host sync; CUDA-graph safe; T = 0 or P = 0 give an empty
    result; allocates the result.
    """
    return _paged_op(q, weights, index_cache, page_table, lengths, cu_seqlens_q)


def _check_queries(op: str, q: torch.Tensor, weights: torch.Tensor) -> Arguments:
    a = Arguments(op)
    a.tensor("q", q, "T H D", FP8, inner=2)
    a.require(a["D"] in (32, 64, 128), "q", "a head dimension of 32, 64 or 128", a["D"])
    a.require(a["H"] >= 1, "q", "at least one head", list(q.shape))
    a.tensor("weights", weights, "T H", FP32)
    return a


def check_packed(
    op: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> Arguments:
    """The checks of the packed layout, for both rooms that score."""
    a = _check_queries(op, q, weights)
    a.tensor("k", k, "L D", FP8)
    a.tensor("k_scale", k_scale, "L", FP32, contiguous=True)
    a.tensor("cu_seqlens_q", cu_seqlens_q, "N", INT32, contiguous=True)
    a.require(a["N"] >= 1, "cu_seqlens_q", "shape [S+1]", list(cu_seqlens_q.shape))
    a.tensor("cu_seqlens_k", cu_seqlens_k, "N", INT32, contiguous=True)
    a.integer("max_seqlen_k", max_seqlen_k, 0, 2**31 - 1)
    return a


def check_paged(
    op: str,
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
) -> Arguments:
    """The checks of the paged layout, for both rooms that score."""
    a = _check_queries(op, q, weights)
    a.tensor("index_cache", index_cache, f"_ {PAGE_SIZE * (a['D'] + 4)}", UINT8, contiguous=True)
    offset = index_cache.storage_offset()
    a.require(offset % 4 == 0, "index_cache", "a storage offset divisible by 4", offset)
    a.tensor("page_table", page_table, "B P", INT32)
    a.require(
        a["P"] <= (2**31 - 1) // PAGE_SIZE, "page_table", "P * 64 < 2**31", list(page_table.shape)
    )
    a.tensor("lengths", lengths, "B", INT32, contiguous=True)
    a.tensor("cu_seqlens_q", cu_seqlens_q, "B+1", INT32, contiguous=True)
    return a


def cuda_declines(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, *_: object
) -> str | None:
    """Why the Hopper kernels of both rooms that score do not serve a call; `keys` is k or the index cache."""
    heads, dim = q.shape[1:]
    if heads not in (4, 8, 16, 32, 64) or dim not in (64, 128):
        return f"compiled for 4, 8, 16, 32 or 64 heads of 64 or 128, not {heads} of {dim}"
    if any(x.data_ptr() % 16 or x.stride(0) % 16 for x in (q, keys)):
        return "TMA needs q and the keys, and their rows, aligned to 16 bytes"
    if keys.numel() == 0:
        return "no keys"
    return None


CUDA = Implementation("cuda", declines=cuda_declines)


def _fake(q: torch.Tensor, *args: object) -> torch.Tensor:
    return q.new_empty((q.shape[0], args[-1]), dtype=torch.float32)  # type: ignore[arg-type]


def _fake_paged(
    q: torch.Tensor, _w: torch.Tensor, _c: torch.Tensor, page_table: torch.Tensor, *_: object
) -> torch.Tensor:
    return q.new_empty((q.shape[0], page_table.shape[1] * PAGE_SIZE), dtype=torch.float32)


_op = register(
    "indexer_logits",
    room=__name__,
    check=partial(check_packed, "indexer_logits"),
    fake=_fake,
    table=[CUDA, TRITON, CPU, REFERENCE],
)
_paged_op = register(
    "indexer_logits_paged",
    room=__name__,
    check=partial(check_paged, "indexer_logits_paged"),
    fake=_fake_paged,
    table=[CUDA, TRITON, CPU, REFERENCE],
)
