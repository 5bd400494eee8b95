"""grouped_gemm: GEMMs over ragged groups of rows, with their gradients, in bf16, fp32 and block-scaled FP8."""

from __future__ import annotations

import torch

from ..checks import FLOATS, FP8, FP32, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register
from .autograd import backward, setup_context

BLOCK = 128  # columns that share an FP8 scale; for weights also rows
FP8_MAX = 448.0


def grouped_gemm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiplies each group of rows with its own matrix.

    out[r] = a[r] @ b[e].T for r in [offsets[e], offsets[e+1]), accumulated in float32.

    Args:
        a: [M, K] float32 or bfloat16, last dimension contiguous; rows in expert-major order.
        b: [E, N, K], dtype of a, any strides with one of the last two dimensions contiguous (the data gradient
            passes `b.transpose(1, 2)`).
        offsets: [E+1] int32 on the device, first row of each expert. Values are clamped to [0, M] and to the
            largest before them, so that no row is read twice or out of bounds.

    Returns:
        out: [M, N], dtype of a; 0 in the rows outside [offsets[0], offsets[E]). Differentiable in a and b.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact to float32 accumulation and one rounding to the dtype; bitwise deterministic, gradients included; no host
    sync; CUDA-graph safe; empty experts and M = 0 are defined; allocates the result, and in Triton 16 bytes a tile.
    """
    return _op(a, b, offsets)


def grouped_gemm_wgrad(dc: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The weight gradient of grouped_gemm.

    out[e] = sum over r in [offsets[e], offsets[e+1]) of dc[r]^T a[r], accumulated in float32.

    Args:
        dc: [M, N] float32 or bfloat16, last dimension contiguous.
        a: [M, K], dtype of dc, last dimension contiguous.
        offsets: [E+1] int32, clamped as in `grouped_gemm`.

    Returns:
        out: [E, N, K], dtype of a, contiguous; 0 for an expert without rows.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact to float32 accumulation and one rounding; bitwise deterministic; no host sync; CUDA-graph safe; M = 0 gives
    zeros; allocates the result. Not differentiable.
    """
    return _wgrad_op(dc, a, offsets)


def grouped_gemm_fp8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """grouped_gemm of block-scaled FP8 operands, in bfloat16.

    out[r, n] = sum over k of (a[r, k] a_scale[r, k/128]) (b[e, n, k] b_scale[e, n/128, k/128]).

    Args:
        a: [M, K] float8_e4m3fn, contiguous; K a multiple of 128.
        a_scale: [M, K/128] float32, contiguous; see `quantize_rows`.
        b: [E, N, K] float8_e4m3fn, contiguous; N a multiple of 128.
        b_scale: [E, N/128, K/128] float32, contiguous; see `quantize_blocks`.
        offsets: [E+1] int32, clamped as in `grouped_gemm`.

    Returns:
        out: [M, N] bfloat16; 0 in the rows outside [offsets[0], offsets[E]).

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Every 128 products along k are scaled and added in float32 (within them Hopper's FP8 units keep about 14 bits);
    bitwise deterministic; no host sync; CUDA-graph safe; M = 0 is defined; allocates the result, and in Triton 16
    bytes a tile. Not differentiable. Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    return _fp8_op(a, a_scale, b, b_scale, offsets)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 activations: each run of 128 columns of a row gets scale = 2^ceil(log2(max(amax, 1e-4) / 448)).

    Args:
        x: [M, K] float32 or bfloat16, K a multiple of 128.

    Returns:
        x_fp8: [M, K] float8_e4m3fn, x / scale rounded to nearest even.
        scale: [M, K/128] float32.

    Raises:
        ValueError: x of the wrong dtype or shape.

    Exact powers of two, so dequantising adds no rounding; deterministic; no host sync; CUDA-graph safe; M = 0 is
    defined; allocates the results and one float32 copy. Plain torch operations.
    """
    a = Arguments("quantize_rows")
    a.tensor("x", x, "M K", FLOATS, inner=0)
    a.require(a["K"] % BLOCK == 0, "x", "a multiple of 128 columns", a["K"])
    blocks = x.float().unflatten(1, (-1, BLOCK))  # [M, K/128, 128]
    scale = _scale(blocks.abs().amax(-1))
    return (blocks / scale[..., None]).flatten(1).to(torch.float8_e4m3fn), scale


