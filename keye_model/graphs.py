"""Decoding under CUDA graphs: one graph for each batch size and context width, over fixed buffers.

A step of B requests runs in the graph of the next larger batch and width. Rows without a request have length 0 and no
page: nothing is written or read for them. With `compile`, torch.compile makes the code between our kernels before the
capture: residual sums and norms become one kernel, and so do rotary tables and slots.
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor

from dsa_kernels import token_slots
from dsa_kernels.paged_cache import PAGE_SIZE

from .attention import LayerCache, Paging, Step
from .cache import PagedCache, Pages
from .decoder import DecoderLayer
from .model import KeyeVL

SMALLEST_WIDTH = 4096  # keys; widths double up to the model's context
MOST_GRAPHS = 256  # of one process that torch.compile makes code for


class DecodeInputs:
    """Inputs of one graph, B requests of up to W keys, in one piece of memory: one copy moves them all.

    Attributes: positions [3, B], input_ids [B] int64; lengths [B], page_table [B, W / 64] int32.
    """

    def __init__(
        self, batch: int, width: int, device: torch.device, *, pinned: bool = False
    ) -> None:
        columns = width // PAGE_SIZE
        wide, narrow = 4 * batch, batch * (1 + columns)  # numbers of 8 and of 4 bytes
        self.memory = torch.zeros(8 * wide + 4 * narrow, dtype=torch.uint8, device=device, pin_memory=pinned)  # fmt: skip
        rows = self.memory[: 8 * wide].view(torch.int64).view(4, batch)
        self.positions, self.input_ids = rows[:3], rows[3]
        rest = self.memory[8 * wide :].view(torch.int32)
        self.lengths, self.page_table = rest[:batch], rest[batch:].view(batch, columns)
        self.page_table.fill_(-1)  # nothing is written or read without a page


class DecodeBuffers:
    """What one graph reads and writes: inputs on the device and, pinned, on the host; logits [B, V] float32."""

    def __init__(self, batch: int, width: int, vocabulary: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.inputs = DecodeInputs(batch, width, device)
        self.host = DecodeInputs(batch, width, torch.device("cpu"), pinned=on_gpu)
        self.logits = torch.zeros(batch, vocabulary, device=device)
        self.copied = torch.cuda.Event() if on_gpu else None

    def fill(self, input_ids: list[int], positions: list[int], pages: list[Pages], lengths: list[int]) -> None:  # fmt: skip
        """Requests of the next step; the rows behind them are of length 0 and have no page."""
        if self.copied is not None:
            self.copied.synchronize()  # the copy of the last step
        n, host = len(input_ids), self.host
        host.memory.zero_()
        host.input_ids[:n] = torch.tensor(input_ids)
        host.positions[:, :n] = torch.tensor(positions)
        host.lengths[:n] = torch.tensor(lengths)
        host.page_table.fill_(-1)
        for row, numbers in zip(host.page_table, pages):
            row[: len(numbers)] = torch.frombuffer(numbers, dtype=torch.int32)
        self.inputs.memory.copy_(host.memory, non_blocking=True)
        if self.copied is not None:
            self.copied.record()


class DecodeGraphs:
    def __init__(
        self, model: KeyeVL, cache: PagedCache, *, dense: bool = False, compile: bool = False
    ) -> None:
        self.model, self.cache, self.dense, self.compile = model, cache, dense, compile
        self.device = cache.k.device
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, DecodeBuffers]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        compiled = partial(torch.compile, dynamic=False, fullgraph=True, disable=not compile)
        self.prepare, self.run_layer = compiled(prepare), compiled(run_layer)

    def run(self, input_ids: list[int], positions: list[int], pages: list[Pages], lengths: list[int]) -> Tensor:  # fmt: skip
        """Logits [n, V] float32 of one new token of each of n requests; valid until the next call.

        Args:
            input_ids: the new tokens. positions: theirs, the same on all axes.
            pages: page numbers of each request. lengths: keys of each, the new token included.
        """
        n = len(input_ids)
        graph, buffers = self.graph_for(n, max(lengths))
        buffers.fill(input_ids, positions, pages, lengths)
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

    def capture(self, batch: int, width: int) -> tuple[torch.cuda.CUDAGraph, DecodeBuffers]:
        buffers = DecodeBuffers(batch, width, self.model.config.vocab_size, self.device)
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
        model, inputs = self.model, buffers.inputs
        limit = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)
        with limit if self.compile else contextlib.nullcontext():
            step = self.prepare(model, inputs, width, self.dense)
            x = model.decoder.embed(inputs.input_ids)
            for layer, cache in zip(model.decoder.layers, self.cache.layers):
                x = self.run_layer(layer, x, step, cache)
        buffers.logits.copy_(model.head(model.decoder.norm(x)))


def prepare(model: KeyeVL, inputs: DecodeInputs, width: int, dense: bool) -> Step:
    batch = len(inputs.lengths)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=inputs.lengths.device)
    slots = token_slots(inputs.page_table, cu_seqlens, inputs.lengths, batch)
    paging = Paging(inputs.page_table, inputs.lengths, slots, num_decodes=batch)
    return model.step(inputs.positions, cu_seqlens, cu_seqlens, width, paging=paging, dense=dense)


def run_layer(layer: DecoderLayer, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
    return layer(x, step, cache)[0]
