"""Benchmark cases of the whole network at full size, random weights: prefill and decode, sparse and dense.

The peer is Hugging Face's Qwen3-MoE with SDPA on the same weights (its parameters are views of ours, so one card holds
both); it has no indexer. Decode steps read a cache filled with random keys; ours replays a CUDA graph of compiled layers.

    python -m bench model            the cases
    python -m bench.model_parts      where the time of a prefill and of a decode step goes; the largest context; a video
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from keye_model.attention import Paging
from keye_model.cache import PagedCache, Pages, pages_for
from keye_model.config import KeyeConfig
from keye_model.graphs import DecodeGraphs
from keye_model.model import KeyeVL
from keye_model.weights import empty_model

from .case import Case, Unavailable

CHUNK = 32768  # tokens of a prefill that run together


def full_config(device: torch.device) -> KeyeConfig:
    """Keye-VL-2.0-30B-A3B; on a CPU two of its layers, 2 of 8 experts a token, and a small vocabulary."""
    if device.type == "cuda":
        return KeyeConfig()
    return KeyeConfig(num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, vocab_size=1024, vision=None, image_token_id=1022, video_token_id=1023)  # fmt: skip


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32  # few CPUs multiply bf16 fast


@functools.cache
def network(device: torch.device) -> KeyeVL:
    model = empty_model(full_config(device), device, dtype_on(device)).eval()
    model.init_weights()
    return model


@functools.cache
def hugging_face(device: torch.device):
    """Qwen3-MoE over the parameters of `network`."""
    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    ours, config = network(device), full_config(device)
    sizes = {key: getattr(config, key) for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "rms_norm_eps",
        "max_position_embeddings", "tie_word_embeddings",
    )}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    with torch.device("meta"):
        theirs = Qwen3MoeForCausalLM._from_config(
            Qwen3MoeConfig(**sizes, rope_parameters=rope), attn_implementation="sdpa", dtype=dtype_on(device),
        )  # fmt: skip
    state = dict(hugging_face_state(ours))
    missing, unexpected = theirs.load_state_dict(state, assign=True, strict=False)
    if missing or unexpected:
        raise Unavailable(f"this transformers names other parameters: {[*missing, *unexpected][:3]}")  # fmt: skip
    with device:
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # it holds a buffer
    return theirs.eval()


def hugging_face_state(ours: KeyeVL) -> Iterator[tuple[str, Tensor]]:
    decoder = ours.decoder
    yield "model.embed_tokens.weight", decoder.embed.weight
    yield "model.norm.weight", decoder.norm.weight
    yield "lm_head.weight", ours.lm_head.weight
    for i, layer in enumerate(decoder.layers):
        prefix, attention, mlp = f"model.layers.{i}.", layer.attention, layer.mlp
        yield f"{prefix}input_layernorm.weight", layer.attention_norm.weight
        yield f"{prefix}post_attention_layernorm.weight", layer.mlp_norm.weight
        for letter, part in zip("qkv", attention.qkv.weight.split(attention.splits)):
            yield f"{prefix}self_attn.{letter}_proj.weight", part
        yield f"{prefix}self_attn.o_proj.weight", attention.out.weight
        yield f"{prefix}self_attn.q_norm.weight", attention.q_norm
        yield f"{prefix}self_attn.k_norm.weight", attention.k_norm
        yield f"{prefix}mlp.gate.weight", mlp.router.weight
        yield f"{prefix}mlp.experts.gate_up_proj", mlp.experts.w13
        yield f"{prefix}mlp.experts.down_proj", mlp.experts.w2


# ---- prefill ---------------------------------------------------------------------------------------


@torch.no_grad()
def prefill(ids: Tensor, *, dense: bool = False, chunk: int = CHUNK) -> Tensor:
    """Logits [V] of the last token of one prompt, computed piece by piece into a cache."""
    device, tokens = ids.device, len(ids)
    model = network(device)
    cache = cache_of(device, pages_for(tokens))
    table = torch.arange(pages_for(tokens), dtype=torch.int32, device=device)[None]
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        slots = torch.arange(start, stop, device=device)
        lengths = torch.tensor([stop], dtype=torch.int32, device=device)
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (stop - start, stop))  # fmt: skip
        paging = Paging(table, lengths, slots, num_decodes=0, prefill_keys=stop if start else 0)
        step = model.step(slots.expand(3, -1), cu_q, cu_k, stop, paging=paging, dense=dense)
        hidden = model.decode(ids[start:stop], step, cache.layers)
    return model.head(hidden[-1])


@functools.lru_cache(maxsize=1)
def cache_of(device: torch.device, pages: int) -> PagedCache:
    return PagedCache(full_config(device), pages, device, dtype_on(device))


@torch.no_grad()
def hugging_face_prefill(ids: Tensor) -> Tensor:
    return hugging_face(ids.device)(ids[None], use_cache=True, logits_to_keep=1).logits[0, -1]


PREFILL_PEERS = {"Hugging Face": hugging_face_prefill}


def prefill_case(tokens: int, device: torch.device, *, dense: bool, quick: bool) -> Case:
    config = full_config(device)
    return Case(
        name=f"prefill {tokens} {'dense' if dense else 'sparse'}",
        inputs=lambda: (torch.randint(0, config.vocab_size - 2, (tokens,), device=device),),
        ours=functools.partial(prefill, dense=dense),
        verify=finite,
        peers={} if dense else PREFILL_PEERS,  # theirs is dense in both: once is enough
        flops=2.0 * tokens * active_parameters(config) + attention_flops(config, tokens, dense),
        quick=quick,
        context=tokens,
        series=f"prefill {'dense' if dense else 'sparse'}",
    )


def finite(logits: Tensor, inputs: tuple) -> None:
    assert logits.isfinite().all() and logits.float().std() > 0


def active_parameters(config: KeyeConfig) -> float:
    """Weights a token multiplies with, embedding and head left out."""
    hidden, heads, groups = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    attention = hidden * config.head_dim * (2 * heads + 2 * groups)
    experts = 3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok
    return float(config.num_hidden_layers * (attention + experts + hidden * config.num_experts))


def attention_flops(config: KeyeConfig, tokens: int, dense: bool) -> float:
    """Scores and weighted sums over the visible or selected keys; sparse: and the indexer's scores."""
    pairs, topk = tokens * (tokens + 1) / 2, config.indexer.topk
    if dense or tokens <= topk:
        selected, scored = pairs, 0.0
    else:
        selected, scored = topk * (topk + 1) / 2 + (tokens - topk) * topk, pairs
    indexer = 2.0 * scored * config.indexer.indexer_num_heads * config.indexer.indexer_head_dim
    return config.num_hidden_layers * (4.0 * selected * config.num_attention_heads * config.head_dim + indexer)  # fmt: skip