def quantize_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 weights: each block of 128 x 128 gets one scale, computed as in `quantize_rows`.

    Args:
        w: [E, N, K] float32 or bfloat16, N and K multiples of 128.

    Returns:
        w_fp8: [E, N, K] float8_e4m3fn.
        scale: [E, N/128, K/128] float32.

    Raises:
        ValueError: w of the wrong dtype or shape.

    Exact powers of two; deterministic; no host sync; CUDA-graph safe; E = 0 is defined; allocates the results and
    one float32 copy. Plain torch operations.
    """
    a = Arguments("quantize_blocks")
    a.tensor("w", w, "E N K", FLOATS, inner=0)
    a.require(a["N"] % BLOCK == 0, "w", "a multiple of 128 rows", a["N"])
    a.require(a["K"] % BLOCK == 0, "w", "a multiple of 128 columns", a["K"])
    blocks = (
        w.float().unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    )  # [E, N/128, 128, K/128, 128]
    scale = _scale(blocks.abs().amax((2, 4)))
    return (blocks / scale[:, :, None, :, None]).reshape(w.shape).to(torch.float8_e4m3fn), scale


def _scale(amax: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(amax.clamp(min=1e-4) / FP8_MAX)  # in [0.5, 1) * 2^exponent
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())


def _check(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> None:
    args = Arguments("grouped_gemm")
    args.tensor("a", a, "M K", FLOATS)
    args.tensor("b", b, "E N K", (a.dtype,), inner=0)
    inner = b.stride(2) == 1 or b.shape[2] <= 1 or b.stride(1) == 1 or b.shape[1] <= 1
    args.require(inner, "b", "one of the last two dimensions contiguous", f"strides {b.stride()}")
    args.tensor("offsets", offsets, "E+1", INT32, contiguous=True)


def _check_wgrad(dc: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor) -> None:
    args = Arguments("grouped_gemm_wgrad")
    args.tensor("dc", dc, "M N", FLOATS)
    args.tensor("a", a, "M K", (dc.dtype,))
    args.tensor("offsets", offsets, "_", INT32, contiguous=True)
    args.require(offsets.shape[0] >= 1, "offsets", "shape [E+1]", list(offsets.shape))


def _check_fp8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    args = Arguments("grouped_gemm_fp8")
    args.tensor("a", a, "M K", FP8, contiguous=True)
    args.require(args["K"] % BLOCK == 0, "a", "a multiple of 128 columns", args["K"])
    args.tensor("a_scale", a_scale, f"M {args['K'] // BLOCK}", FP32, contiguous=True)
    args.tensor("b", b, "E N K", FP8, contiguous=True)
    args.require(args["N"] % BLOCK == 0, "b", "a multiple of 128 rows an expert", args["N"])
    args.tensor(
        "b_scale", b_scale, f"E {args['N'] // BLOCK} {args['K'] // BLOCK}", FP32, contiguous=True
    )
    args.tensor("offsets", offsets, "E+1", INT32, contiguous=True)


_op = register(
    "grouped_gemm",
    room=__name__,
    check=_check,
    fake=lambda a, b, offsets: a.new_empty((a.shape[0], b.shape[1])),
    table=[TRITON, CPU, REFERENCE],
    setup_context=setup_context,
    backward=backward,
)

_wgrad_op = register(
    "grouped_gemm_wgrad",
    room=__name__,
    check=_check_wgrad,
    fake=lambda dc, a, offsets: a.new_empty((offsets.shape[0] - 1, dc.shape[1], a.shape[1])),
    table=[TRITON, CPU, REFERENCE],
)

_fp8_op = register(
    "grouped_gemm_fp8",
    room=__name__,
    check=_check_fp8,
    fake=lambda a, a_scale, b, b_scale, offsets: a.new_empty(
        (a.shape[0], b.shape[1]), dtype=torch.bfloat16
    ),
    table=[Implementation("triton", "triton_scaled"), CPU, REFERENCE],
)
