"""topk_select: the exact top-k of given score rows."""

from __future__ import annotations

import torch

from ..checks import FLOATS, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register


def topk_select(
    scores: torch.Tensor,
    topk: int,
    *,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Selects the `topk` best columns of every row, exactly.

    Row r competes over the columns [starts[r], starts[r] + lengths[r]), clamped to the matrix. Order: score
    descending, then position ascending; +0.0 and -0.0 are equal; NaN ranks below everything, -inf included.

    Args:
        scores: [R, L] float32 or bfloat16, last dimension contiguous.
        topk: K >= 1; need not be a power of two and may exceed L.
        starts: [R] int32 first column of each row; default 0.
        lengths: [R] int32 number of columns of each row; default up to L.

    Returns:
        indices: [R, K] int32, positions relative to the row's start, ascending, -1 filling the tail. A row of
        fewer than K columns holds all of them, NaN ones included.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or topk < 1.

    Exact for any input; bitwise deterministic; no host sync; CUDA-graph safe; R = 0 or L = 0 give an empty or
    all -1 result; allocates the result, and in Triton at most 51 MB of workspace.
    """
    return _op(scores, topk, starts, lengths)


def _check(
    scores: torch.Tensor, topk: int, starts: torch.Tensor | None, lengths: torch.Tensor | None
) -> None:
    a = Arguments("topk_select")
    a.tensor("scores", scores, "R L", FLOATS)
    a.integer("topk", topk, 1)
    a.optional("starts", starts, "R", INT32, contiguous=True)
    a.optional("lengths", lengths, "R", INT32, contiguous=True)


LARGEST_CUDA_TOPK = 4096  # its list of candidates lies in shared memory


def _cuda_declines(_scores: torch.Tensor, topk: int, *_: object) -> str | None:
    if topk > LARGEST_CUDA_TOPK:
        return f"keeps at most {LARGEST_CUDA_TOPK} of a row, not {topk}"
    return None


def _fake(
    scores: torch.Tensor, topk: int, starts: torch.Tensor | None, lengths: torch.Tensor | None
) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], topk), dtype=torch.int32)


_op = register(
    "topk_select",
    room=__name__,
    check=_check,
    fake=_fake,
    table=[Implementation("cuda", declines=_cuda_declines), TRITON, CPU, REFERENCE],
)
