"""Requests: what comes in, what goes out, and a sample while it is worked on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import Pages
from .sampling import SamplingParams
from .text import TextStream
from .vision import Grid


@dataclass(frozen=True)
class Prompt:
    """A prompt as the processor makes it.

    Attributes:
        input_ids: [T] int64. position_ids: [3, T] int64; None for 0, 1, 2, ... on the three axes.
        pixel_values: [N, 3, 14, 14] patches in the order of their placeholders. grids: (t, h, w) of each image or frame.
    """

    input_ids: Tensor
    position_ids: Tensor | None = None
    pixel_values: Tensor | None = None
    grids: list[Grid] = field(default_factory=list)


@dataclass(frozen=True)
class Delta:
    """What a step adds to one sample of a request; finish is "stop", "length", "error: ..." or None while it goes on."""

    request: int
    sample: int
    token: int | None
    logprob: float | None
    text: str
    finish: str | None


@dataclass
class Completion:
    """A finished sample: its tokens, the log-probability of each, its text, why it ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None


class Sequence:
    """One sample of a request while it is worked on."""

    def __init__(self, request: int, sample: int, prompt: Prompt, params: SamplingParams, tokenizer: Any) -> None:  # fmt: skip
        self.request, self.sample, self.prompt, self.params = request, sample, prompt, params
        self.tokens: list[int] = prompt.input_ids.tolist()
        self.prompt_length = len(self.tokens)
        count = torch.arange(self.prompt_length).expand(3, -1)
        self.positions = count if prompt.position_ids is None else prompt.position_ids.cpu()
        # A generated token's position is its index plus this.
        self.next_position = int(self.positions.max()) + 1 - self.prompt_length
        self.pages = Pages("i")
        self.cached = 0  # tokens in the cache
        self.features: Tensor | None = None
        self.siblings: list[Sequence] = []  # samples that wait for this one's prompt
        self.random = torch.Generator().manual_seed(params.seed * 1_000_003 + sample)
        self.stream = None if tokenizer is None else TextStream(tokenizer, params.stop)

    @property
    def decoding(self) -> bool:
        """Only the newest token is not in the cache yet."""
        return self.cached == len(self.tokens) - 1 and len(self.tokens) > self.prompt_length

    def positions_of(self, start: int, stop: int) -> Tensor:
        """[3, stop - start] int64."""
        inside = self.positions[:, start:stop]
        generated = torch.arange(start + inside.shape[1], stop) + self.next_position
        return torch.cat([inside, generated.expand(3, -1)], 1)
