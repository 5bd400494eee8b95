"""Gradient of moe_mlp: the backward op on the saved x and h."""

from __future__ import annotations

from typing import Any

import torch


def setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, w13, w2, weights, offsets, row_token, slot_row, _ = inputs
    ctx.save_for_backward(x, output[1], w13, w2, weights, offsets, row_token, slot_row)


def backward(ctx: Any, dout: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.dsa_kernels.moe_mlp_bwd(dout.contiguous(), *ctx.saved_tensors)
    return *grads, None, None, None, None
