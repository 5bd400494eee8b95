"""The tensors of one forward pass of the engine."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dsa_kernels import token_slots

from .attention import Paging
from .cache import pages_for
from .config import KeyeConfig
from .requests import Sequence


class Batch:
    """Decodes first, then pieces of prompts."""

    def __init__(self, pieces: list[tuple[Sequence, int]], device: torch.device) -> None:
        self.pieces = sorted(pieces, key=lambda piece: not piece[0].decoding)
        self.device = device
        lengths = [s.cached + n for s, n in self.pieces]
        decodes = sum(s.decoding for s, _ in self.pieces)
        prefills = self.pieces[decodes:]
        has_past = any(s.cached for s, _ in prefills)
        self.input_ids = self.tensor([t for s, n in self.pieces for t in s.tokens[s.cached : s.cached + n]])  # fmt: skip
        self.positions = torch.cat([s.positions_of(s.cached, s.cached + n) for s, n in self.pieces], 1).to(device)  # fmt: skip
        self.cu_seqlens_q = self.cumulative([n for _, n in self.pieces])
        self.cu_seqlens_k = self.cumulative([s.cached + n for s, n in prefills])
        self.max_seqlen_k = max(lengths)
        table = torch.full((len(self.pieces), pages_for(self.max_seqlen_k)), -1, dtype=torch.int32)
        for row, (s, _) in zip(table, self.pieces):
            row[: len(s.pages)] = torch.frombuffer(s.pages, dtype=torch.int32)
        table = table.to(device)
        on_device = self.tensor(lengths, torch.int32)
        slots = token_slots(table, self.cu_seqlens_q, on_device, len(self.input_ids))
        keys = sum(s.cached + n for s, n in prefills) if has_past else 0
        self.paging = Paging(table, on_device, slots, decodes, keys)
        ends = list(itertools.accumulate(n for _, n in self.pieces))
        self.last_rows = [(end - 1, s) for end, (s, n) in zip(ends, self.pieces) if s.cached + n == len(s.tokens)]  # fmt: skip

    def tensor(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def cumulative(self, lengths: list[int]) -> Tensor:
        return self.tensor([0, *itertools.accumulate(lengths)], torch.int32)

    def features(self, config: KeyeConfig) -> tuple[Tensor, Tensor] | None:
        """(rows, vision tokens) of the placeholders among the new tokens of prompts; generated ones are plain tokens."""
        rows, parts, start = [], [], 0
        for sequence, n in self.pieces:
            if sequence.features is not None and sequence.cached < sequence.prompt_length:
                ids = sequence.prompt.input_ids
                slots = (ids == config.image_token_id) | (ids == config.video_token_id)
                first, stop = sequence.cached, sequence.cached + n
                before, inside = int(slots[:first].sum()), slots[first:stop]
                rows.append(start + inside.nonzero()[:, 0])
                parts.append(sequence.features[before : before + int(inside.sum())])
            start += n
        return (torch.cat(rows).to(self.device), torch.cat(parts)) if rows else None
