"""indexer_prepare: the indexer's prologue, from projections to FP8 queries, keys and head weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, float8_e4m3fn, float32

from ..checks import FLOATS, FP32, INT64, Arguments
from ..dispatch import CPU, REFERENCE, Implementation, register
from ..paged_cache import check_index_cache

DIMS = (32, 64, 128)


@dataclass(frozen=True)
class IndexerNorms:
    """The norms of the indexer's queries and keys.

    Attributes:
        q_weight: [Di] float32 or bfloat16, RMSNorm of every query head.
        k_weight, k_bias: [Di] float32 or bfloat16, LayerNorm of the key.
        eps: of both.
    """

    q_weight: Tensor
    k_weight: Tensor
    k_bias: Tensor
    eps: float = 1e-6


def indexer_prepare(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    norms: IndexerNorms,
    cos: Tensor,
    sin: Tensor,
    *,
    index_cache: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prepares queries and keys for `indexer_logits`: norm, RoPE, Hadamard transform, FP8, gate folding.

    y_q = H RoPE(RMSNorm(q)) Di^-0.5 for every token and head, y_k = H RoPE(LayerNorm(k)) Di^-0.5 for every token, with H
    the Hadamard matrix in Sylvester order and NeoX RoPE (halves rotate) over all Di dimensions. A vector y is stored as
    e4m3(y / s), to nearest even, with s the smallest power of two that has max(amax |y|, 1e-4) <= 448 s. Then
    weights[t, j] = gate[t, j] s_q[t, j] Di^-0.5.

    Everything is computed in float32; for bfloat16 inputs the vectors are rounded to bfloat16 after the norm, after
    RoPE and after the Hadamard transform, as separate launches of the published model round them.

    Args:
        q: [T, Hi, Di] float32 or bfloat16, Di 32, 64 or 128, last dimension contiguous.
        k: [T, Di], the dtype of q, last dimension contiguous.
        gate: [T, Hi], the dtype of q, last dimension contiguous. q, gate and k may be splits of one projection.
        norms: weights, bias and eps of the norms.
        cos, sin: [T, Di / 2] float32, last dimension contiguous; M-RoPE is a matter of these tables.
        index_cache: [pages, 64 * (Di + 4)] uint8; if given, k_fp8 and k_scale are also written to it, in place.
        slots: [T] int64, where to; -1 and whatever is outside the cache is skipped. See `write_index_cache`.

    Returns:
        q_fp8: [T, Hi, Di] float8_e4m3fn; weights: [T, Hi] float32; k_fp8: [T, Di] float8_e4m3fn; k_scale: [T] float32.
        A vector with a NaN or an infinity after the transform has NaN codes and the scale NaN.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or only one of index_cache and slots.

    Source: arXiv 2606.10651 (the model), DeepSeek-V3.2 (the indexer).

    Exactness: scales and codes are exact functions of y. Two implementations sum the norms in different orders, so in
    bfloat16 an element of a step may be rounded the other way (0.05% of the vectors, C++ against PyTorch), which moves y
    by at most 2^-6 |y|_2 and most of its codes by at most one; so does Triton for strides that are multiples of 16 and
    others. Bitwise deterministic, whatever the batch around a vector; no host sync; CUDA-graph safe; T = 0 gives empty
    results; allocates the results alone.
    """
    flat = (q, k, gate, norms.q_weight, norms.k_weight, norms.k_bias, cos, sin, norms.eps)
    if index_cache is None and slots is None:
        return _prepare(*flat)
    return _prepare_cached(*flat, index_cache, slots)


def _check(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Arguments:
    a = Arguments("indexer_prepare")
    a.tensor("q", q, "T H D", FLOATS)
    dim = int(a["D"])
    a.one_of("q's last dimension", dim, DIMS)
    a.tensor("k", k, "T D", (q.dtype,))
    a.tensor("gate", gate, "T H", (q.dtype,))
    a.tensor("q_weight", q_weight, "D", FLOATS)
    a.tensor("k_weight", k_weight, "D", FLOATS)
    a.tensor("k_bias", k_bias, "D", FLOATS)
    a.tensor("cos", cos, f"T {dim // 2}", FP32)
    a.tensor("sin", sin, f"T {dim // 2}", FP32)
    a.number("eps", eps)
    return a


def _check_cached(
    q: Tensor,
    k: Tensor,
    gate: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    index_cache: Tensor,
    slots: Tensor,
) -> None:
    a = _check(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps)
    check_index_cache(a, index_cache, int(a["D"]))
    a.tensor("slots", slots, "T", INT64, contiguous=True)


def _fake(
    q: Tensor, k: Tensor, gate: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, heads, dim = q.shape
    return (
        q.new_empty((tokens, heads, dim), dtype=float8_e4m3fn),
        q.new_empty((tokens, heads), dtype=float32),
        q.new_empty((tokens, dim), dtype=float8_e4m3fn),
        q.new_empty((tokens,), dtype=float32),
    )


def _too_many_rows(q: Tensor, *rest: object) -> str | None:
    rows = q.shape[0] * max(q.shape[1], 1)
    return None if rows < 2**31 - 2**16 else f"serves fewer than 2^31 vectors, not {rows}"


def _cuda_declines(
    q: Tensor,
    k: Tensor,
    _gate: Tensor,
    _q_weight: Tensor,
    _k_weight: Tensor,
    _k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    _eps: float,
    index_cache: Tensor | None = None,
    _slots: Tensor | None = None,
) -> str | None:
    moved_by_16 = {"q": q, "k": k, "cos": cos, "sin": sin}
    if index_cache is not None:
        moved_by_16["index_cache"] = index_cache
    for name, x in moved_by_16.items():
        steps = [step for step, size in zip(x.stride()[:-1], x.shape) if size > 1]
        if x.data_ptr() % 16 or any(step * x.element_size() % 16 for step in steps):
            return f"needs {name} and its rows aligned to 16 bytes"
    return _too_many_rows(q)


_table = [
    Implementation("cuda", declines=_cuda_declines),
    Implementation("triton", "triton", declines=_too_many_rows),
    CPU,
    REFERENCE,
]
_prepare = register("indexer_prepare", room=__name__, check=_check, fake=_fake, table=_table)
_prepare_cached = register(
    "indexer_prepare_cached", room=__name__, check=_check_cached, fake=_fake, table=_table
)
