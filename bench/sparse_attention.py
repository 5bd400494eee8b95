"""Benchmark cases of sparse_attention: index sets of controlled overlap and random ones, one packed sequence."""

from __future__ import annotations

import importlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dsa_kernels
from dsa_kernels.sparse_attention.reference import sparse_attention as reference

from .case import Case, Unavailable

HEADS, GROUPS, DIM, TOPK = 32, 4, 128, 2048
BLOCK = 16


def index_sets(tokens: int, context: int, rho: float | None, device: torch.device) -> torch.Tensor:
    """Sets of the last `tokens` queries of a causal sequence of `context`, int32 [tokens, TOPK].

    rho None: every query picks TOPK random visible keys. Otherwise every block of BLOCK queries picks a pool of
    rho * TOPK random keys that its first query sees, and each query TOPK of the pool: 16 neighbours together need
    about rho * TOPK distinct keys (exactly that many for rho <= 4, up to a part in 100). Ascending, -1 in the tail.
    """
    first = context - tokens
    out = torch.full((tokens, TOPK), -1, dtype=torch.int32, device=device)
    step = BLOCK * max(1, 2**22 // (BLOCK * context)) * BLOCK
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        blocks = (stop - start + BLOCK - 1) // BLOCK
        position = first + torch.arange(start, start + blocks * BLOCK, device=device)
        if rho is None:
            out[start:stop] = random_subsets(position + 1, context, device)[: stop - start]
            continue
        size = int(rho * TOPK)
        pool = random_subsets(position[::BLOCK] + 1, context, device, size)  # [blocks, size]
        chosen = random_subsets((pool >= 0).sum(1).repeat_interleave(BLOCK), size, device)
        picked = pool.repeat_interleave(BLOCK, 0).gather(1, chosen.clamp(min=0).long())
        out[start:stop] = torch.where(chosen < 0, -1, picked)[: stop - start]
    return out


def random_subsets(
    visible: torch.Tensor, width: int, device: torch.device, size: int = TOPK
) -> torch.Tensor:
    """Row r: `size` random ones of [0, visible[r]), ascending, -1 in the tail; int32 [R, size]."""
    noise = torch.rand(visible.shape[0], width, device=device)
    noise.masked_fill_(torch.arange(width, device=device) >= visible[:, None], 2.0)
    values, ids = noise.topk(min(size, width), largest=False, sorted=False)
    ids = ids.masked_fill(values >= 2.0, width).sort(-1).values.int()
    ids = torch.nn.functional.pad(ids, (0, size - ids.shape[1]), value=width)
    return torch.where(ids == width, -1, ids)


def inputs(tokens: int, context: int, rho: float | None, device: torch.device) -> tuple:
    q = torch.randn(tokens, HEADS, DIM, device=device).bfloat16()
    k, v = torch.randn(2, context, GROUPS, DIM, device=device).bfloat16()
    lengths = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (tokens, context)]
    return q, k, v, index_sets(tokens, context, rho, device), *lengths


def with_backward(attention):
    """attention's output and gradients for a gradient of ones, which is what verify expects."""

    def run(q, k, v, *rest):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = attention(q, k, v, *rest)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return run


def ours(q, k, v, *rest):
    return dsa_kernels.sparse_attention(q, k, v, *rest)[0]


def eager(q, k, v, indices, cu_seqlens_q, cu_seqlens_k):
    if q.shape[0] * k.shape[0] * HEADS * 4 > 2**33:
        raise Unavailable("its score matrix exceeds 8 GB")
    return reference(q, k, v, indices, cu_seqlens_q, cu_seqlens_k, DIM**-0.5, False)[0]


def triton_gather(*args):
    """The plain kernel by token: ours with the union switched off."""
    if args[0].device.type != "cuda":
        raise Unavailable("needs a GPU")
    module = importlib.import_module("dsa_kernels.sparse_attention.triton")
    module.FORCE_GATHER = True
    try:
        with dsa_kernels.use("triton"):
            return ours(*args)
    finally:
        module.FORCE_GATHER = False


def dense(backend):
    def run(q, k, v, indices, cu_seqlens_q, cu_seqlens_k):
        if q.device.type != "cuda" or q.shape[0] != k.shape[0]:
            raise Unavailable("dense attention of a whole sequence on a GPU")
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads, is_causal=True, enable_gqa=True
            )
        return out[0].transpose(0, 1)

    return run


def flash_attention(q, k, v, indices, cu_seqlens_q, cu_seqlens_k):
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable("flash-attn is not installed") from error
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal=True
    )


PEERS = {
    "eager": eager,
    "triton gather": triton_gather,
    "dense flash": dense(SDPBackend.FLASH_ATTENTION),
    "dense cuDNN": dense(SDPBackend.CUDNN_ATTENTION),
    "dense FA2": flash_attention,
}


def verify(result, arguments):
    """64 random tokens in float32, forward; each is its own sequence tail, so the rest is not computed."""
    out = result[0] if isinstance(result, tuple) else result
    q, k, v, indices, _, cu_seqlens_k = arguments
    rows = torch.randperm(q.shape[0], device=q.device)[:64].sort().values
    few = torch.tensor([0, len(rows)], dtype=torch.int32, device=q.device)
    want, _ = reference(
        q[rows].float(), k.float(), v.float(), indices[rows], few, cu_seqlens_k, DIM**-0.5, False
    )
    torch.testing.assert_close(out[rows].float(), want, rtol=2e-2, atol=2e-3)
    if isinstance(result, tuple):
        for gradient, x in zip(result[1:], arguments[:3]):
            assert gradient.shape == x.shape and gradient.isfinite().all()
        torch.testing.assert_close(  # of v: every token's weights sum to 1
            result[3].float().sum((0, 2)), torch.full((GROUPS,), float(out.numel() // GROUPS), device=q.device),
            rtol=1e-2, atol=0,
        )  # fmt: skip


def case(tokens, context, rho, device, *, backward=False, quick=False) -> Case:
    first = context - tokens
    pairs = sum(min(TOPK, first + t + 1) for t in range(tokens)) * HEADS
    kind = "random" if rho is None else f"rho={rho:g}"
    passes = "fwd+bwd" if backward else "fwd"
    size = 2 * (2 * tokens * HEADS + 2 * context * GROUPS) * DIM
    return Case(
        name=f"{tokens} x {context} {kind} {passes}",
        inputs=lambda: inputs(tokens, context, rho, device),
        ours=with_backward(ours) if backward else ours,
        verify=verify,
        peers={name: with_backward(peer) if backward else peer for name, peer in PEERS.items()},
        flops=4.0 * pairs * DIM * (3.5 if backward else 1),
        bytes=(3.0 if backward else 1) * size + 4.0 * tokens * TOPK,
        quick=quick,
        context=context,
        series=f"{kind} {passes}",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case(128, 8192, 2, device, quick=True),
            case(128, 8192, None, device, quick=True),
            case(64, 8192, None, device, backward=True, quick=True),
        ]
    sizes = (8192, 32768, 131072)
    return [
        *(case(n, n, rho, device, quick=n == 131072) for n in sizes for rho in (1.5, 2, 4, None)),
        *(case(32768, 32768, rho, device, backward=True, quick=rho == 2) for rho in (1.5, 2, 4)),
    ]
