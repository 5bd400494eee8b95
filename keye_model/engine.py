"""The inference engine: continuous batching over a paged cache.

Each step takes every sequence that is being decoded, and pieces of waiting prompts as far as the token budget goes, through
one forward pass; a step of decodes alone replays a CUDA graph. When pages run out, the youngest sequence gives its pages
back and starts again from its tokens later. A request that can never fit is refused where it is submitted; one that fails
takes no other with it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .cache import OutOfPages, PagedCache, Pages, pages_for
from .graphs import DecodeGraphs
from .model import KeyeVL
from .requests import Completion, Delta, Prompt, Sequence
from .sampling import SamplingParams, choose


class Engine:
    """Serves requests of one model.

    Args:
        model: on its device, in eval mode.
        num_pages: of the cache (`cache.bytes_per_token` says what 64 tokens take).
        tokenizer: makes text of tokens and ends texts at stop strings; None: tokens alone.
        max_sequences: decoded at the same time. prefill_tokens: of a step, decodes not counted.
        vision_patches: of one pass through the ViT, which bounds its activations.
        dense: attend to every key.
        graphs: decode under CUDA graphs; default: where the model is on a GPU.
        compile: the graphs' code by torch.compile: faster steps, some seconds more at the first one of each batch size.
    """

    def __init__(
        self,
        model: KeyeVL,
        num_pages: int,
        *,
        tokenizer: Any = None,
        max_sequences: int = 64,
        prefill_tokens: int = 8192,
        vision_patches: int = 8192,
        dense: bool = False,
        graphs: bool | None = None,
        compile: bool = False,
    ) -> None:
        weight = model.decoder.embed.weight
        self.model, self.tokenizer, self.dense = model, tokenizer, dense
        self.device = weight.device
        self.cache = PagedCache(model.config, num_pages, self.device, weight.dtype)
        self.max_sequences, self.prefill_tokens, self.vision_patches = max_sequences, prefill_tokens, vision_patches  # fmt: skip
        use_graphs = self.device.type == "cuda" if graphs is None else graphs
        self.graphs = DecodeGraphs(model, self.cache, dense=dense, compile=compile) if use_graphs else None  # fmt: skip
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.numbers = itertools.count()

    # ---- what callers use --------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queues a prompt; returns the request's number, which its deltas carry.

        Raises:
            ValueError: the prompt is malformed, or can never fit into the cache or the model's context.
        """
        params = params or SamplingParams()
        self.check(prompt, params)
        number = next(self.numbers)
        first, *others = [Sequence(number, i, prompt, params, self.tokenizer) for i in range(params.n)]  # fmt: skip
        first.siblings = others
        self.waiting.append(first)
        return number

    def stream(self) -> Iterator[Delta]:
        """Works until every request is finished."""
        while self.waiting or self.running:
            yield from self.step()

    def generate(self, prompts: list[Prompt], params: SamplingParams | list[SamplingParams] | None = None) -> list[list[Completion]]:  # fmt: skip
        """The completions of every prompt, one for each sample. Works until nothing is queued; what was submitted before
        is finished too, but not returned."""
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(prompts)
        numbers = [self.submit(prompt, p) for prompt, p in zip(prompts, each)]
        results = {number: [Completion() for _ in range(p.n)] for number, p in zip(numbers, each)}
        for delta in self.stream():
            if delta.request not in results:
                continue
            completion = results[delta.request][delta.sample]
            completion.text += delta.text
            completion.finish = delta.finish
            if delta.token is not None and delta.logprob is not None:
                completion.tokens.append(delta.token)
                completion.logprobs.append(delta.logprob)
        return [results[number] for number in numbers]

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """One forward pass over what there is to do; what it adds to each sample."""
        deltas: list[Delta] = []
        self.admit(deltas)
        pieces = self.decode_pieces()
        pieces += self.prefill_pieces()
        if not pieces:
            return deltas
        logits, sequences = self.forward(pieces)
        for sequence, length in pieces:
            sequence.cached += length
        chosen = self.fork_finished_prompts(sequences)
        if not chosen:
            return deltas
        rows = torch.tensor([row for row, _ in chosen], device=self.device)
        params = [sequence.params for _, sequence in chosen]
        draws = [float(torch.rand((), generator=sequence.random)) for _, sequence in chosen]
        tokens, logprobs = choose(logits[rows], params, draws)
        for (_, sequence), token, logprob in zip(chosen, tokens.tolist(), logprobs.tolist()):
            deltas.append(self.extend(sequence, token, logprob))
        return deltas

    # ---- scheduling --------------------------------------------------------------------------------

    def admit(self, deltas: list[Delta]) -> None:
        """Moves waiting sequences to the running ones while there is room for their first piece."""
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if pages_for(min(len(sequence.tokens), self.prefill_tokens)) > len(self.cache.free):
                break
            self.waiting.popleft()
            try:
                self.encode(sequence)
            except Exception as error:
                deltas += self.fail(sequence, error)
                continue
            self.running.append(sequence)

    def encode(self, sequence: Sequence) -> None:
        prompt = sequence.prompt
        if prompt.pixel_values is None or sequence.features is not None:
            return
        pixels = prompt.pixel_values.to(self.device)
        sequence.features = self.model.encode(pixels, prompt.grids, chunk=self.vision_patches)

    def fail(self, sequence: Sequence, error: Exception) -> list[Delta]:
        finish = f"error: {type(error).__name__}: {error}"
        everyone = [sequence, *sequence.siblings]
        return [Delta(s.request, s.sample, None, None, "", finish) for s in everyone]

    def decode_pieces(self) -> list[tuple[Sequence, int]]:
        """Every sequence with one new token; the youngest ones give way where pages run out."""
        pieces = []
        for sequence in list(self.running):
            if sequence.decoding and sequence in self.running and self.reserve(sequence, 1):
                pieces.append((sequence, 1))
        return [piece for piece in pieces if piece[0] in self.running]

    def reserve(self, sequence: Sequence, length: int) -> bool:
        """Pages for the next `length` tokens of a sequence, from younger ones if there are no free ones."""
        while True:
            needed = pages_for(sequence.cached + length) - len(sequence.pages)
            try:
                sequence.pages += self.cache.allocate(max(needed, 0))
                return True
            except OutOfPages:
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is sequence:
                    return False

    def preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.release(sequence.pages)
        sequence.pages, sequence.cached = Pages("i"), 0
        self.waiting.appendleft(sequence)

    def prefill_pieces(self) -> list[tuple[Sequence, int]]:
        """Pieces of prompts, oldest first, within the budget and the free pages."""
        pieces: list[tuple[Sequence, int]] = []
        budget = self.prefill_tokens
        for sequence in self.running:
            length = min(len(sequence.tokens) - sequence.cached, budget)
            if sequence.decoding or length == 0:
                continue
            needed = pages_for(sequence.cached + length) - len(sequence.pages)
            if needed > len(self.cache.free):
                if not pieces and sequence is self.running[0]:
                    self.preempt_all_but_first()
                    if needed <= len(self.cache.free):
                        sequence.pages += self.cache.allocate(needed)
                        return [(sequence, length)]
                break
            sequence.pages += self.cache.allocate(max(needed, 0))
            pieces.append((sequence, length))
            budget -= length
        return pieces

    def preempt_all_but_first(self) -> None:
        for sequence in self.running[:0:-1]:
            self.preempt(sequence)

    # ---- one forward pass --------------------------------------------------------------------------

    def forward(self, pieces: list[tuple[Sequence, int]]) -> tuple[Tensor, list[Sequence]]:
        """Logits [n, V] float32 of the sequences whose last token is among the pieces, and these."""
        if self.graphs is not None and all(s.decoding for s, _ in pieces):
            sequences = [s for s, _ in pieces]
            logits = self.graphs.run(
                [s.tokens[-1] for s in sequences], [s.cached + s.next_position for s in sequences],
                [s.pages for s in sequences], [s.cached + 1 for s in sequences],
            )  # fmt: skip
            return logits, sequences
        batch = Batch(pieces, self.device)
        step = self.model.step(
            batch.positions, batch.cu_seqlens_q, batch.cu_seqlens_k, batch.max_seqlen_k,
            paging=batch.paging, dense=self.dense,
        )  # fmt: skip
        hidden = self.model.decode(batch.input_ids, step, self.cache.layers, batch.features(self.model.config))  # fmt: skip
        last = batch.tensor([row for row, _ in batch.last_rows])
        logits = self.model.head(hidden[last]).float()
        return logits, [sequence for _, sequence in batch.last_rows]

    def fork_finished_prompts(self, sequences: list[Sequence]) -> list[tuple[int, Sequence]]:
        """(row of the logits, sequence) of every sample that gets a token; samples of a prompt share its row."""
        chosen = []
        for row, sequence in enumerate(sequences):
            chosen.append((row, sequence))
            for sibling in sequence.siblings:
                try:
                    sibling.pages = self.cache.fork(sequence.pages, sequence.cached)
                except OutOfPages:
                    self.waiting.append(sibling)  # computes the prompt for itself
                    continue
                sibling.cached, sibling.features = sequence.cached, sequence.features
                self.running.append(sibling)
                chosen.append((row, sibling))
            sequence.siblings = []
        return chosen

    def extend(self, sequence: Sequence, token: int, logprob: float) -> Delta:
        """Adds a token to a sample; a finished one gives its pages back."""
        sequence.tokens.append(token)
        params, config = sequence.params, self.model.config
        ended = token in config.eos_token_ids and not params.ignore_eos
        text = "" if sequence.stream is None or ended else sequence.stream.push(token)
        finish = None
        if ended or (sequence.stream is not None and sequence.stream.stopped):
            finish = "stop"
        elif len(sequence.tokens) - sequence.prompt_length >= params.max_new_tokens:
            finish = "length"
        if finish is not None:
            text += "" if sequence.stream is None else sequence.stream.flush()
            self.running.remove(sequence)
            self.cache.release(sequence.pages)
            sequence.pages = Pages("i")
        return Delta(sequence.request, sequence.sample, token, logprob, text, finish)

    # ---- checks ------------------------------------------------------------------------------------

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises ValueError for what would fail later, in the middle of a batch."""
        config, length = self.model.config, prompt.input_ids.numel()
        if prompt.input_ids.dim() != 1 or length == 0:
            raise ValueError(f"input_ids: expected shape [T] with T > 0, got {list(prompt.input_ids.shape)}")  # fmt: skip
        low, high = int(prompt.input_ids.min()), int(prompt.input_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"input_ids: expected ids in [0, {config.vocab_size}), got {low} to {high}")  # fmt: skip
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: strings need the engine's tokenizer")
        if prompt.position_ids is not None and prompt.position_ids.shape != (3, length):
            raise ValueError(f"position_ids: expected shape [3, {length}], got {list(prompt.position_ids.shape)}")  # fmt: skip
        total = length + params.max_new_tokens
        if total > config.max_position_embeddings:
            raise ValueError(f"{length} + {params.max_new_tokens} tokens exceed the context of {config.max_position_embeddings}")  # fmt: skip
        if pages_for(total) > self.cache.num_pages:
            raise ValueError(f"{length} + {params.max_new_tokens} tokens need {pages_for(total)} pages, the cache has {self.cache.num_pages}")  # fmt: skip
        ids = prompt.input_ids
        slots = int(((ids == config.image_token_id) | (ids == config.video_token_id)).sum())
        patches = sum(t * h * w for t, h, w in prompt.grids)
        given = 0 if prompt.pixel_values is None else len(prompt.pixel_values)
        merge = 4 if config.vision is None else config.vision.spatial_merge_size**2
        if given != patches or slots * merge != patches:
            raise ValueError(f"pixel_values: {given} patches, grids of {patches}, {slots} placeholders of {merge} patches")  # fmt: skip
