"""Benchmark cases of indexer_prepare: the published model's 16 heads of 64, bfloat16, splits of one projection."""

from __future__ import annotations

import functools

import torch

import dsa_kernels
from dsa_kernels.indexer_prepare.reference import indexer_prepare as reference
from dsa_kernels.indexer_prepare.reference import indexer_prepare_cached as reference_cached

from .case import Case

HEADS, DIM, EPS = 16, 64, 1e-6


def make_inputs(tokens: int, cached: bool, device: torch.device):
    width = HEADS * DIM
    projection = torch.randn(tokens, width + HEADS, device=device, dtype=torch.bfloat16)
    q, gate = projection.split([width, HEADS], 1)
    k = torch.randn(tokens, DIM, device=device, dtype=torch.bfloat16)
    norms = [torch.rand(DIM, device=device) for _ in range(3)]
    angle = torch.rand(tokens, DIM // 2, device=device)
    flat = (q.unflatten(1, (HEADS, DIM)), k, gate, *norms, angle.cos(), angle.sin(), EPS)
    if not cached:
        return flat
    pages = tokens // 64 + 1
    cache = torch.zeros(pages, 64 * (DIM + 4), dtype=torch.uint8, device=device)
    return (*flat, cache, torch.randperm(64 * pages, device=device)[:tokens])


def ours(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, index_cache=None, slots=None):
    norms = dsa_kernels.IndexerNorms(q_weight, k_weight, k_bias, eps)
    return dsa_kernels.indexer_prepare(
        q, k, gate, norms, cos, sin, index_cache=index_cache, slots=slots
    )


@functools.cache
def compiled(cached: bool):
    return torch.compile(reference_cached if cached else reference, dynamic=False)


def verify(result, inputs):
    """Vectors with a code or a scale unlike the reference's: about one in a hundred, where a sum rounded otherwise."""
    expected = reference(*inputs[:9])
    for codes, scale in ((0, 1), (2, 3)):
        same = (result[codes].float() == expected[codes].float()).all(-1)
        same &= result[scale] == expected[scale]
        assert same.float().mean() > 15 / 16
    if len(inputs) > 9:
        cache, slots = inputs[9:]
        keys = cache[:, : 64 * DIM].unflatten(1, (64, DIM))[slots // 64, slots % 64]
        assert torch.equal(keys, result[2].view(torch.uint8))


def copy_of(size: float, device: torch.device):
    """A copy that reads and writes as many bytes together: what a copy's rate is at this size, launch included."""
    source = torch.zeros(int(size / 2), dtype=torch.uint8, device=device)
    return lambda *inputs: source.clone()


def case(tokens: int, cached: bool, device: torch.device, quick: bool) -> Case:
    read = 2 * (HEADS * DIM + HEADS + DIM) + 4 * DIM
    written = HEADS * DIM + 4 * HEADS + DIM + 4
    size = float(tokens * (read + written + cached * (8 + DIM + 4)))
    return Case(
        name=f"{tokens} tokens, {HEADS} x {DIM}" + (", cached" if cached else ""),
        inputs=lambda: make_inputs(tokens, cached, device),
        ours=ours,
        verify=verify,
        peers={
            "eager": reference_cached if cached else reference,
            "torch.compile": compiled(cached),
            "copy of as many bytes": copy_of(size, device),
        },
        bytes=size,
        quick=quick,
        context=tokens,
        series="cached" if cached else "packed",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [case(tokens, False, device, True) for tokens in (1024, 4096)]
    return [
        *(case(tokens, False, device, tokens == 8192) for tokens in (2048, 8192, 32768, 131072)),
        *(case(tokens, True, device, tokens in (1, 8192)) for tokens in (1, 64, 8192)),
    ]
