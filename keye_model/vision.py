"""The ViT: SigLIP-so400m at native resolution, images and frames packed into one sequence.

Learned positions are interpolated to each image's grid, q and k also get 2D RoPE, and attention stays within an image or
frame. Shapes: N patches, C hidden size, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_kernels import norm_rope, varlen_attention

from .config import VisionConfig
from .rope import Table, grid_table

Grid = tuple[int, int, int]  # frames, rows, columns; in patches


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.num_attention_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, table: Table | None, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 3, self.heads, self.dim).unbind(1)  # [N, H, D] each
        if table is not None:
            q, k = norm_rope(q, k, None, None, *table)
        out, _ = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=False)
        return self.out(out.flatten(1))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, table: Table | None, cu_seqlens: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), table, cu_seqlens)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class VisionTower(nn.Module):
    """Patches to features.

    Attributes:
        rotate: 2D RoPE; off, at image_size x image_size, the tower is SigLIP's.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config, self.rotate = config, True
        pixels = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(pixels, config.hidden_size)
        self.positions = nn.Parameter(torch.zeros(config.grid_size**2, config.hidden_size))
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, grids: list[Grid]) -> Tensor:
        """Features [N, C] of patches pixel_values [N, 3, 14, 14], those of an image in raster order, one grid an image."""
        device = pixel_values.device
        x = self.patch_embedding(pixel_values.flatten(1).to(self.positions.dtype))
        x = x + torch.cat([self.interpolated_positions(h, w).repeat(t, 1) for t, h, w in grids])
        table = None
        if self.rotate:
            table = grid_table(grids, self.config.head_dim, self.config.rope_theta, device)
        frames = [h * w for t, h, w in grids for _ in range(t)]
        cu_seqlens = F.pad(torch.tensor(frames).cumsum(0), (1, 0)).int().to(device)
        for layer in self.layers:
            x = layer(x, table, cu_seqlens)
        return self.norm(x)

    def interpolated_positions(self, rows: int, columns: int) -> Tensor:
        """The learned grid of positions, resized to [rows * columns, C]."""
        side = self.config.grid_size
        grid = self.positions.view(1, side, side, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (rows, columns), mode="bilinear", align_corners=False)
        return grid[0].flatten(1).T.to(self.positions.dtype)
