"""routing_map: from expert ids to expert-major rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import INT32, Arguments
from ..dispatch import Implementation, register


@dataclass(frozen=True)
class RoutingMap:
    """Where each (token, slot) goes among rows sorted by expert.

    Attributes:
        offsets: [E+1] int32; the rows of expert e are [offsets[e], offsets[e+1]), offsets[0] = 0.
        row_token: [T*K] int32; the token of each row, -1 for the rows from offsets[E] on.
        slot_row: [T, K] int32; the row of each slot, -1 for dropped slots.
    """

    offsets: torch.Tensor
    row_token: torch.Tensor
    slot_row: torch.Tensor


def routing_map(ids: torch.Tensor, num_experts: int) -> RoutingMap:
    """Sorts the slots of a routing by expert.

    Rows are the slots t * K + j in order of (ids[t, j], t * K + j): expert-major, and within an expert in the order of
    the tokens. A slot whose id is -1, or anything else outside [0, num_experts), has no row.

    Args:
        ids: [T, K] int32 expert of each slot, last dimension contiguous. A token may name an expert twice.
        num_experts: E, 1 to 1024.

    Returns:
        RoutingMap(offsets [E+1], row_token [T*K], slot_row [T, K]), all int32, contiguous, on the device of `ids`.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, num_experts out of range, or T*K > 2^30.

    Exact; bitwise deterministic; no host sync; CUDA-graph safe; T = 0 gives offsets of zeros and empty maps; allocates
    the result, and on large inputs a histogram of at most 128 x E int32.
    """
    return RoutingMap(*_op(ids, num_experts))


def _check(ids: torch.Tensor, num_experts: int) -> None:
    a = Arguments("routing_map")
    a.tensor("ids", ids, "T K", INT32)
    a.integer("num_experts", num_experts, 1, 1024)
    a.require(a["T"] * a["K"] <= 2**30, "ids", "at most 2^30 slots", list(ids.shape))


def _fake(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slots = ids.shape[0] * ids.shape[1]
    return ids.new_empty(num_experts + 1), ids.new_empty(slots), ids.new_empty(ids.shape)


_op = register(
    "routing_map",
    room=__package__,
    check=_check,
    fake=_fake,
    table=[
        Implementation("triton", "triton_map"),
        Implementation("cpu"),
        Implementation("reference", "reference"),
    ],
)
