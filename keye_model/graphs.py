"""Decoding under CUDA graphs: one graph for each batch size and context width, over fixed buffers.

A step of B requests runs in the graph of the next larger batch and width. Rows without a request have length 0 and no
page: nothing is written or read for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_kernels import token_slots
from dsa_kernels.paged_cache import PAGE_SIZE

from .attention import Paging
from .cache import PagedCache
from .model import KeyeVL

SMALLEST_WIDTH = 4096  # keys; widths double up to the model's context


@dataclass
class DecodeBuffers:
    """Inputs and output of one graph: B requests, up to W keys each."""

    input_ids: Tensor  # [B]
    positions: Tensor  # [3, B]
    page_table: Tensor  # [B, W / 64]
    lengths: Tensor  # [B]
    logits: Tensor  # [B, V] float32

    @classmethod
    def make(cls, batch: int, width: int, vocabulary: int, device: torch.device) -> DecodeBuffers:
        def full(shape: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            full((batch,), 0, torch.int64),
            full((3, batch), 0, torch.int64),
            full((batch, width // PAGE_SIZE), -1, torch.int32),
            full((batch,), 0, torch.int32),
            full((batch, vocabulary), 0, torch.float32),
        )


class DecodeGraphs:
    def __init__(self, model: KeyeVL, cache: PagedCache, *, dense: bool = False) -> None:
        self.model, self.cache, self.dense = model, cache, dense
        self.device = cache.k.device
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, DecodeBuffers]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, input_ids: list[int], positions: list[int], pages: list[list[int]], lengths: list[int]) -> Tensor:  # fmt: skip
        """Logits [n, V] float32 of one new token of each of n requests; valid until the next call.

        Args:
            input_ids: the new tokens. positions: theirs, the same on all axes.
            pages: page numbers of each request. lengths: keys of each, the new token included.
        """
        n = len(input_ids)
        graph, buffers = self.graph_for(n, max(lengths))
        self.fill(buffers, input_ids, positions, pages, lengths)
        graph.replay()
        return buffers.logits[:n]

    def graph_for(self, batch: int, longest: int) -> tuple[torch.cuda.CUDAGraph, DecodeBuffers]:
        width = SMALLEST_WIDTH
        while width < longest:
            width *= 2
        key = (1 << (batch - 1).bit_length(), width)
        if key not in self.graphs:
            self.graphs[key] = self.capture(*key)
        return self.graphs[key]

    def fill(self, buffers: DecodeBuffers, input_ids: list[int], positions: list[int], pages: list[list[int]], lengths: list[int]) -> None:  # fmt: skip
        batch, columns = buffers.page_table.shape
        rest = batch - len(input_ids)
        table = torch.full((batch, columns), -1, dtype=torch.int32)
        for row, numbers in zip(table, pages):
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
        buffers.page_table.copy_(table)
        buffers.input_ids.copy_(torch.tensor(input_ids + [0] * rest))
        buffers.positions.copy_(torch.tensor(positions + [0] * rest).expand(3, -1))
        buffers.lengths.copy_(torch.tensor(lengths + [0] * rest, dtype=torch.int32))

    def capture(self, batch: int, width: int) -> tuple[torch.cuda.CUDAGraph, DecodeBuffers]:
        buffers = DecodeBuffers.make(batch, width, self.model.config.vocab_size, self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.forward(buffers, width)  # compiles what there is to compile
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.forward(buffers, width)
        return graph, buffers

    @torch.no_grad()
    def forward(self, buffers: DecodeBuffers, width: int) -> None:
        batch = buffers.input_ids.shape[0]
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
        slots = token_slots(buffers.page_table, cu_seqlens, buffers.lengths, batch)
        paging = Paging(buffers.page_table, buffers.lengths, slots, num_decodes=batch)
        step = self.model.step(
            buffers.positions, cu_seqlens, cu_seqlens, width, paging=paging, dense=self.dense
        )
        hidden = self.model.decode(buffers.input_ids, step, self.cache.layers)
        buffers.logits.copy_(self.model.head(hidden))
