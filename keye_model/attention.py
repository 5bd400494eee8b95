"""Grouped-query attention over the tokens that a lightning indexer selects.

Dense attention serves sequences no longer than k (nothing to select), and everything where it is asked for. With a paged
cache the keys and values of earlier tokens come from there: requests of one new token (decode) read it in place, longer
pieces of a prompt (prefill) gather their context once. Shapes: T new tokens, H query heads, G KV heads, D head dim; Hi
indexer heads, Di their dim; S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dsa_kernels
from dsa_kernels import AttentionTarget, IndexerNorms

from .config import IndexerConfig, KeyeConfig
from .linear import Linear
from .rope import Table


@dataclass(frozen=True)
class Paging:
    """Where the past of every sequence of a step lies, and where its new tokens go.

    Attributes:
        page_table: [S, P] int32. lengths: [S] int32, keys of each sequence, the new ones included.
        slots: [T] int64, places of the new tokens (`dsa_kernels.token_slots`).
        num_decodes: the first so many sequences have one new token each.
        prefill_keys: keys of the other sequences together; 0 if they have no past, and need no gathering.
    """

    page_table: Tensor
    lengths: Tensor
    slots: Tensor
    num_decodes: int
    prefill_keys: int = 0


@dataclass(frozen=True)
class Step:
    """What one forward pass works on: new tokens packed back to back, sequence by sequence.

    Attributes:
        table, index_table: rotary tables [T, D/2] of attention and indexer.
        cu_seqlens_q, cu_seqlens_k: [S+1] int32, new tokens and keys of each sequence; with a cache, cu_seqlens_k counts
            the keys of the prefilled sequences alone, cu_seqlens_q all.
        max_seqlen_k: an upper bound of the sequences' keys, known on the host.
        paging: None without a cache.
        dense: attend to every visible key.
        index_loss: compute the indexer's loss (training).
    """

    table: Table
    index_table: Table | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    paging: Paging | None = None
    dense: bool = False
    index_loss: bool = False


@dataclass(frozen=True)
class LayerCache:
    """The pages of one layer: k, v [pages, 64, G, D]; index [pages, 64 * (Di + 4)] uint8, None without an indexer."""

    k: Tensor
    v: Tensor
    index: Tensor | None


class IndexInputs(NamedTuple):
    """What the scores are made of: queries [T, Hi, Di] and key [T, Di] in e4m3, head weights [T, Hi], key scale [T]."""

    q: Tensor
    weights: Tensor
    k: Tensor
    k_scale: Tensor


class Indexer(nn.Module):
    """Scores every earlier token with a few small heads and one shared key; the best k are attended to."""

    def __init__(self, config: KeyeConfig, indexer: IndexerConfig) -> None:
        super().__init__()
        self.heads, self.dim, self.topk = indexer.indexer_num_heads, indexer.indexer_head_dim, indexer.topk  # fmt: skip
        self.splits = (self.heads * self.dim, self.heads, self.dim)  # queries, gates, key
        self.proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.q_norm = nn.Parameter(torch.ones(self.dim))
        self.k_norm = nn.LayerNorm(self.dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, Hi, Di], gates [T, Hi] and key [T, Di] before the norms."""
        q, gate, k = self.proj(x).split(self.splits, -1)
        return q.unflatten(-1, (self.heads, self.dim)), gate, k

    def prepare(self, x: Tensor, table: Table, **cache: Tensor) -> IndexInputs:
        """Inputs of the scores; the key is also written to the cache if there is one."""
        q, gate, k = self.project(x)
        norms = IndexerNorms(self.q_norm, self.k_norm.weight, self.k_norm.bias, self.k_norm.eps)
        return IndexInputs(*dsa_kernels.indexer_prepare(q, k, gate, norms, *table, **cache))

    def loss(
        self, x: Tensor, step: Step, target: AttentionTarget, indices: Tensor | None
    ) -> Tensor:
        """KL(attention, softmax(scores)) of every token [T]; gradients reach the indexer alone.

        In the inputs' precision, without the Hadamard transform: it is orthogonal and changes no product.
        """
        assert step.index_table is not None
        q, gate, k = self.project(x.detach())
        k = self.k_norm(k)[:, None]
        q, k = dsa_kernels.norm_rope(
            q, k, self.q_norm, None, *step.index_table, eps=self.k_norm.eps
        )
        weights = gate.float() * self.dim**-0.5
        lengths = (step.cu_seqlens_q, step.cu_seqlens_k)
        return dsa_kernels.indexer_loss(q, k[:, 0], weights, target, *lengths, indices=indices)


