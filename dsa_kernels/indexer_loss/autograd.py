"""Autograd of indexer_loss: what the backward keeps, and the call of its op."""

from __future__ import annotations

from typing import Any

import torch


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.softmax_scale, ctx.deterministic = inputs
    _, index_lse, mass = output
    ctx.mark_non_differentiable(index_lse, mass)
    ctx.save_for_backward(*tensors, index_lse, mass)


def backward(ctx: Any, dloss: torch.Tensor, *unused: torch.Tensor) -> tuple[Any, ...]:
    index_q, index_k, index_weights, q, k, lse, indices, cu_seqlens_q, cu_seqlens_k, index_lse, mass = (
        ctx.saved_tensors
    )  # fmt: skip
    gradients = torch.ops.dsa_kernels.indexer_loss_bwd(
        dloss.contiguous(), index_q, index_k, index_weights, q, k, lse, index_lse, mass, indices, cu_seqlens_q,
        cu_seqlens_k, ctx.softmax_scale, ctx.deterministic,
    )  # fmt: skip
    return (*gradients, *[None] * 8)
