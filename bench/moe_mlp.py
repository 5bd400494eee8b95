"""Benchmark cases of moe_mlp: the whole routed layer from (x, weights, ids), forward, and forward with backward."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import dsa_kernels
from dsa_kernels.moe_mlp.reference import moe_mlp as reference
from dsa_kernels.moe_mlp.reference import moe_mlp_bwd as reference_bwd
from dsa_kernels.moe_router.reference import routing_map as reference_map

from .case import Case, Unavailable

HIDDEN, WIDTH, EXPERTS, TOPK = 2048, 768, 128, 8
VERIFIED = 64  # tokens that are compared with the reference


def eager(x, w13, w2, weights, ids):
    return reference(x, w13, w2, weights, *reference_map(ids, len(w13)), False)[0]


def grouped_mm(x, w13, w2, weights, ids):
    """What torch offers: sort, gather, two grouped GEMMs, SwiGLU, scale, scatter-add."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no F.grouped_mm")
    flat = ids.flatten().long()
    slots = flat.argsort(stable=True)
    offsets = F.one_hot(flat, len(w13)).sum(0).cumsum(0).int()
    token = slots // TOPK
    gate, up = F.grouped_mm(x[token], w13.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets)
    y = y * weights.flatten()[slots, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, y).to(x.dtype)


def liger(x, w13, w2, weights, ids):
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise Unavailable("liger-kernel with a fused MoE is not installed") from error
    return LigerFusedMoEFunction.apply(x, w13, w2, ids, weights)


