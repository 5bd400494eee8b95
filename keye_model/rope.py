"""Positions and rotary tables: M-RoPE of the decoder and its indexer, 2D RoPE of the ViT.

A table is cos, sin [T, D/2] float32 for halves that rotate (NeoX): what `norm_rope` and `indexer_prepare` take. Angles are
computed in float32, the published inference code keeps them in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import KeyeConfig

Table = tuple[Tensor, Tensor]


def mrope_positions(input_ids: Tensor, grid_thw: Tensor, config: KeyeConfig) -> Tensor:
    """M-RoPE positions (t, h, w) of a prompt.

    Text counts up by one on all three axes. An image or frame that starts at s has its token in row r and column c of the
    merged grid at (s, s + r, s + c), and what follows goes on at s + max(rows, columns), one past its largest position.

    Args:
        input_ids: [T] int64. The pad tokens of one image or frame stand together.
        grid_thw: [n, 3] int64 in patches, one row an image or frame, t = 1, in the order of the prompt.

    Returns:
        [3, T] int64. The text that follows goes on one past the largest of them.

    Raises:
        ValueError: pad tokens that do not match the grid.

    Source: SGLang's `get_rope_index_keye`. Time is in the text alone; t does not scale with seconds.
    """
    merge = config.vision.spatial_merge_size if config.vision else 1
    sides = grid_thw[:, 1:]
    if (grid_thw[:, 0] != 1).any() or (sides < 1).any() or (sides % merge).any():
        raise ValueError(
            f"grid_thw: expected rows [1, h, w] of multiples of {merge}, got {grid_thw.tolist()}"
        )
    num_rows, num_columns = (sides // merge).unbind(1)
    counts = num_rows * num_columns
    is_pad = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
    places = is_pad.nonzero()[:, 0]  # [P]
    if len(places) != counts.sum():
        raise ValueError(
            f"{len(places)} pad tokens in the prompt, {counts.sum()} in the grid of {len(counts)} rows"
        )
    offsets = counts.cumsum(0) - counts
    owner = torch.arange(len(counts)).repeat_interleave(counts)  # [P] -> row of the grid
    within = torch.arange(len(places)) - offsets[owner]
    first = places[offsets]
    if not torch.equal(places, first[owner] + within):
        raise ValueError("the pad tokens of an image or frame do not stand together")

    advance = (~is_pad).long()
    advance[first] = torch.maximum(num_rows, num_columns)
    start = advance.cumsum(0) - advance  # [T]
    positions = start.expand(3, -1).clone()
    positions[:, places] = start[first][owner]
    positions[1, places] += within // num_columns[owner]
    positions[2, places] += within % num_columns[owner]
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
