"""indexer_topk: index scores and exact top-k selection in one op; no score matrix in memory."""

from __future__ import annotations

import torch

from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register
from ..indexer_logits import check_packed, check_paged, cuda_declines


def indexer_topk(
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    topk: int,
    *,
    max_seqlen_k: int,
) -> torch.Tensor:
    """Selects, for every token t, the `topk` visible keys with the largest index scores, exactly.

    I[t, s] = k_scale[s] * sum_j weights[t, j] * ReLU(q[t, j] . k[s]), in the order (score descending, position
    ascending), NaN below everything: the set that `topk_select` makes of `indexer_logits` of the same implementation.
    Causality is bottom-right aligned: the token at position u of a sequence of Lq queries and Lk keys sees the keys
    s <= Lk - Lq + u. Tokens that see at most `topk` keys take all of them, without any scoring.

    Args:
        q: [T, H, D] float8_e4m3fn, the last two dimensions contiguous; D = 32, 64 or 128, any H.
        weights: [T, H] float32, last dimension contiguous; the scale of q and the softmax scale folded in.
        k: [L, D] float8_e4m3fn, last dimension contiguous: the one key head that all H share.
        k_scale: [L] float32.
        cu_seqlens_q: [S+1] int32, where each sequence's queries begin.
        cu_seqlens_k: [S+1] int32, where each sequence's keys begin.
        topk: K >= 1; need not be a power of two and may exceed L.
        max_seqlen_k: an upper bound of the sequences' key counts; keys beyond it are not visible.

    Returns:
        indices: [T, K] int32, positions relative to the token's own sequence, ascending, -1 filling the tail; all -1
        for tokens that belong to no sequence.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or topk < 1, or max_seqlen_k < 0.

    Source: DeepSeek-V3.2 (arXiv 2512.02556), equations 1 and 2.

    Exact for any input; bitwise deterministic, whatever the batch around a row; no host sync; CUDA-graph safe; T = 0
    gives an empty and L = 0 an all -1 result; allocates the result, on the CPU O(K) a row in flight, on the GPU at most
    64 MB of workspace.
    """
    return _op(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk, max_seqlen_k)


def indexer_topk_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    topk: int,
) -> torch.Tensor:
    """Selects as `indexer_topk` does, over keys that lie in pages of an index cache: decode, and chunks of a prefill.

    Key s of request b is slot s % 64 of the page page_table[b, s // 64]. Keys on a page outside the cache score -inf.

    Args:
        q: [T, H, D] float8_e4m3fn, the last two dimensions contiguous; D = 32, 64 or 128, any H.
        weights: [T, H] float32, last dimension contiguous.
        index_cache: [pages, 64 * (D + 4)] uint8, contiguous: 64 keys of D e4m3 bytes, then their 64 fp32 scales.
        page_table: [B, P] int32, last dimension contiguous. Entries past a request's length are not read.
        lengths: [B] int32, keys of each request in the cache, those of its new tokens included; at most 64 P count.
        cu_seqlens_q: [B+1] int32, where each request's query tokens begin.
        topk: K >= 1.

    Returns:
        indices: [T, K] int32, positions within the token's own request, ascending, -1 filling the tail.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or topk < 1.

    Exact for any input (the set that `topk_select` makes of `indexer_logits_paged` of the same implementation);
    bitwise deterministic, whatever the batch around a row; no host sync; CUDA-graph safe; T = 0 gives an empty and
    empty requests all -1 results; allocates as `indexer_topk` does, with 64 P for max_seqlen_k.
    """
    return _paged_op(q, weights, index_cache, page_table, lengths, cu_seqlens_q, topk)


def _check(
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    topk: int,
    max_seqlen_k: int,
) -> None:
    a = check_packed(
        "indexer_topk", q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_k
    )
    a.integer("topk", topk, 1)


def _check_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    topk: int,
) -> None:
    a = check_paged(
        "indexer_topk_paged", q, weights, index_cache, page_table, lengths, cu_seqlens_q
    )
    a.integer("topk", topk, 1)


LARGEST_CUDA_TOPK = 4096  # its lists of candidates share 60 MB of workspace


def _cuda_declines(*args: object) -> str | None:
    topk = args[6]  # in both ops
    if topk > LARGEST_CUDA_TOPK:  # type: ignore[operator]
        return f"keeps at most {LARGEST_CUDA_TOPK} keys of a row, not {topk}"
    return cuda_declines(*args)  # type: ignore[arg-type]


CUDA = Implementation("cuda", declines=_cuda_declines)


def _fake(q: torch.Tensor, *rest: object) -> torch.Tensor:
    topk = rest[5]  # six tensors come before it in both ops
    return q.new_empty((q.shape[0], topk), dtype=torch.int32)  # type: ignore[arg-type]


_op = register(
    "indexer_topk", room=__name__, check=_check, fake=_fake, table=[CUDA, TRITON, CPU, REFERENCE]
)
_paged_op = register(
    "indexer_topk_paged",
    room=__name__,
    check=_check_paged,
    fake=_fake,
    table=[CUDA, TRITON, CPU, REFERENCE],
)
