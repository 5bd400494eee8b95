"""The decoder: pre-norm layers of attention and experts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .attention import Attention, LayerCache, Step
from .config import KeyeConfig
from .moe import Balance, MoE


class LayerStats(NamedTuple):
    """By-products of a layer that training adds to the loss: the indexer's loss [T] or None, the balance of the experts."""

    index_loss: Tensor | None
    balance: Balance


class DecoderLayer(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None = None) -> tuple[Tensor, LayerStats]:  # fmt: skip
        attended, index_loss = self.attention(self.attention_norm(x), step, cache)
        x = x + attended
        routed, balance = self.mlp(self.mlp_norm(x))
        return x + routed, LayerStats(index_loss, balance)


class Decoder(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, caches: list[LayerCache] | None = None) -> tuple[Tensor, list[LayerStats]]:  # fmt: skip
        """Normalised hidden states [T, hidden] of embedded tokens x, and the statistics of every layer."""
        stats = []
        for i, layer in enumerate(self.layers):
            x, of_layer = layer(x, step, None if caches is None else caches[i])
            stats.append(of_layer)
        return self.norm(x), stats
