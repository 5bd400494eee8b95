"""The feed-forward block: 128 SwiGLU experts, of which a token takes 8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import dsa_kernels

from .config import KeyeConfig


class Balance(NamedTuple):
    """What `dsa_kernels.load_balancing_loss` needs of a layer: tokens per expert [E] int32, summed probabilities [E]."""

    counts: Tensor
    prob_sum: Tensor


class MoE(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        experts, width = config.num_experts, config.moe_intermediate_size
        self.topk, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.router = nn.Linear(config.hidden_size, experts, bias=False)
        self.w13 = nn.Parameter(
            torch.empty(experts, 2 * width, config.hidden_size)
        )  # gate rows, up rows
        self.w2 = nn.Parameter(torch.empty(experts, config.hidden_size, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Balance]:
        weights, ids, counts, prob_sum = dsa_kernels.moe_router(
            self.router(x), self.topk, normalize=self.normalize
        )
        return self.experts(x, weights, ids), Balance(counts, prob_sum)

    def experts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The weighted sum of each token's experts; parallel.py replaces it where experts lie on several ranks."""
        return dsa_kernels.moe_mlp(x, self.w13, self.w2, weights, ids)
