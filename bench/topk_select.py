"""Benchmark cases of topk_select."""

from __future__ import annotations

import torch

import dsa_kernels
from dsa_kernels.topk_select.reference import topk_select as reference

from .case import Case, Unavailable


def torch_topk(scores, topk):
    """torch.topk and the sort that makes its positions ascending; ties in no defined order."""
    return scores.topk(topk, sorted=False).indices.sort(-1).values.int()


def flashinfer_topk(scores, topk):
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable("flashinfer is not installed") from error
    return flashinfer.top_k(scores, topk, deterministic=True)


def sgl_topk(scores, topk):
    try:
        from sgl_kernel import fast_topk_v2
    except ImportError as error:
        raise Unavailable("sgl-kernel is not installed") from error
    lengths = torch.full(
        (scores.shape[0],), scores.shape[1], dtype=torch.int32, device=scores.device
    )
    return fast_topk_v2(scores, lengths, topk)


def verify(indices, inputs):
    scores, topk = inputs
    rows = slice(0, 64)  # the reference sorts in float64
    assert torch.equal(indices[rows], reference(scores[rows], topk, None, None))


def case(rows: int, width: int, topk: int, device: torch.device, quick: bool) -> Case:
    return Case(
        name=f"[{rows}, {width}] k={topk}",
        inputs=lambda: (torch.randn(rows, width, device=device), topk),
        ours=dsa_kernels.topk_select,
        verify=verify,
        peers={
            "eager": lambda scores, k: reference(scores, k, None, None),
            "torch.topk": torch_topk,
            "FlashInfer": flashinfer_topk,
            "sgl-kernel": sgl_topk,
        },
        bytes=4.0 * rows * (width + topk),
        dtype="fp32",
        quick=quick,
        context=width,
        series=f"{rows} rows",
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case(rows, width, 2048, device, True)
            for rows in (1, 64)
            for width in (8192, 32768, 131072)
        ]
    return [
        case(rows, width, 2048, device, quick=width == 131072)
        for rows in (1, 64, 1024, 4096)
        for width in (8192, 32768, 131072)
    ]
