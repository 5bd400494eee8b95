"""Benchmark cases of grouped_gemm: the model's up projection with rows of T tokens, its gradients, and FP8."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import dsa_kernels
from dsa_kernels.grouped_gemm import reference

from .case import Case, Unavailable

DEPTH, COLUMNS, EXPERTS, TOPK = 2048, 1536, 128, 8
ALIGNED = 128  # DeepGEMM's row alignment; the rows of large cases have it


def torch_grouped_mm(a, b, offsets):
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no F.grouped_mm")
    return F.grouped_mm(a, b.transpose(1, 2), offs=offsets[1:])


def torch_wgrad(dc, a, offsets):
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no F.grouped_mm")
    return F.grouped_mm(dc.T, a, offs=offsets[1:])


def deep_gemm_layout(rows, offsets):
    """DeepGEMM and the expert of each row."""
    try:
        import deep_gemm
    except ImportError as error:
        raise Unavailable("DeepGEMM is not installed") from error
    if rows < ALIGNED * EXPERTS:
        raise Unavailable(f"rows an expert not a multiple of {ALIGNED}")
    row = torch.arange(rows, dtype=torch.int32, device=offsets.device)
    return deep_gemm, torch.bucketize(row, offsets[1:], right=True, out_int32=True)


def deep_gemm_bf16(a, b, offsets):
    library, layout = deep_gemm_layout(len(a), offsets)
    out = a.new_empty(len(a), b.shape[1])
    library.m_grouped_bf16_gemm_nt_contiguous(a, b, out, layout)
    return out


def deep_gemm_fp8(a, a_scale, b, b_scale, offsets):
    library, layout = deep_gemm_layout(len(a), offsets)
    out = torch.empty(len(a), b.shape[1], dtype=torch.bfloat16, device=a.device)
    library.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), out, layout)
    return out


def assert_rows(actual, expected):
    """Every row within 1% of its norm: FP8 sums keep 14 bits, outputs 8."""
    error = (actual.float() - expected.float()).norm(dim=-1)
    assert (error <= 0.01 * expected.float().norm(dim=-1)).all(), "rows differ from the reference"


def verify(out, inputs):
    assert_rows(out, reference.grouped_gemm(*inputs))


def verify_wgrad(out, inputs):
    assert_rows(out, reference.grouped_gemm_wgrad(*inputs))


def verify_fp8(out, inputs):
    a, a_scale, b, b_scale, offsets = inputs
    first = int(offsets[1])  # the rows of one expert
    few = a[:first], a_scale[:first], b[:1], b_scale[:1], offsets[:2].contiguous()
    assert_rows(out[:first], reference.grouped_gemm_fp8(*few))


@functools.cache
def expert_weights(device: torch.device) -> torch.Tensor:
    """One set for all cases: 0.8 GB, more than any cache holds."""
    b = torch.empty(EXPERTS, COLUMNS, DEPTH, dtype=torch.bfloat16, device=device)
    return b.normal_(std=DEPTH**-0.5)


@functools.cache
def fp8_weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return dsa_kernels.quantize_blocks(expert_weights(device))


def random_offsets(rows: int, device: torch.device) -> torch.Tensor:
    """Rows dealt to experts at random, in units of ALIGNED where there are enough."""
    unit = ALIGNED if rows >= ALIGNED * EXPERTS else 1
    counts = torch.randint(0, EXPERTS, (rows // unit,)).bincount(minlength=EXPERTS) * unit
    return F.pad(counts.cumsum(0), (1, 0)).int().to(device)


def activations(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, device=device).bfloat16()


def forward_case(tokens: int, device: torch.device, quick: bool) -> Case:
    rows = tokens * TOPK
    active = EXPERTS * (1 - (1 - 1 / EXPERTS) ** rows)
    return Case(
        name=f"forward {rows} x {COLUMNS} x {DEPTH}, {EXPERTS} experts",
        inputs=lambda: (activations(rows, DEPTH, device), expert_weights(device), random_offsets(rows, device)),
        ours=dsa_kernels.grouped_gemm,
        verify=verify,
        peers={"eager": reference.grouped_gemm, "grouped_mm": torch_grouped_mm, "DeepGEMM": deep_gemm_bf16},
        flops=2.0 * rows * COLUMNS * DEPTH,
        bytes=2.0 * (rows * (COLUMNS + DEPTH) + active * COLUMNS * DEPTH),
        quick=quick,
        context=tokens,
        series="forward",
    )  # fmt: skip


def dgrad_case(tokens: int, device: torch.device, quick: bool) -> Case:
    rows = tokens * TOPK
    return Case(
        name=f"data gradient {rows} x {DEPTH} x {COLUMNS}, {EXPERTS} experts",
        inputs=lambda: (
            activations(rows, COLUMNS, device),
            expert_weights(device).transpose(1, 2),
            random_offsets(rows, device),
        ),
        ours=dsa_kernels.grouped_gemm,
        verify=verify,
        peers={"eager": reference.grouped_gemm, "grouped_mm": torch_grouped_mm},
        flops=2.0 * rows * COLUMNS * DEPTH,
        bytes=2.0 * (rows * (COLUMNS + DEPTH) + EXPERTS * COLUMNS * DEPTH),
        quick=quick,
        context=tokens,
        series="data gradient",
    )


def wgrad_case(tokens: int, device: torch.device, quick: bool) -> Case:
    rows = tokens * TOPK
    return Case(
        name=f"weight gradient {COLUMNS} x {DEPTH} over {rows}, {EXPERTS} experts",
        inputs=lambda: (
            activations(rows, COLUMNS, device),
            activations(rows, DEPTH, device),
            random_offsets(rows, device),
        ),
        ours=dsa_kernels.grouped_gemm_wgrad,
        verify=verify_wgrad,
        peers={"eager": reference.grouped_gemm_wgrad, "grouped_mm": torch_wgrad},
        flops=2.0 * rows * COLUMNS * DEPTH,
        bytes=2.0 * (rows * (COLUMNS + DEPTH) + EXPERTS * COLUMNS * DEPTH),
        quick=quick,
        context=tokens,
        series="weight gradient",
    )


def fp8_case(tokens: int, device: torch.device, quick: bool) -> Case:
    rows = tokens * TOPK
    active = EXPERTS * (1 - (1 - 1 / EXPERTS) ** rows)

    def inputs():
        rows_fp8 = dsa_kernels.quantize_rows(activations(rows, DEPTH, device))
        return *rows_fp8, *fp8_weights(device), random_offsets(rows, device)

    return Case(
        name=f"FP8 {rows} x {COLUMNS} x {DEPTH}, {EXPERTS} experts",
        inputs=inputs,
        ours=dsa_kernels.grouped_gemm_fp8,
        verify=verify_fp8,
        peers={"eager": reference.grouped_gemm_fp8, "DeepGEMM": deep_gemm_fp8},
        flops=2.0 * rows * COLUMNS * DEPTH,
        bytes=rows * (2.0 * COLUMNS + DEPTH) + active * COLUMNS * DEPTH,
        dtype="fp8",
        quick=quick,
        context=tokens,
        series="FP8",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [forward_case(1, device, True), forward_case(4, device, True)]
    tokens = (1, 16, 128, 1024, 8192, 32768)
    return [
        *(forward_case(t, device, quick=t == 8192) for t in tokens),
        *(fp8_case(t, device, quick=t == 8192) for t in tokens),
        *(
            make(t, device, quick=t == 8192)
            for make in (dgrad_case, wgrad_case)
            for t in (8192, 32768)
        ),
    ]