def deep_gemm(x, w13, w2, weights, ids):
    """DeepGEMM's grouped GEMMs on rows padded to 128 an expert; the rest in torch."""
    try:
        import deep_gemm as library
    except ImportError as error:
        raise Unavailable("DeepGEMM is not installed") from error
    flat = ids.flatten().long()
    slots = flat.argsort(stable=True)
    counts = F.one_hot(flat, len(w13)).sum(0)
    padded = (counts + 127) // 128 * 128
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    place = torch.arange(len(slots), device=x.device) + shift[flat[slots]]  # padded row of each row
    rows = len(slots) // 128 * 128 + 128 * len(w13)
    layout = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    layout[place] = flat[slots].int()
    x_rows = x.new_zeros(rows, HIDDEN).index_copy(0, place, x[slots // TOPK])
    h, y = x.new_empty(rows, 2 * WIDTH), x.new_empty(rows, HIDDEN)
    library.m_grouped_bf16_gemm_nt_contiguous(x_rows, w13, h, layout)
    gate, up = h.chunk(2, dim=-1)
    library.m_grouped_bf16_gemm_nt_contiguous(F.silu(gate) * up, w2, y, layout)
    of_slot = torch.empty_like(slots).scatter_(0, slots, place).view(ids.shape)
    return torch.einsum("tk,tkh->th", weights, y[of_slot].float()).to(x.dtype)


def step(layer):
    """Forward and backward of one of the functions above."""

    def run(x, w13, w2, weights, ids, dout):
        leaves = [t.detach().requires_grad_() for t in (x, w13, w2, weights)]
        out = layer(*leaves, ids)
        return out, *torch.autograd.grad(out, leaves, dout)

    return run


def eager_step(x, w13, w2, weights, ids, dout):
    maps = reference_map(ids, len(w13))
    return reference_bwd(dout, x, None, w13, w2, weights, *maps)


def assert_rows(actual, expected):
    """Every row within 2% of its norm: some ten roundings to bfloat16."""
    error = (actual.float() - expected.float()).norm(dim=-1)
    assert (error <= 0.02 * expected.float().norm(dim=-1)).all(), "rows differ from the reference"


def verify_forward(out, inputs):
    x, w13, w2, weights, ids = inputs
    assert_rows(out[:VERIFIED], eager(x[:VERIFIED], w13, w2, weights[:VERIFIED], ids[:VERIFIED]))


def verify_step(outputs, inputs):
    x, w13, w2, weights, ids, dout = inputs
    few = (t[:VERIFIED] for t in (x, weights, ids, dout))
    x, weights, ids, dout = few
    dx, _, _, dweights = eager_step(x, w13, w2, weights, ids, dout)
    assert_rows(outputs[0][:VERIFIED], eager(x, w13, w2, weights, ids))
    assert_rows(outputs[1][:VERIFIED], dx)
    assert_rows(outputs[4][:VERIFIED].reshape(1, -1), dweights.reshape(1, -1))
    assert all(gradient.isfinite().all() for gradient in outputs[2:4])


@functools.cache
def expert_weights(num_experts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """One set for all cases: 1.2 GB for 128 experts, more than any cache holds."""
    w13 = torch.empty(num_experts, 2 * WIDTH, HIDDEN, dtype=torch.bfloat16, device=device)
    w2 = torch.empty(num_experts, HIDDEN, WIDTH, dtype=torch.bfloat16, device=device)
    return w13.normal_(std=HIDDEN**-0.5), w2.normal_(std=WIDTH**-0.5)


def inputs(tokens: int, num_experts: int, device: torch.device):
    ids = torch.rand(tokens, num_experts, device=device).topk(TOPK).indices.int()
    weights = torch.rand(tokens, TOPK, device=device)
    x = torch.randn(tokens, HIDDEN, device=device).bfloat16()
    weights = weights / weights.sum(-1, keepdim=True)
    return x, *expert_weights(num_experts, device), weights, ids


def case(tokens: int, num_experts: int, device: torch.device, quick: bool) -> Case:
    active = num_experts * (
        1 - (1 - TOPK / num_experts) ** tokens
    )  # experts with a token, expected
    return Case(
        name=f"forward T={tokens}, {num_experts} experts, top-{TOPK}",
        inputs=lambda: inputs(tokens, num_experts, device),
        ours=dsa_kernels.moe_mlp,
        verify=verify_forward,
        peers={
            "eager": eager,
            "grouped_mm": grouped_mm,
            "grouped_mm compiled": torch.compile(grouped_mm, dynamic=False),
            "Liger": liger,
            "DeepGEMM": deep_gemm,
        },
        flops=6.0 * tokens * TOPK * HIDDEN * WIDTH,
        bytes=6.0 * active * HIDDEN * WIDTH + 4.0 * tokens * HIDDEN + 8.0 * tokens * TOPK,
        quick=quick,
        context=tokens,
        series=f"forward, {num_experts} experts",
    )


def step_case(tokens: int, num_experts: int, device: torch.device, quick: bool) -> Case:
    def with_dout():
        return *inputs(tokens, num_experts, device), torch.randn(
            tokens, HIDDEN, device=device
        ).bfloat16()

    return Case(
        name=f"forward + backward T={tokens}, {num_experts} experts, top-{TOPK}",
        inputs=with_dout,
        ours=step(dsa_kernels.moe_mlp),
        verify=verify_step,
        peers={
            "eager": eager_step,
            "grouped_mm": step(grouped_mm),
            "grouped_mm compiled": step(torch.compile(grouped_mm, dynamic=False)),
            "Liger": step(liger),
        },
        flops=18.0 * tokens * TOPK * HIDDEN * WIDTH,
        bytes=18.0 * num_experts * HIDDEN * WIDTH + 14.0 * tokens * HIDDEN,
        quick=quick,
        context=tokens,
        series=f"forward + backward, {num_experts} experts",
    )


def cases(device: torch.device) -> list[Case]:
    if (
        device.type == "cpu"
    ):  # 8 experts: one rank of 16, at the rows an expert that 1024 tokens give
        return [case(1, EXPERTS, device, True), case(4, EXPERTS, device, True),
                case(64, TOPK, device, True), step_case(16, TOPK, device, True)]  # fmt: skip
    tokens = (1, 16, 128, 1024, 8192, 32768)
    return [
        *(case(t, EXPERTS, device, quick=t in (1, 8192)) for t in tokens),
        *(step_case(t, EXPERTS, device, quick=t == 8192) for t in (1024, 8192, 32768)),
    ]