# ---- decode ----------------------------------------------------------------------------------------


class Decoding:
    """One step of `batch` requests of `context` keys, over a cache of random keys."""

    def __init__(self, device: torch.device, batch: int, context: int, dense: bool) -> None:
        model = network(device)
        pages = pages_for(context)
        self.cache = cache_of(device, pages * batch)
        for part in (self.cache.k, self.cache.v):
            part.normal_()
        dim = model.config.indexer.indexer_head_dim
        self.cache.index[..., : 64 * dim] = torch.randint(0, 100, (64 * dim,), device=device)
        self.cache.index[..., 64 * dim :].view(torch.float32).fill_(1.0)
        self.graphs = DecodeGraphs(model, self.cache, dense=dense, compile=True) if device.type == "cuda" else None  # fmt: skip
        shuffled = torch.randperm(pages * batch).view(batch, pages)
        numbers = [Pages("i", row) for row in shuffled.tolist()]
        self.arguments = ([1] * batch, [context - 1] * batch, numbers, [context] * batch)
        self.model, self.dense, self.device = model, dense, device

    def __call__(self) -> Tensor:
        if self.graphs is not None:
            return self.graphs.run(*self.arguments)
        ids, positions, pages, lengths = (torch.tensor(x) for x in self.arguments)
        cu = torch.arange(len(ids) + 1, dtype=torch.int32)
        slots = pages[:, -1] * 64 + (lengths - 1) % 64
        paging = Paging(pages.int(), lengths.int(), slots, num_decodes=len(ids))
        step = self.model.step(positions.expand(3, -1), cu, cu, int(lengths.max()), paging=paging, dense=self.dense)  # fmt: skip
        with torch.no_grad():
            return self.model.head(self.model.decode(ids, step, self.cache.layers))


