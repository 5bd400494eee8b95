"""Benchmark cases of indexer_logits, and the inputs and peers that indexer_topk's share."""

from __future__ import annotations

import functools

import torch

import dsa_kernels
from dsa_kernels.indexer_logits.reference import indexer_logits as reference

from .case import Case, Unavailable


def packed_inputs(tokens, length, heads, dim, device):
    """One sequence whose last `tokens` of `length` tokens are the queries."""
    return (
        torch.randn(tokens, heads, dim, device=device).to(torch.float8_e4m3fn),
        torch.rand(tokens, heads, device=device),
        torch.randn(length, dim, device=device).to(torch.float8_e4m3fn),
        torch.rand(length, device=device) + 0.5,
        torch.tensor([0, tokens], dtype=torch.int32, device=device),
        torch.tensor([0, length], dtype=torch.int32, device=device),
    )


def pairs(tokens, length):
    """Visible (query, key) pairs."""
    return tokens * (length - tokens) + tokens * (tokens + 1) // 2


def traffic(tokens, length, heads, dim):
    """Bytes of q, weights, keys and scales."""
    return tokens * heads * (dim + 4) + length * (dim + 4)


def eager(function, q, *args):
    """The reference, where its [T, H, L] intermediates fit."""
    keys = args[1].shape[0] if args[1].dtype == torch.float8_e4m3fn else args[2].shape[1] * 64
    needed = 8 * q.shape[0] * q.shape[1] * keys
    if q.is_cuda and needed > torch.cuda.mem_get_info(q.device)[0]:
        raise Unavailable(f"eager needs {needed >> 30} GiB")
    return function(q, *args)


@functools.cache
def compiled(function):
    return torch.compile(function)


def deep_gemm_logits(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, width):
    """DeepGEMM takes 32 or 64 heads: fewer are padded with zeros."""
    try:
        import deep_gemm
    except ImportError as error:
        raise Unavailable("deep_gemm is not installed") from error
    tokens, heads, dim = q.shape
    if heads < 32:
        padded = torch.zeros(tokens, 32, dim, dtype=torch.uint8, device=q.device)
        padded[:, :heads] = q.view(torch.uint8)
        q = padded.view(q.dtype)
        weights = torch.nn.functional.pad(weights, (0, 32 - heads))
    end = torch.arange(width - tokens + 1, width + 1, dtype=torch.int32, device=q.device)
    return deep_gemm.fp8_mqa_logits(q, (k, k_scale), weights, torch.zeros_like(end), end)


def verify(logits, inputs):
    q, weights, k, k_scale, _, cu_seqlens_k, width = inputs
    last = slice(-8, None)
    cu_seqlens_q = torch.tensor([0, len(q[last])], dtype=torch.int32, device=q.device)
    expected = reference(q[last], weights[last], k, k_scale, cu_seqlens_q, cu_seqlens_k, width)
    largest = expected[expected.isfinite()].abs().max()
    torch.testing.assert_close(logits[last], expected, rtol=0, atol=1e-2 * largest.item())


def case(tokens: int, length: int, heads: int, dim: int, device: torch.device, quick: bool) -> Case:
    peers = {"eager": functools.partial(eager, reference)}
    if device.type == "cuda":
        peers["torch.compile"] = functools.partial(eager, compiled(reference))
        peers["DeepGEMM"] = deep_gemm_logits
    return Case(
        name=f"{tokens} x {length}, {heads} x {dim}",
        inputs=lambda: (*packed_inputs(tokens, length, heads, dim, device), length),
        ours=lambda *args: dsa_kernels.indexer_logits(*args[:-1], max_seqlen_k=args[-1]),
        verify=verify,
        peers=peers,
        flops=2.0 * pairs(tokens, length) * heads * dim,
        bytes=traffic(tokens, length, heads, dim) + 4.0 * tokens * length,
        dtype="fp8" if device.type == "cuda" else "fp32",
        quick=quick,
        context=length,
        series=f"{tokens} queries, {heads} x {dim}",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [case(128, length, 16, 64, device, True) for length in (2048, 8192)]
    return [
        case(2048, length, heads, dim, device, quick=length == 131072)
        for heads, dim in ((16, 64), (32, 128), (64, 128))
        for length in (8192, 32768, 131072)
    ]
