"""moe_mlp: routed SwiGLU experts end to end, forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from ..checks import FLOATS, FP32, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register
from ..moe_router import RoutingMap, routing_map
from .autograd import backward, setup_context


def moe_mlp(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor | RoutingMap,
) -> torch.Tensor:
    """Applies to every token the experts it is routed to.

    out[t] = sum_j weights[t, j] * (silu(g) * u) @ w2[e].T with e = ids[t, j], [g, u] = x[t] @ w13[e].T.

    Args:
        x: [T, Hd] float32 or bfloat16, last dimension contiguous.
        w13: [E, 2F, Hd], dtype of x, last dimension contiguous: F gate rows, then F up rows.
        w2: [E, Hd, F], dtype of x, last dimension contiguous.
        weights: [T, K] float32, contiguous.
        ids: [T, K] int32 expert of each slot; a slot whose id is -1, or anything else outside [0, E), adds nothing.
            Or the RoutingMap that `routing_map(ids, E)` returns, to build it once for several calls.

    Returns:
        out: [T, Hd], dtype of x. Differentiable in x, w13, w2 and weights.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact to float32 accumulation; in bfloat16 the activations and the rows before the weighted sum are rounded once
    each; the sum over j is in float32, in order. Bitwise deterministic, gradients included; no host sync; CUDA-graph
    safe; T = 0 and empty experts are defined; allocates T K (F + Hd) elements of workspace, and saves x and, only
    where a gradient is needed, h [T K, 2F] for the backward. Source: SonicMoE (arXiv 2512.14080), section 3.
    """
    if not isinstance(ids, RoutingMap):
        ids = routing_map(ids, w13.shape[0])
    return _routed(x, w13, w2, weights, ids)


def experts(
    x_rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Applies each expert to its own rows: the seam for expert parallelism, after the exchange of rows.

    out[r] = (silu(g) * u) @ w2[e].T with [g, u] = x_rows[r] @ w13[e].T for r in [offsets[e], offsets[e+1]).

    Args:
        x_rows: [N, Hd] float32 or bfloat16, last dimension contiguous, expert-major.
        w13, w2: as in `moe_mlp`, the experts of this rank.
        offsets: [E+1] int32 on the device. Values are clamped to [0, N] and to the largest before them.

    Returns:
        out: [N, Hd], dtype of x_rows; 0 in the rows of no expert. Differentiable in x_rows, w13 and w2.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exactness, determinism, host syncs, CUDA graphs and memory as in `moe_mlp`; N = 0 is defined.
    """
    row = torch.arange(x_rows.shape[0], dtype=torch.int32, device=x_rows.device)
    ones = torch.ones_like(row, dtype=torch.float32)[:, None]
    return _routed(x_rows, w13, w2, ones, RoutingMap(offsets, row, row[:, None]))


def _routed(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, routing: RoutingMap
) -> torch.Tensor:
    inputs = (x, w13, w2, weights)
    needs_grad = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in inputs)
    return _op(*inputs, routing.offsets, routing.row_token, routing.slot_row, needs_grad)[0]


def _check_inputs(
    op: str,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    row_token: torch.Tensor,
    slot_row: torch.Tensor,
    save_h: bool = False,
) -> Arguments:
    a = Arguments(op)
    a.tensor("x", x, "T H", FLOATS)
    a.tensor("w2", w2, "E H F", (x.dtype,))
    a.tensor("w13", w13, "E 2F H", (x.dtype,))
    a.tensor("weights", weights, "T K", FP32, contiguous=True)
    a.tensor("offsets", offsets, "E+1", INT32, contiguous=True)
    a.tensor("row_token", row_token, "N", INT32, contiguous=True)
    a.tensor("slot_row", slot_row, "T K", INT32, contiguous=True)
    a.require(a["N"] == a["T"] * a["K"], "row_token", "T * K rows", a["N"])
    return a


def _check_bwd(
    dout: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    row_token: torch.Tensor,
    slot_row: torch.Tensor,
) -> None:
    a = _check_inputs("moe_mlp_bwd", x, w13, w2, weights, offsets, row_token, slot_row)
    a.tensor("dout", dout, "T H", (x.dtype,))
    a.tensor("h", h, "N 2F", (x.dtype,), contiguous=True)


_op = register(
    "moe_mlp",
    room=__name__,
    check=partial(_check_inputs, "moe_mlp"),
    fake=lambda x, w13, w2, weights, offsets, row_token, slot_row, save_h: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((row_token.shape[0] if save_h else 0, w13.shape[1])),
    ),
    table=[TRITON, CPU, REFERENCE],
    setup_context=setup_context,
    backward=backward,
)

_bwd_op = register(
    "moe_mlp_bwd",
    room=__name__,
    check=_check_bwd,
    fake=lambda dout, x, h, w13, w2, weights, offsets, row_token, slot_row: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w13, w2, weights)
    ),
    table=[Implementation("triton", "triton_bwd"), CPU, REFERENCE],
)
