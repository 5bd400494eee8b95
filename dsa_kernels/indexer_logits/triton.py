"""indexer_logits in Triton. One kernel for each layout; indexer_topk launches the same ones on chunks of its rows.

Packed (many queries a sequence): a program owns BLOCK_Q tokens x BLOCK_K keys. The tile of keys stays in shared
memory, a loop over the heads multiplies it with the head's queries (tokens are the MMA rows, keys its columns) and adds
w * ReLU to a tile of fp32 sums in registers: no reduction across lanes, two instructions a product in the epilogue. At
16 heads x 64 the FP8 tensor cores and the epilogue need about the same time, so programs are small enough (4 warps,
212 registers a thread) for two of them to share a multiprocessor and fill each other's waits.

Paged (few queries a sequence): a program owns PAGED_BLOCK_Q tokens x PAGED_BLOCK_K keys. Keys are the MMA rows, the
heads of one token its columns, and the heads are added within a row: no MMA row is empty, and with one query a request
the kernel is bound by reading the index cache once.

Both find the sequence of each token by bisection in cu_seqlens_q; a tile of tokens that spans several sequences goes
through them one after the other. The order of the sums over d and over heads is fixed by the block sizes, which depend
on nothing but H and D: a score has the same bits in every batch, chunk and op. e4m3 goes into the tensor cores as it is
from compute capability 8.9; before that, and in the interpreter, as float16, which holds it exactly.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..dispatch import has_fp8_units
from ..triton_math import e4m3_to_fp16

PAGE_SIZE = 64
KEY_STEP = 128  # windows of keys begin at multiples of it
BLOCK_Q, BLOCK_K, WARPS, STAGES = 64, 128, 4, 3
MAX_REGISTERS = None  # a cap of 128 spills nothing with 8 warps
PAGED_BLOCK_Q, PAGED_BLOCK_K, PAGED_WARPS, PAGED_STAGES = 8, 128, 4, 3
# Before compute capability 8.9 the operands are float16, which take more registers.
FLOAT16_BLOCK_K, FLOAT16_WARPS, FLOAT16_PAGED_WARPS = 64, 8, 8


@triton.jit
def sequence_of(tokens, cu_seqlens, num_sequences, STEPS: tl.constexpr):
    """The last sequence that begins at or before each token; 0 if none does."""
    sequence = tokens * 0
    for i in tl.static_range(STEPS):
        candidate = sequence + (1 << (STEPS - 1 - i))
        begin = tl.load(cu_seqlens + candidate, mask=candidate < num_sequences, other=2147483647)
        sequence = tl.where(begin <= tokens, candidate, sequence)
    return sequence


@triton.jit
def visible_keys(tokens, cu_seqlens_q, key_bounds, num_sequences, num_keys, width, STEPS: tl.constexpr,
                 PAGED: tl.constexpr):  # fmt: skip
    """The sequence of each token and how many keys it sees; key_bounds is lengths if PAGED, else cu_seqlens_k."""
    sequence = sequence_of(tokens, cu_seqlens_q, num_sequences, STEPS)
    begin = tl.load(cu_seqlens_q + sequence)
    end = tl.load(cu_seqlens_q + sequence + 1)
    if PAGED:
        keys = tl.minimum(tl.maximum(tl.load(key_bounds + sequence), 0), width)
    else:
        first = tl.minimum(tl.maximum(tl.load(key_bounds + sequence), 0), num_keys)
        keys = tl.minimum(tl.maximum(tl.load(key_bounds + sequence + 1), 0), num_keys) - first
    visible = tl.minimum(tl.maximum(keys - (end - tokens) + 1, 0), tl.minimum(keys, width))
    return sequence, tl.where((begin <= tokens) & (tokens < end), visible, 0)


@triton.jit
def operand(codes, FP8_DOT: tl.constexpr):
    """e4m3 for tl.dot: as loaded, or from bytes to float16."""
    if FP8_DOT:
        return codes
    else:
        return e4m3_to_fp16(codes)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def indexer_logits_kernel(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, out, first_token, end_token,
                          first_key, end_key, num_sequences, num_keys, width, q_stride, w_stride, k_stride,
                          out_stride, min_visible, H, D: tl.constexpr, STEPS: tl.constexpr, FP8_DOT: tl.constexpr, FILL: tl.constexpr,
                          BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Writes the scores of the tokens [first_token, end_token) and keys [first_key, end_key) to out[0:, 0:], for rows
    that see more than min_visible keys; FILL: -inf into the columns not visible."""
    tiles_k = tl.cdiv(end_key - first_key, BLOCK_K)
    base = first_key + (tl.program_id(0) % tiles_k) * BLOCK_K
    out -= first_key
    row = (tl.program_id(0) // tiles_k) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    active = first_token + row < end_token
    tokens = tl.minimum(first_token + row, end_token - 1)
    sequence, visible = visible_keys(tokens, cu_seqlens_q, cu_seqlens_k, num_sequences, num_keys, width, STEPS, False)  # fmt: skip
    columns = base + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, D)
    if FILL:
        out_tile = out + row.to(tl.int64)[:, None] * out_stride + columns[None, :]
        hidden = active[:, None] & (columns[None, :] >= visible[:, None])
        tl.store(out_tile, float("-inf"), mask=hidden & (columns < width)[None, :])

    scored = active & (visible > min_visible) & (visible > base)
    first = tl.min(tl.where(scored, sequence, 2147483647))
    last = tl.max(tl.where(scored, sequence, -1))
    for s in range(first, last + 1):
        # Everything below follows from the sequence's own scalars, so that the compiler does not keep addresses and
        # masks of the whole tile in registers across this loop (90 registers a thread).
        begin = tl.load(cu_seqlens_q + s)
        end = tl.load(cu_seqlens_q + s + 1)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_k + s), 0), num_keys)
        keys = tl.minimum(tl.maximum(tl.load(cu_seqlens_k + s + 1), 0), num_keys) - start
        offset = keys - (end - begin)  # the token at position u sees the keys <= offset + u
        stop = tl.minimum(keys, width)
        u = tokens - begin
        mine = (
            active
            & (u >= 0)
            & (tokens < end)
            & (tl.minimum(offset + u + 1, stop) > tl.maximum(base, min_visible))
        )
        if stop > base:
            k_tile = k + start.to(tl.int64) * k_stride
            tile = tl.load(k_tile + columns.to(tl.int64)[:, None] * k_stride + dims[None, :],
                           mask=(columns < stop)[:, None], other=0.0)  # fmt: skip
            tile = operand(tile, FP8_DOT).T
            q_tile = q + begin.to(tl.int64) * q_stride
            w_tile = weights + begin.to(tl.int64) * w_stride
            score = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            for h in range(H):
                head = tl.load(q_tile + u.to(tl.int64)[:, None] * q_stride + h * D + dims[None, :],
                               mask=mine[:, None], other=0.0)  # fmt: skip
                w = tl.load(w_tile + u.to(tl.int64) * w_stride + h, mask=mine, other=0.0)
                dot = tl.dot(operand(head, FP8_DOT), tile)
                score = tl.fma(w[:, None], relu(dot), score)
            scale = tl.load(k_scale + start + columns, mask=columns < stop, other=0.0)
            out_rows = out + (begin - first_token).to(tl.int64) * out_stride
            seen = columns[None, :] < tl.minimum(offset + u + 1, stop)[:, None]
            tl.store(out_rows + u.to(tl.int64)[:, None] * out_stride + columns[None, :], score * scale[None, :],
                     mask=mine[:, None] & seen)  # fmt: skip


