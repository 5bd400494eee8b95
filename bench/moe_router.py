"""Benchmark cases of moe_router, its gradient and routing_map."""

from __future__ import annotations

import torch

import dsa_kernels
from dsa_kernels.moe_router.reference import moe_router as reference
from dsa_kernels.moe_router.reference import moe_router_bwd as reference_bwd
from dsa_kernels.moe_router.reference import routing_map as reference_map

from .case import Case, Unavailable

NUM_EXPERTS, TOPK = 128, 8


def hugging_face(logits):
    """The router of Hugging Face's Qwen3-MoE: no statistics, ties in no defined order."""
    weights, ids = torch.topk(logits.softmax(-1, dtype=torch.float), TOPK)
    return weights / weights.sum(-1, keepdim=True), ids


def sgl_topk_softmax(logits):
    try:
        from sgl_kernel import topk_softmax
    except ImportError as error:
        raise Unavailable("sgl-kernel is not installed") from error
    weights = torch.empty(len(logits), TOPK, device=logits.device)
    ids = torch.empty(len(logits), TOPK, dtype=torch.int32, device=logits.device)
    topk_softmax(weights, ids, logits, renormalize=True)
    return weights, ids


def argsort_map(ids, num_experts):
    """What routing code in plain torch does: one stable sort and a histogram."""
    flat = ids.flatten().long()
    slots = flat.argsort(stable=True)
    rows = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=ids.device))
    return flat.bincount(minlength=num_experts).cumsum(0), slots // TOPK, rows


def sgl_align(ids, num_experts):
    try:
        from sgl_kernel import moe_align_block_size
    except ImportError as error:
        raise Unavailable("sgl-kernel is not installed") from error
    block = 64
    rows = ids.numel() + (num_experts + 1) * (block - 1)
    new = dict(dtype=torch.int32, device=ids.device)
    slots, experts = torch.empty(rows, **new), torch.empty(rows // block + 1, **new)
    total, counts = torch.empty(1, **new), torch.empty(num_experts + 2, **new)
    moe_align_block_size(ids, num_experts + 1, block, slots, experts, total, counts, True)
    return slots, experts, total


def verify_forward(outputs, inputs):
    for actual, expected in zip(outputs, reference(*inputs, TOPK, True)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def verify_backward(dlogits, inputs):
    torch.testing.assert_close(dlogits, reference_bwd(*inputs, True), rtol=1e-4, atol=1e-6)


def verify_map(routing, inputs):
    actual = routing.offsets, routing.row_token, routing.slot_row
    assert all(torch.equal(x, y) for x, y in zip(actual, reference_map(*inputs)))


def case(tokens: int, device: torch.device, quick: bool) -> Case:
    def inputs():
        return (torch.randn(tokens, NUM_EXPERTS, device=device),)

    return Case(
        name=f"route T={tokens}, {NUM_EXPERTS} experts, top-{TOPK}",
        inputs=inputs,
        ours=lambda logits: dsa_kernels.moe_router(logits, TOPK),
        verify=verify_forward,
        peers={
            "eager": lambda logits: reference(logits, TOPK, True),
            "torch.compile": torch.compile(hugging_face, dynamic=False),
            "Hugging Face": hugging_face,
            "sgl-kernel": sgl_topk_softmax,
        },
        bytes=4.0 * tokens * (NUM_EXPERTS + 2 * TOPK) + 8 * NUM_EXPERTS,
        dtype="fp32",
        quick=quick,
        context=tokens,
        series="route",
    )


def backward_case(tokens: int, device: torch.device, quick: bool) -> Case:
    def inputs():
        logits = torch.randn(tokens, NUM_EXPERTS, device=device)
        ids = logits.topk(TOPK).indices.int()
        dweights = torch.randn(tokens, TOPK, device=device)
        return dweights, torch.randn(NUM_EXPERTS, device=device), logits, ids

    return Case(
        name=f"route backward T={tokens}",
        inputs=inputs,
        ours=lambda *args: torch.ops.dsa_kernels.moe_router_bwd(*args, True),
        verify=verify_backward,
        peers={
            "eager": lambda *args: reference_bwd(*args, True),
            "torch.compile": torch.compile(lambda *args: reference_bwd(*args, True), dynamic=False),
        },
        bytes=4.0 * tokens * (2 * NUM_EXPERTS + 2 * TOPK),
        dtype="fp32",
        quick=quick,
        context=tokens,
        series="route backward",
    )


def map_case(tokens: int, device: torch.device, quick: bool) -> Case:
    def inputs():
        return torch.randn(tokens, NUM_EXPERTS, device=device).topk(TOPK).indices.int(), NUM_EXPERTS

    return Case(
        name=f"map T={tokens}, {NUM_EXPERTS} experts, top-{TOPK}",
        inputs=inputs,
        ours=dsa_kernels.routing_map,
        verify=verify_map,
        peers={"eager": reference_map, "argsort": argsort_map, "sgl-kernel": sgl_align},
        bytes=12.0 * tokens * TOPK,
        dtype="fp32",
        quick=quick,
        context=tokens,
        series="map",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            make(t, device, True) for make in (case, backward_case, map_case) for t in (1, 8192)
        ]
    return [
        make(tokens, device, quick=tokens == 8192)
        for make in (case, backward_case, map_case)
        for tokens in (1, 16, 128, 1024, 8192, 32768)
    ]