class Attention(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim  # fmt: skip
        self.splits = (self.heads * self.dim, self.groups * self.dim, self.groups * self.dim)
        self.eps = config.rms_norm_eps
        self.qkv = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.out = Linear(self.heads * self.dim, config.hidden_size)
        self.q_norm = nn.Parameter(torch.ones(self.dim))
        self.k_norm = nn.Parameter(torch.ones(self.dim))
        self.indexer = None if config.indexer is None else Indexer(config, config.indexer)

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention of the new tokens x [T, hidden], and the indexer's loss [T] if the step asks for it."""
        q, k, v = (
            part.unflatten(-1, (-1, self.dim)) for part in self.qkv(x).split(self.splits, -1)
        )
        q, k = dsa_kernels.norm_rope(q, k, self.q_norm, self.k_norm, *step.table, eps=self.eps)
        if step.paging is None:
            out, loss = self.packed(x, q, k, v, step)
        else:
            assert cache is not None
            out, loss = self.paged(x, q, k, v, step, step.paging, cache), None
        return self.out(out.flatten(1)), loss

    def selects(self, step: Step) -> bool:
        """Whether a token of the step may see more keys than it attends to."""
        return self.indexer is not None and not step.dense and step.max_seqlen_k > self.indexer.topk

    def packed(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        lengths, indices = (step.cu_seqlens_q, step.cu_seqlens_k), None
        if self.selects(step):
            assert self.indexer is not None and step.index_table is not None
            with torch.no_grad():
                inputs = self.indexer.prepare(x, step.index_table)
                indices = self.select(inputs, *lengths, step.max_seqlen_k)
            out, lse = dsa_kernels.sparse_attention(q, k, v, indices, *lengths)
        else:
            out, lse = dsa_kernels.varlen_attention(q, k, v, *lengths)
        if not step.index_loss or self.indexer is None:
            return out, None
        target = AttentionTarget(q.detach(), k.detach(), lse.detach(), self.dim**-0.5)
        return out, self.indexer.loss(x, step, target, indices)

    def select(self, inputs: IndexInputs, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int) -> Tensor:  # fmt: skip
        """The k best visible keys of every token [T, k]."""
        assert self.indexer is not None
        return dsa_kernels.indexer_topk(
            inputs.q, inputs.weights, inputs.k, inputs.k_scale, cu_seqlens_q, cu_seqlens_k, self.indexer.topk,
            max_seqlen_k=max_seqlen_k,
        )  # fmt: skip

    def paged(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, step: Step, paging: Paging, cache: LayerCache) -> Tensor:  # fmt: skip
        """Writes the new keys, then attends: decodes in place, prefills over their gathered context."""
        dsa_kernels.write_kv_cache(k, v, cache.k, cache.v, paging.slots)
        inputs = None
        if self.indexer is not None:
            assert step.index_table is not None and cache.index is not None
            pages = {"index_cache": cache.index, "slots": paging.slots}
            inputs = self.indexer.prepare(x, step.index_table, **pages)
        n = paging.num_decodes
        parts = []
        if n:
            parts.append(self.decode(q[:n], inputs, step, paging, cache))
        if q.shape[0] > n:
            rest = None if inputs is None else IndexInputs(*(part[n:] for part in inputs))
            parts.append(self.prefill(q[n:], k[n:], v[n:], rest, step, paging, cache))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode(self, q: Tensor, inputs: IndexInputs | None, step: Step, paging: Paging, cache: LayerCache) -> Tensor:  # fmt: skip
        n = paging.num_decodes
        requests = (paging.page_table[:n], paging.lengths[:n], step.cu_seqlens_q[: n + 1])
        if self.selects(step):
            assert self.indexer is not None and inputs is not None and cache.index is not None
            indices = dsa_kernels.indexer_topk_paged(
                inputs.q[:n], inputs.weights[:n], cache.index, *requests, self.indexer.topk
            )
        else:  # every key; those past a request's length count as empty
            every = torch.arange(step.max_seqlen_k, dtype=torch.int32, device=q.device)
            indices = every.expand(n, -1)
        return dsa_kernels.sparse_decode(q, cache.k, cache.v, indices, *requests)[0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, inputs: IndexInputs | None, step: Step, paging: Paging, cache: LayerCache) -> Tensor:  # fmt: skip
        n = paging.num_decodes
        cu_q, cu_k = step.cu_seqlens_q[n:] - n, step.cu_seqlens_k
        past = (paging.page_table[n:], cu_k, paging.prefill_keys)
        if paging.prefill_keys:
            k, v = dsa_kernels.read_kv_cache(cache.k, cache.v, *past)
        if not self.selects(step):
            return dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k)[0]
        assert inputs is not None
        if paging.prefill_keys:
            assert cache.index is not None
            index_k, index_scale = dsa_kernels.read_index_cache(cache.index, *past)
            inputs = inputs._replace(k=index_k, k_scale=index_scale)
        indices = self.select(inputs, cu_q, cu_k, step.max_seqlen_k)
        return dsa_kernels.sparse_attention(q, k, v, indices, cu_q, cu_k)[0]