@triton.jit
def indexer_logits_paged_kernel(q, weights, cache, cache_scale, page_table, lengths, cu_seqlens_q, out, first_token,
                                end_token, first_key, end_key, num_sequences, num_pages, width, q_stride, w_stride,
                                table_stride, out_stride, min_visible, H, HEADS: tl.constexpr, D: tl.constexpr,
                                STEPS: tl.constexpr, FP8_DOT: tl.constexpr, FILL: tl.constexpr,
                                PAGE_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The same over pages; cache_scale is the cache seen as float32, HEADS a power of two >= H."""
    tiles_k = tl.cdiv(end_key - first_key, BLOCK_K)
    base = first_key + (tl.program_id(0) % tiles_k) * BLOCK_K
    out -= first_key
    row = (tl.program_id(0) // tiles_k) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    active = first_token + row < end_token
    tokens = tl.minimum(first_token + row, end_token - 1)
    sequence, visible = visible_keys(tokens, cu_seqlens_q, lengths, num_sequences, 0, width, STEPS, True)  # fmt: skip
    columns = base + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, D)
    heads = tl.arange(0, HEADS)
    if FILL:
        hidden = active[:, None] & (columns[None, :] >= visible[:, None])
        out_tile = out + row.to(tl.int64)[:, None] * out_stride + columns[None, :]
        tl.store(out_tile, float("-inf"), mask=hidden & (columns < width)[None, :])

    scored = active & (visible > min_visible) & (visible > base)
    first = tl.min(tl.where(scored, sequence, 2147483647))
    last = tl.max(tl.where(scored, sequence, -1))
    for s in range(first, last + 1):
        mine = scored & (sequence == s)
        longest = tl.max(tl.where(mine, visible, 0))
        if longest > base:
            inside = columns < longest
            table = page_table + tl.cast(s, tl.int64) * table_stride
            page = tl.load(table + columns // PAGE_SIZE, mask=inside, other=-1)
            exists = (page >= 0) & (page < num_pages)
            page64 = page.to(tl.int64)
            slot = columns % PAGE_SIZE
            codes = cache + page64 * (PAGE_SIZE * (D + 4)) + slot * D
            tile = tl.load(codes[:, None] + dims[None, :], mask=exists[:, None], other=0.0)
            tile = operand(tile, FP8_DOT)
            scales = cache_scale + page64 * (PAGE_SIZE * (D + 4) // 4) + PAGE_SIZE * D // 4 + slot
            scale = tl.load(scales, mask=exists, other=0.0)
            begin = tl.min(tl.where(mine, tokens, 2147483647))
            end = tl.max(tl.where(mine, tokens, -1)) + 1
            for t in range(begin, end):
                t64 = tl.cast(t, tl.int64)
                seen = tl.max(tl.where(mine & (tokens == t), visible, 0))
                token_q = q + t64 * q_stride + heads[:, None] * D + dims[None, :]
                token = tl.load(token_q, mask=(heads < H)[:, None], other=0.0)
                w = tl.load(weights + t64 * w_stride + heads, mask=heads < H, other=0.0)
                dot = tl.dot(tile, operand(token, FP8_DOT).T)
                score = tl.sum(relu(dot) * w[None, :], 1) * scale
                score = tl.where(exists, score, float("-inf"))
                tl.store(out + (t64 - first_token) * out_stride + columns, score, mask=columns < seen)  # fmt: skip


def bisection_steps(cu_seqlens: torch.Tensor) -> int:
    return max(cu_seqlens.shape[0] - 2, 0).bit_length()


@dataclass(frozen=True)
class Window:
    """The part of the score matrix that a launch computes: tokens [first_token, end_token), keys [first_key, end_key),
    first_key a multiple of KEY_STEP; of rows that see more than min_visible of `width` keys."""

    first_token: int
    end_token: int
    first_key: int
    end_key: int
    width: int
    min_visible: int = 0
    fill: bool = False

    def tiles(self, block_q, block_k):
        rows, columns = self.end_token - self.first_token, self.end_key - self.first_key
        return (triton.cdiv(rows, block_q) * triton.cdiv(columns, block_k),)

    @property
    def bounds(self):
        return self.first_token, self.end_token, self.first_key, self.end_key


def score_packed(out, window, q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k):
    """The scores of the window into out[0:, 0:]."""
    fp8 = has_fp8_units(q.device)
    if not fp8:
        q, k = q.view(torch.uint8), k.view(torch.uint8)
    block_k, warps = (BLOCK_K, WARPS) if fp8 else (FLOAT16_BLOCK_K, FLOAT16_WARPS)
    indexer_logits_kernel[window.tiles(BLOCK_Q, block_k)](
        q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, out, *window.bounds, cu_seqlens_q.shape[0] - 1,
        k.shape[0], window.width, q.stride(0), weights.stride(0), k.stride(0), out.stride(0), window.min_visible,
        q.shape[1], D=q.shape[2], STEPS=bisection_steps(cu_seqlens_q), FP8_DOT=fp8, FILL=window.fill, BLOCK_Q=BLOCK_Q, BLOCK_K=block_k, num_warps=warps, num_stages=STAGES,
        maxnreg=MAX_REGISTERS if fp8 else None,
    )  # fmt: skip


def score_paged(out, window, q, weights, index_cache, page_table, lengths, cu_seqlens_q):
    """The same over pages."""
    fp8 = has_fp8_units(q.device)
    heads, dim = q.shape[1:]
    scales = index_cache.view(torch.float32)
    if fp8:
        index_cache = index_cache.view(torch.float8_e4m3fn)
    else:
        q = q.view(torch.uint8)
    indexer_logits_paged_kernel[window.tiles(PAGED_BLOCK_Q, PAGED_BLOCK_K)](
        q, weights, index_cache, scales, page_table, lengths, cu_seqlens_q, out, *window.bounds,
        cu_seqlens_q.shape[0] - 1, index_cache.shape[0], window.width, q.stride(0), weights.stride(0),
        page_table.stride(0), out.stride(0), window.min_visible, heads, HEADS=max(triton.next_power_of_2(heads), 16),
        D=dim, STEPS=bisection_steps(cu_seqlens_q), FP8_DOT=fp8, FILL=window.fill, PAGE_SIZE=PAGE_SIZE,
        BLOCK_Q=PAGED_BLOCK_Q, BLOCK_K=PAGED_BLOCK_K, num_warps=PAGED_WARPS if fp8 else FLOAT16_PAGED_WARPS, num_stages=PAGED_STAGES,
    )  # fmt: skip


def logits_of(score, width, cu_seqlens_q, q, *tensors):
    tokens = q.shape[0]
    if cu_seqlens_q.shape[0] == 1:  # no sequence
        return torch.full((tokens, width), -torch.inf, dtype=torch.float32, device=q.device)
    out = torch.empty((tokens, width), dtype=torch.float32, device=q.device)
    if out.numel():
        score(out, Window(0, tokens, 0, width, width, fill=True), q, *tensors)
    return out


def indexer_logits(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_k):
    return logits_of(score_packed, max_seqlen_k, cu_seqlens_q, q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k)  # fmt: skip


def indexer_logits_paged(q, weights, index_cache, page_table, lengths, cu_seqlens_q):
    width = page_table.shape[1] * PAGE_SIZE
    return logits_of(score_paged, width, cu_seqlens_q, q, weights, index_cache, page_table, lengths, cu_seqlens_q)  # fmt: skip
