"""The gradient of moe_router: the op moe_router_bwd and how autograd reaches it."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import FLOATS, FP32, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, register


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _, ctx.normalize = inputs
    _, ids, counts, _ = output
    ctx.save_for_backward(logits, ids)
    ctx.mark_non_differentiable(ids, counts)
    ctx.set_materialize_grads(False)


def backward(
    ctx: Any,
    dweights: torch.Tensor | None,
    dids: None,
    dcounts: None,
    dprob_sum: torch.Tensor | None,
) -> tuple[torch.Tensor | None, None, None]:
    logits, ids = ctx.saved_tensors
    if dweights is None:
        dweights = logits.new_zeros(ids.shape, dtype=torch.float32)
    if dprob_sum is not None:
        dprob_sum = dprob_sum.contiguous()
    dlogits = torch.ops.dsa_kernels.moe_router_bwd(
        dweights.contiguous(), dprob_sum, logits, ids, ctx.normalize
    )
    return dlogits, None, None


def _check(
    dweights: torch.Tensor,
    dprob_sum: torch.Tensor | None,
    logits: torch.Tensor,
    ids: torch.Tensor,
    normalize: bool,
) -> None:
    a = Arguments("moe_router_bwd")
    a.tensor("logits", logits, "T E", FLOATS)
    a.tensor("ids", ids, "T K", INT32, contiguous=True)
    a.tensor("dweights", dweights, "T K", FP32, contiguous=True)
    a.optional("dprob_sum", dprob_sum, "E", FP32, contiguous=True)
    a.one_of("normalize", normalize, (True, False))


def _fake(
    dweights: torch.Tensor, dprob_sum: torch.Tensor | None, logits: torch.Tensor, *rest: object
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


register(
    "moe_router_bwd", room=__package__, check=_check, fake=_fake, table=[TRITON, CPU, REFERENCE]
)
