"""From logits to the next token: greedy, or a draw after temperature, top-k, top-p and min-p.

Every request draws from a random stream of its own, one number a token, so that its tokens do not depend on what shares
its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends.

    Attributes:
        max_new_tokens: the most tokens to generate.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together have at least this probability.
        min_p: keep tokens with at least this fraction of the most likely one's probability.
        stop: strings that end the text; they are not part of it.
        seed: of the request's random stream.
        n: samples of the prompt; they share its pages.
        ignore_eos: go on after an end token.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "n": self.n >= 1,
            "stop": all(self.stop),
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"{name}: {getattr(self, name)!r} is out of range")


def choose(logits: Tensor, params: list[SamplingParams], draws: list[float]) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The next token of every row and its log-probability.

    Args:
        logits: [B, V] float32.
        params: of each row. draws: a number in [0, 1) for each row, from its request's stream.

    Returns:
        tokens [B] int64; logprobs [B] float32, of the model's own distribution (before temperature and filters).
    """
    tokens = logits.argmax(-1)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = draw(logits[rows], [params[i] for i in drawn], [draws[i] for i in drawn])
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens, logprobs


def draw(logits: Tensor, params: list[SamplingParams], draws: list[float]) -> Tensor:
    """The token at which the filtered, sorted distribution's running sum passes the draw."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled = logits / column([p.temperature for p in params])
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    most = column([p.top_k or logits.shape[1] for p in params])
    probabilities = values.masked_fill(rank >= most, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = (rank < most) & (before < column([p.top_p for p in params]))
    keep &= probabilities >= probabilities[:, :1] * column([p.min_p for p in params])
    keep[:, 0] = True
    kept = torch.where(keep, probabilities, 0)
    running = kept.cumsum(-1)
    position = (running <= column(draws) * running[:, -1:]).sum(-1, keepdim=True)
    last = keep.sum(-1, keepdim=True) - 1  # where rounding puts the draw past the sum
    return order.gather(1, torch.minimum(position, last))[:, 0]
