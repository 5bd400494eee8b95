"""The op build_union: which keys the 16 tokens of a tile select together. What the GPU forward and backward share."""

from __future__ import annotations

import torch

from ..checks import INT32, Arguments
from ..dispatch import REFERENCE, Implementation, register


def _check(
    indices: torch.Tensor,
    tiles: torch.Tensor,
    keys: torch.Tensor,
    masks: torch.Tensor,
    counts: torch.Tensor,
    num_keys: int,
    list_block: int,
) -> None:
    a = Arguments("build_union")
    a.tensor("indices", indices, "T K", INT32)
    a.tensor("tiles", tiles, "C 5", INT32, contiguous=True)
    a.tensor("keys", keys, "C N", INT32, contiguous=True)
    a.tensor("masks", masks, "C N", INT32, contiguous=True)
    a.tensor("counts", counts, "C", INT32, contiguous=True)
    a.integer("num_keys", num_keys, 0)
    a.integer("list_block", list_block, 1)


def _fake(*args: object) -> None:
    return None


_op = register(
    "build_union",
    room=__package__,
    check=_check,
    fake=_fake,
    table=[Implementation("cuda"), Implementation("triton", "triton_union"), REFERENCE],
)
