"""Positions and rotary tables: M-RoPE of the decoder and its indexer, 2D RoPE of the ViT.

A table is cos, sin [T, D/2] float32 for halves that rotate (NeoX): what `norm_rope` and `indexer_prepare` take. Angles are
computed in float32, the published inference code keeps them in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import KeyeConfig

Table = tuple[Tensor, Tensor]


def mrope_positions(input_ids: Tensor, grids: list[tuple[int, int, int]], config: KeyeConfig) -> Tensor:  # fmt: skip
    """Positions [3, T] int64 of a prompt's tokens on the axes t, h and w.

    Text counts on, the same on the three axes. A picture or frame whose first token would be number n has t = n, and
    h = n + row, w = n + column on its grid of tokens; the text after it goes on past the largest of them. Time is in the
    timestamps' text alone.

    Args:
        input_ids: [T] int64, each picture's and frame's placeholders in one run.
        grids: (1, h, w) in patches of each, in their order.

    Raises:
        ValueError: the placeholders are not those of the grids.
    """
    is_vision = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
    slots = is_vision.nonzero()[:, 0]
    merge = 1 if config.vision is None else config.vision.spatial_merge_size
    sizes = [(h // merge, w // merge) for t, h, w in grids for _ in range(t)]
    needed = sum(h * w for h, w in sizes)
    if len(slots) != needed:
        raise ValueError(f"{len(slots)} vision placeholders, but pictures and frames of {needed} tokens")  # fmt: skip
    positions = torch.empty(3, len(input_ids), dtype=torch.int64)
    done = number = used = 0
    for h, w in sizes:
        start, stop = int(slots[used]), int(slots[used + h * w - 1]) + 1
        if stop - start != h * w:
            raise ValueError(f"the placeholders at {start} are interrupted: a grid of {h} x {w} tokens")  # fmt: skip
        positions[:, done:start] = torch.arange(number, number + start - done)
        number += start - done
        rows, columns = torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)
        positions[0, start:stop] = number
        positions[1, start:stop] = number + rows.flatten()
        positions[2, start:stop] = number + columns.flatten()
        number += max(h, w)
        done, used = stop, used + h * w
    positions[:, done:] = torch.arange(number, number + len(input_ids) - done)
    return positions


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for i in [0, dim / 2), float32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def mrope_table(
    positions: Tensor,
    dim: int,
    theta: float,
    section: tuple[int, ...],
    *,
    interleaved: bool = False,
) -> Table:
    """cos, sin [T, dim / 2] of tokens at (t, h, w) positions.

    Args:
        positions: [3, T] int64; text has the same number on the three axes.
        dim: rotated dims of a head.
        theta: base of the frequencies.
        section: how many of the dim / 2 frequencies turn with t, h and w, in this order (Qwen2-VL); () for RoPE on t.
        interleaved: frequencies go t, h, w, t, h, w, ... as far as the sections reach, the rest with t (Qwen3-VL).
    """
    frequencies = inverse_frequencies(dim, theta, positions.device)
    if not section:
        angles = positions[0, :, None] * frequencies
        return angles.cos(), angles.sin()
    i = torch.arange(dim // 2, device=positions.device)
    if interleaved:
        axis = torch.where(i < 3 * section[1], i % 3 == 1, False).long()
        axis += 2 * torch.where(i < 3 * section[2], i % 3 == 2, False).long()
    else:
        axis = (i >= section[0]).long() + (i >= section[0] + section[1]).long()
    angles = positions.T[:, axis] * frequencies  # [T, dim / 2]
    return angles.cos(), angles.sin()


def scaled_section(section: tuple[int, ...], head_dim: int, dim: int) -> tuple[int, ...]:
    """The sections of the indexer, whose heads have `dim` instead of `head_dim` dims: [16, 24, 24] -> [8, 12, 12]."""
    return tuple(n * dim // head_dim for n in section)


def grid_table(grids: list[tuple[int, int, int]], dim: int, theta: float, device: torch.device) -> Table:  # fmt: skip
    """cos, sin [N, dim / 2] of the patches of images in raster order (t, h, w): half of the frequencies turn with the
    row, half with the column."""
    frequencies = inverse_frequencies(dim // 2, theta, device)
    tables = []
    for t, h, w in grids:
        rows = torch.arange(h, device=device)[:, None, None] * frequencies  # [h, 1, dim / 4]
        columns = torch.arange(w, device=device)[None, :, None] * frequencies
        angles = torch.cat([rows.expand(h, w, -1), columns.expand(h, w, -1)], -1)
        tables.append(angles.flatten(0, 1).repeat(t, 1))
    angles = torch.cat(tables)
    return angles.cos(), angles.sin()
