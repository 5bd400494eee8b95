"""Benchmark cases of paged_cache: writers and readers at the published model's 4 KV heads of 128 and index keys of 64."""

from __future__ import annotations

import functools

import torch

import dsa_kernels
from dsa_kernels.paged_cache import reference

from .case import Case

HEADS, DIM, INDEX_DIM = 4, 128, 64


def kv_caches(pages: int, device: torch.device):
    shape = (pages, 64, HEADS, DIM)
    return [torch.zeros(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)]


def index_cache(pages: int, device: torch.device):
    return torch.zeros(pages, 64 * (INDEX_DIM + 4), dtype=torch.uint8, device=device)


def write_inputs(op: str, tokens: int, device: torch.device):
    pages = tokens // 64 + 1
    slots = torch.randperm(64 * pages, device=device)[:tokens]
    if op == "write_kv_cache":
        k, v = torch.randn(2, tokens, HEADS, DIM, device=device).bfloat16()
        return (k, v, *kv_caches(pages, device), slots)
    k = torch.randn(tokens, INDEX_DIM, device=device).to(torch.float8_e4m3fn)
    return (k, torch.rand(tokens, device=device), index_cache(pages, device), slots)


def read_inputs(op: str, batch: int, length: int, device: torch.device):
    max_pages = -(-length // 64)
    pages = batch * max_pages
    table = torch.randperm(pages, device=device).int().view(batch, max_pages)
    cu_seqlens = length * torch.arange(batch + 1, dtype=torch.int32, device=device)
    if op == "read_kv_cache":
        return (*kv_caches(pages, device), table, cu_seqlens, batch * length)
    return (index_cache(pages, device), table, cu_seqlens, batch * length)


@functools.cache
def compiled(op: str):
    return torch.compile(getattr(reference, op), dynamic=False)


def index_copy(k, v, k_cache, v_cache, slots):
    """Two calls of torch; slots must all be valid."""
    k_cache.view(-1, HEADS, DIM).index_copy_(0, slots, k)
    v_cache.view(-1, HEADS, DIM).index_copy_(0, slots, v)


def index_select(k_cache, v_cache, page_table, cu_seqlens, total):
    """Whole pages of equally long requests; lengths must be multiples of 64."""
    pages = page_table.flatten()
    return tuple(x.index_select(0, pages).view(total, HEADS, DIM) for x in (k_cache, v_cache))


def verify_write(result, inputs):
    *rows, slots = inputs
    if len(inputs) == 5:
        k, v, k_cache, v_cache = rows
        assert torch.equal(k_cache[slots // 64, slots % 64], k)
        assert torch.equal(v_cache[slots // 64, slots % 64], v)
    else:
        k, k_scale, cache = rows
        keys, scales = reference.index_parts(cache)
        assert torch.equal(keys[slots // 64, slots % 64], k.view(torch.uint8))
        assert torch.equal(scales[slots // 64, slots % 64], k_scale)


def verify_read(op: str):
    def verify(result, inputs):
        for actual, expected in zip(result, getattr(reference, op)(*inputs), strict=True):
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))

    return verify


def row_bytes(op: str) -> int:
    return 2 * HEADS * DIM * 2 if "kv" in op else INDEX_DIM + 4


def write_case(op: str, tokens: int, device: torch.device, quick: bool) -> Case:
    peers = {"eager": getattr(reference, op), "torch.compile": compiled(op)}
    if op == "write_kv_cache":
        peers["index_copy_"] = index_copy
    return Case(
        name=f"{op}, {tokens} tokens",
        inputs=lambda: write_inputs(op, tokens, device),
        ours=getattr(dsa_kernels, op),
        verify=verify_write,
        peers=peers,
        bytes=float(tokens * (2 * row_bytes(op) + 8)),
        quick=quick,
    )


def read_case(op: str, batch: int, length: int, device: torch.device, quick: bool) -> Case:
    peers = {"eager": getattr(reference, op)}
    if op == "read_kv_cache":
        peers["index_select"] = index_select
    return Case(
        name=f"{op}, {batch} x {length}",
        inputs=lambda: read_inputs(op, batch, length, device),
        ours=getattr(dsa_kernels, op),
        verify=verify_read(op),
        peers=peers,
        bytes=float(batch * length * (2 * row_bytes(op) + 4 / 64)),
        quick=quick,
        context=length,
        series=f"{op}, {batch} requests",
    )


def cases(device: torch.device) -> list[Case]:
    writers, readers = (
        ("write_kv_cache", "write_index_cache"),
        ("read_kv_cache", "read_index_cache"),
    )
    if device.type == "cpu":
        return [
            *(write_case(op, 8192, device, True) for op in writers),
            *(read_case(op, 4, 4096, device, True) for op in readers),
        ]
    return [
        *(write_case(op, tokens, device, tokens == 8192) for op in writers for tokens in (64, 8192, 131072)),
        *(read_case(op, 8, length, device, length == 16384) for op in readers for length in (4096, 16384, 131072)),
    ]  # fmt: skip
