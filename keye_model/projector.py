"""The projector: 2 x 2 neighbouring patches become one token of the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KeyeConfig
from .vision import Grid


class Projector(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        assert config.vision is not None
        self.merge = config.vision.spatial_merge_size
        merged = config.vision.hidden_size * self.merge**2
        self.norm = nn.LayerNorm(merged, eps=1e-5)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, config.hidden_size)

    def forward(self, features: Tensor, grids: list[Grid]) -> Tensor:
        """Tokens [N / 4, hidden] of features [N, C] in raster order, image by image, in raster order of the merged grid."""
        p = self.merge
        parts = features.split([t * h * w for t, h, w in grids])
        merged = [
            part.view(t, h // p, p, w // p, p, -1).transpose(2, 3).flatten(3).flatten(0, 2)
            for part, (t, h, w) in zip(parts, grids)
        ]
        return self.linear_2(F.gelu(self.linear_1(self.norm(torch.cat(merged)))))
