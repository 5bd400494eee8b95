"""Gradients of grouped_gemm: both are grouped GEMMs themselves."""

from __future__ import annotations

from typing import Any

import torch


def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    a, b, offsets = ctx.saved_tensors
    dout = dout.contiguous()
    da = db = None
    if ctx.needs_input_grad[0]:
        da = torch.ops.dsa_kernels.grouped_gemm(dout, b.transpose(1, 2), offsets)
    if ctx.needs_input_grad[1]:
        db = torch.ops.dsa_kernels.grouped_gemm_wgrad(dout, a, offsets)
    return da, db, None
