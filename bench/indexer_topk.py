"""Benchmark cases of indexer_topk and indexer_topk_paged: a prefill chunk at the end of a context, and decode."""

from __future__ import annotations

import functools

import torch

import dsa_kernels
from dsa_kernels.indexer_topk.reference import indexer_topk as reference
from dsa_kernels.indexer_topk.reference import indexer_topk_paged as reference_paged
from dsa_kernels.topk_select.reference import topk_select as sorted_rows

from .case import Case, Unavailable
from .indexer_logits import compiled, deep_gemm_logits, eager, packed_inputs, pairs, traffic

TOPK = 2048


def prefill(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk, width):
    args = (q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk)
    return dsa_kernels.indexer_topk(*args, max_seqlen_k=width)


def score_then_select(
    q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk, width, lengths=None
):
    """Our own ops with the score matrix in memory. lengths: keys that each token sees, if not of one sequence."""
    args = (q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k)
    scores = dsa_kernels.indexer_logits(*args, max_seqlen_k=width)
    if lengths is None:
        lengths = torch.arange(width - len(q) + 1, width + 1, dtype=torch.int32, device=q.device)
    return dsa_kernels.topk_select(scores, topk, lengths=lengths)


def deep_gemm_and_sgl(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk, width):
    scores = deep_gemm_logits(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, width)
    try:
        from sgl_kernel import fast_topk_v2
    except ImportError as error:
        raise Unavailable("sgl-kernel is not installed") from error
    lengths = torch.arange(width - len(q) + 1, width + 1, dtype=torch.int32, device=q.device)
    return fast_topk_v2(scores, lengths, topk)


def verify_prefill(indices, inputs):
    """The last rows: exactly the sort of the implementation's own scores."""
    q, weights, k, k_scale, _, cu_seqlens_k, topk, width = inputs
    rows = min(8, len(q))
    cu_seqlens_q = torch.tensor([0, rows], dtype=torch.int32, device=q.device)
    args = (q[-rows:], weights[-rows:], k, k_scale, cu_seqlens_q, cu_seqlens_k)
    scores = dsa_kernels.indexer_logits(*args, max_seqlen_k=width)
    seen = torch.arange(width - rows + 1, width + 1, dtype=torch.int32, device=q.device)
    assert torch.equal(indices[-rows:], sorted_rows(scores, topk, None, seen))


def prefill_case(
    tokens: int, length: int, device: torch.device, quick: bool, heads: int = 16, dim: int = 64
) -> Case:
    peers = {"eager": functools.partial(eager, reference), "logits, topk_select": score_then_select}
    if device.type == "cuda":
        peers["torch.compile"] = functools.partial(eager, compiled(reference))
        peers["DeepGEMM + sgl"] = deep_gemm_and_sgl
    return Case(
        name=f"{tokens} x {length}, {heads} x {dim} k={TOPK}",
        inputs=lambda: (*packed_inputs(tokens, length, heads, dim, device), TOPK, length),
        ours=prefill,
        verify=verify_prefill,
        peers=peers,
        flops=2.0 * pairs(tokens, length) * heads * dim,
        bytes=traffic(tokens, length, heads, dim) + 4.0 * tokens * TOPK,
        dtype="fp8" if device.type == "cuda" else "fp32",
        quick=quick,
        context=length,
        series=("whole sequence" if tokens == length else f"{tokens} queries")
        + ("" if (heads, dim) == (16, 64) else f", {heads} x {dim}"),
    )


MIXED = [2048 + 195 * i for i in range(64)]  # lengths of 64 whole sequences, up to 14333


def mixed_inputs(heads, dim, device):
    """Whole sequences of mixed lengths, packed."""
    total = sum(MIXED)
    cu_seqlens = torch.tensor([0, *MIXED], dtype=torch.int32, device=device).cumsum(0).int()
    inputs = packed_inputs(total, total, heads, dim, device)[:4]
    return (*inputs, cu_seqlens, cu_seqlens, TOPK, max(MIXED))


def verify_mixed(indices, inputs):
    """The last rows of the last sequence, as if it were alone."""
    q, weights, k, k_scale, _, _, topk, _ = inputs
    length = MIXED[-1]
    last = (q[-length:], weights[-length:], k[-length:], k_scale[-length:])
    alone = torch.tensor([0, length], dtype=torch.int32, device=q.device)
    verify_prefill(indices[-length:], (*last, alone, alone, topk, length))


def mixed_case(device: torch.device) -> Case:
    heads, dim = 16, 64
    seen = sum(pairs(length, length) for length in MIXED)
    lengths = torch.cat([torch.arange(1, n + 1, dtype=torch.int32) for n in MIXED]).to(device)
    return Case(
        name=f"64 sequences of {MIXED[0]} to {MIXED[-1]}, {heads} x {dim} k={TOPK}",
        inputs=lambda: mixed_inputs(heads, dim, device),
        ours=prefill,
        verify=verify_mixed,
        peers={"logits, topk_select": functools.partial(score_then_select, lengths=lengths)},
        flops=2.0 * seen * heads * dim,
        bytes=traffic(sum(MIXED), sum(MIXED), heads, dim) + 4.0 * sum(MIXED) * TOPK,
        dtype="fp8",
    )


def paged_inputs(batch, length, device):
    """One query a request; the pages of all requests shuffled."""
    heads, dim, pages = 16, 64, length // 64
    cache = torch.randn(batch * pages, 64, dim, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(batch * pages, 64, device=device) + 0.5
    codes = [cache.view(torch.uint8).flatten(1), scales.view(torch.uint8)]
    return (
        torch.randn(batch, heads, dim, device=device).to(torch.float8_e4m3fn),
        torch.rand(batch, heads, device=device),
        torch.cat(codes, 1),
        torch.randperm(batch * pages, device=device).int().view(batch, pages),
        torch.full((batch,), length, dtype=torch.int32, device=device),
        torch.arange(batch + 1, dtype=torch.int32, device=device),
        TOPK,
    )


def verify_decode(indices, inputs):
    scores = dsa_kernels.indexer_logits_paged(*inputs[:-1])[:8]
    assert torch.equal(indices[:8], sorted_rows(scores, inputs[-1], None, None))


def decode_case(batch: int, length: int, device: torch.device, quick: bool) -> Case:
    heads, dim = 16, 64
    return Case(
        name=f"decode {batch} x {length}, {heads} x {dim} k={TOPK}",
        inputs=lambda: paged_inputs(batch, length, device),
        ours=dsa_kernels.indexer_topk_paged,
        verify=verify_decode,
        peers={"eager": functools.partial(eager, reference_paged)},
        flops=2.0 * batch * length * heads * dim,
        bytes=batch * (heads * (dim + 4) + length * (dim + 4) + 4.0 * TOPK),
        dtype="fp8" if device.type == "cuda" else "fp32",
        quick=quick,
        context=length,
        series=f"decode, batch {batch}",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            prefill_case(128, 4096, device, True),
            prefill_case(256, 8192, device, True),
            decode_case(4, 8192, device, True),
            decode_case(1, 131072, device, True),
        ]
    prefills = [prefill_case(2048, n, device, True) for n in (8192, 32768, 131072)]
    whole = [prefill_case(n, n, device, False) for n in (8192, 131072)]
    whole.append(prefill_case(8192, 8192, device, False, heads=32, dim=128))
    decodes = [
        decode_case(batch, length, device, True)
        for batch, length in ((1, 32768), (1, 131072), (8, 131072), (64, 8192), (64, 65536))
    ]
    return [*prefills, *whole, mixed_case(device), *decodes]