class HuggingFaceDecoding:
    """The same with their DynamicCache, which is cut back to the context before every step."""

    def __init__(self, device: torch.device, batch: int, context: int) -> None:
        from transformers import DynamicCache

        self.model, self.context = hugging_face(device), context
        config = self.model.config
        shape = (batch, config.num_key_value_heads, context - 1, config.head_dim)
        self.past = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys = torch.randn(shape, dtype=dtype_on(device), device=device)
            self.past.update(keys, keys, layer)
        self.ids = torch.ones(batch, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        for layer in self.past.layers:
            layer.keys, layer.values = (
                x[:, :, : self.context - 1] for x in (layer.keys, layer.values)
            )
        return self.model(self.ids, past_key_values=self.past, use_cache=True).logits


# One of each at a time: their caches fill the card.
decoding = functools.lru_cache(maxsize=1)(Decoding)
hugging_face_decoding = functools.lru_cache(maxsize=1)(HuggingFaceDecoding)


def decode_case(batch: int, context: int, device: torch.device, *, dense: bool, quick: bool) -> Case:  # fmt: skip
    config = full_config(device)
    kv = 4.0 * config.num_key_value_heads * config.head_dim
    keys = context if dense else min(context, config.indexer.topk)
    index = 0.0 if dense or context <= config.indexer.topk else (config.indexer.indexer_head_dim + 4.0) * context  # fmt: skip
    head = 2.0 * config.hidden_size * config.vocab_size
    experts = min(batch * config.num_experts_per_tok, config.num_experts)
    shared = active_parameters(config) / config.num_hidden_layers - 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok  # fmt: skip
    weights = config.num_hidden_layers * 2.0 * (shared + 3 * config.hidden_size * config.moe_intermediate_size * experts)  # fmt: skip

    return Case(
        name=f"decode {batch} x {context} {'dense' if dense else 'sparse'}",
        inputs=lambda: (torch.zeros(1, device=device),),
        ours=lambda *_: decoding(device, batch, context, dense)(),
        verify=finite,
        peers={"Hugging Face": lambda *_: hugging_face_decoding(device, batch, context)()},
        bytes=weights + head + config.num_hidden_layers * batch * (keys * kv + index),
        quick=quick,
        context=context,
        series=f"decode, batch {batch}, {'dense' if dense else 'sparse'}",
    )


def cases(device: torch.device) -> list[Case]:
    device = torch.empty(0, device=device).device  # "cuda" is "cuda:0": one network for both names
    if device.type == "cpu":
        return [
            prefill_case(2304, device, dense=False, quick=True),
            decode_case(2, 4096, device, dense=False, quick=True),
        ]
    prefills = [
        prefill_case(n, device, dense=dense, quick=n == 131072 and not dense)
        for n in (8192, 32768, 131072)
        for dense in (False, True)
    ]
    decodes = [  # 8 x 131072 keys need 103 GB beside the weights: more than a card has
        decode_case(batch, n, device, dense=dense, quick=(batch, n, dense) == (1, 131072, False))
        for batch, n in ((1, 8192), (1, 32768), (1, 131072), (8, 8192), (8, 32768))
        for dense in (False, True)
    ]
    return prefills + decodes
