"""The feed-forward block: 128 SwiGLU experts, of which a token takes 8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import dsa_kernels

from .config import KeyeConfig
from .linear import Linear


class Balance(NamedTuple):
    """What `dsa_kernels.load_balancing_loss` needs of a layer: tokens per expert [E] int32, summed probabilities [E]."""

    counts: Tensor
    prob_sum: Tensor


class Experts(nn.Module):
    """The experts' weights: w13 [E, 2F, hidden], F gate rows then F up rows; w2 [E, hidden, F]."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The weighted sum of each token's experts; parallel.py has the form for experts on several ranks."""
        return dsa_kernels.moe_mlp(x, self.w13, self.w2, weights, ids)


class MoE(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.topk, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.router = Linear(config.hidden_size, config.num_experts)
        self.experts: nn.Module = Experts(
            config.num_experts, config.hidden_size, config.moe_intermediate_size
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Balance]:
        weights, ids, counts, prob_sum = dsa_kernels.moe_router(
            self.router(x), self.topk, normalize=self.normalize
        )
        return self.experts(x, weights, ids), Balance(counts, prob_sum)
