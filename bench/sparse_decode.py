"""Benchmark cases of sparse_decode: one new token a request, random selections (the worst case for a gather)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import dsa_kernels
from dsa_kernels.sparse_decode.reference import sparse_decode as reference

from .case import Case, Unavailable

HEADS, KV_HEADS, DIM, TOPK = 32, 4, 128, 2048


def inputs(batch, context, device):
    num_pages = batch * context // 64
    shape = (num_pages, 64, KV_HEADS, DIM)
    caches = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, HEADS, DIM, device=device, dtype=torch.bfloat16)
    chosen = torch.rand(batch, context, device=device).topk(TOPK, sorted=False).indices
    indices = chosen.sort(-1).values.int()
    page_table = torch.randperm(num_pages, device=device).int().view(batch, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    boundaries = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return q, *caches, indices, page_table, lengths, boundaries


def eager(*args):
    return reference(*args, DIM**-0.5)


def slots(indices, page_table):
    return page_table.gather(1, (indices // 64).long()) * 64 + indices % 64


def gathered_sdpa(q, k_cache, v_cache, indices, page_table, lengths, boundaries):
    rows = slots(indices, page_table).long()
    keys, values = (c.flatten(0, 1)[rows].transpose(1, 2) for c in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def flash_attn(q, k_cache, v_cache, indices, page_table, lengths, boundaries):
    """FlashAttention-3 over pages of one token."""
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError as error:
        raise Unavailable("FlashAttention-3 is not installed") from error
    if not q.is_cuda:
        raise Unavailable("FlashAttention-3 serves CUDA tensors")
    caches = (c.view(-1, 1, KV_HEADS, DIM) for c in (k_cache, v_cache))
    return flash_attn_with_kvcache(
        q[:, None], *caches, page_table=slots(indices, page_table), cache_seqlens=lengths.clamp(max=TOPK)
    )  # fmt: skip


def verify(result, args):
    """The first and the last request against the definition in float64."""
    for row in (slice(0, 1), slice(-1, None)):
        q, k_cache, v_cache, indices, page_table, lengths, boundaries = args
        one = (indices[row], page_table[row], lengths[row], boundaries[:2])
        out, lse = reference(q[row].double(), k_cache, v_cache, *one, DIM**-0.5)
        assert (result[0][row].double() - out).norm() / out.norm() < 1e-2  # bf16 result
        assert (result[1][row] - lse).abs().max() < 1e-3


def case(batch: int, context: int, device: torch.device) -> Case:
    return Case(
        name=f"B={batch}, k={TOPK} of {context}, {HEADS}/{KV_HEADS} x {DIM}",
        inputs=lambda: inputs(batch, context, device),
        ours=dsa_kernels.sparse_decode,
        verify=verify,
        peers={"eager": eager, "gathered SDPA": gathered_sdpa, "FA3 page 1": flash_attn},
        flops=4.0 * batch * TOPK * HEADS * DIM,
        bytes=batch * (4.0 * TOPK * KV_HEADS * DIM + 4.0 * TOPK + 4.0 * HEADS * DIM),
        quick=True,
        context=context,
        series=f"B={batch}",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [case(1, 32768, device), case(8, 8192, device)]
    return [case(1, 131072, device), case(8, 131072, device), case(64, 65536, device)]
