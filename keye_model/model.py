"""Keye-VL-2.0: ViT, projector, decoder, head.

    tokens  = embedding of the text, with the projected ViT features at the image and video placeholders
    logits  = head(decoder(tokens))

Sequences are packed: T tokens of S sequences back to back. Shapes: T tokens, S sequences, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import LayerCache, Paging, Step
from .config import KeyeConfig
from .decoder import Decoder, LayerStats
from .projector import Projector
from .rope import Table, mrope_table, scaled_section
from .vision import Grid, VisionTower


@dataclass(frozen=True)
class Output:
    """Attributes: hidden [T, hidden], after the last norm; stats, one entry a layer. `KeyeVL.head` makes logits."""

    hidden: Tensor
    stats: list[LayerStats]


class KeyeVL(nn.Module):
    """The network. Parameters are not initialised where they are created: see `init_weights` and weights.py."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = None if config.vision is None else VisionTower(config.vision)
        self.projector = None if config.vision is None else Projector(config)
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        pixel_values: Tensor | None = None,
        grids: list[Grid] | None = None,
        dense: bool = False,
        index_loss: bool = False,
    ) -> Output:
        """Runs packed sequences without a cache: training, and scoring of whole texts.

        Args:
            input_ids: [T] int64, placeholders where vision features go.
            position_ids: [3, T] int64, t, h and w (rope.py).
            cu_seqlens: [S+1] int32, where each sequence begins. max_seqlen: the longest, on the host.
            pixel_values: [N, 3, 14, 14] patches of the images and frames in the order of their placeholders.
            grids: (t, h, w) of each, in patches.
            dense: attend to every visible key; the default attends to the indexer's choice in sequences longer than k.
            index_loss: also compute the indexer's loss.
        """
        x = self.embed(input_ids, pixel_values, grids)
        step = self.step(position_ids, cu_seqlens, cu_seqlens, max_seqlen, dense=dense, index_loss=index_loss)  # fmt: skip
        return Output(*self.decoder(x, step))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None, grids: list[Grid] | None = None) -> Tensor:  # fmt: skip
        """Embeddings [T, hidden], vision features in place of the placeholders."""
        x = self.decoder.embed(input_ids)
        if pixel_values is None or not grids:
            return x
        config = self.config
        slots = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
        return x.masked_scatter(slots[:, None], self.encode(pixel_values, grids).to(x.dtype))

    def encode(self, pixel_values: Tensor, grids: list[Grid], *, chunk: int | None = None) -> Tensor:  # fmt: skip
        """Vision tokens [N / 4, hidden]; at most `chunk` patches at a time, one image or frame at least.

        Frames do not see each other, so chunks change the memory that is needed and nothing else.
        """
        if self.visual is None or self.projector is None:
            raise ValueError("pixel_values: the checkpoint has no vision tower")
        frames = [(1, h, w) for t, h, w in grids for _ in range(t)]
        outputs, start = [], 0
        for part in in_chunks(frames, chunk):
            stop = start + sum(h * w for _, h, w in part)
            features = self.visual(pixel_values[start:stop], part)
            outputs.append(self.projector(features, part))
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def step(
        self,
        position_ids: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_k: int,
        *,
        paging: Paging | None = None,
        dense: bool = False,
        index_loss: bool = False,
    ) -> Step:
        """Rotary tables and lengths of one forward pass (attention.py)."""
        config = self.config

        def table(dim: int) -> Table:
            section = scaled_section(config.mrope_section, config.head_dim, dim)
            return mrope_table(position_ids, dim, config.rope_theta, section, interleaved=config.mrope_interleaved)  # fmt: skip

        index_table = None if config.indexer is None else table(config.indexer.indexer_head_dim)
        return Step(table(config.head_dim), index_table, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, paging, dense, index_loss)  # fmt: skip

    def decode(self, input_ids: Tensor, step: Step, caches: list[LayerCache], features: tuple[Tensor, Tensor] | None = None) -> Tensor:  # fmt: skip
        """Hidden states [T, hidden] of new tokens whose past lies in the caches; writes theirs to it.

        features: rows [M] int64 of the batch that are vision tokens, and these [M, hidden].
        """
        x = self.decoder.embed(input_ids)
        if features is not None:
            x = x.index_copy(0, features[0], features[1].to(x.dtype))
        return self.decoder(x, step, caches)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary]."""
        return self.lm_head(hidden)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of the next tokens: hidden [T, hidden], labels [T] int64, -100 where there is none."""
        return F.cross_entropy(self.head(hidden).float(), labels)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights: N(0, initializer_range), norms 1, biases 0."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif parameter.dim() == 1:
                    parameter.fill_(1)
                else:
                    parameter.normal_(std=self.config.initializer_range)


def in_chunks(frames: list[Grid], chunk: int | None) -> list[list[Grid]]:
    """Splits frames into runs of at most `chunk` patches, at least one frame each."""
    runs: list[list[Grid]] = [[]]
    size = 0
    for frame in frames:
        patches = frame[1] * frame[2]
        if runs[-1] and chunk is not None and size + patches > chunk:
            runs.append([])
            size = 0
        runs[-1].append(frame)
        size += patches
    return runs
