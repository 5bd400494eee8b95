"""indexer_topk in Triton: scores of a window of rows and keys into a workspace that stays in L2, then every row of the
window takes what it needs of them; two launches a window.

The score kernel is that of indexer_logits, the selection topk_select's: a row keeps candidates above a rising bound. Its
candidates, their count and the bound stay in the workspace from window to window, so that ROWS rows select at the same
time and fill the GPU, however long they are. After the last window of keys every row writes its set. Rows that see at
most topk keys are scored by neither kernel and get the identity. Windows follow from T, K and max_seqlen_k alone: nothing
is read on the host.
"""

import torch
import triton
import triton.language as tl

from ..indexer_logits.triton import (
    BLOCK_Q,
    KEY_STEP,
    PAGE_SIZE,
    Window,
    bisection_steps,
    score_packed,
    score_paged,
    visible_keys,
)
from ..topk_select.triton import feed_row, finish_row, sizes

WORKSPACE_BYTES = 60 << 20
ROWS = 512  # selecting at the same time; whole tiles of the score kernel
FEWEST_KEYS = 4096  # of a window


@triton.jit
def indexer_topk_select_kernel(scores, cu_seqlens_q, key_bounds, out, candidates, counts, bounds, first_token,
                               first_key, end_key, num_sequences, num_keys, width, row_stride, topk,
                               STEPS: tl.constexpr, PAGED: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr,
                               SEARCH: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    """One program a row: feeds the keys [first_key, end_key) to its candidates; counts and bounds carry its state."""
    row = tl.program_id(0).to(tl.int64)
    token = first_token + tl.program_id(0)
    keys = candidates + row * (2 * CAPACITY)
    columns = keys + CAPACITY
    _, n = visible_keys(
        token, cu_seqlens_q, key_bounds, num_sequences, num_keys, width, STEPS, PAGED
    )
    count = 0
    bound = tl.full([], float("nan"), tl.float32)
    if (n > topk) & (first_key > 0):
        count = tl.load(counts + row)
        bound = tl.load(bounds + row)
    if (n > topk) & (n > first_key):
        count, bound = feed_row(scores + row * row_stride, first_key, tl.minimum(n, end_key), topk, count, bound, keys,
                                columns, LANES, BITS, SEARCH, CAPACITY)  # fmt: skip
        tl.store(counts + row, count)
        tl.store(bounds + row, bound)
    if end_key == width:
        finish_row(n, topk, count, keys, columns, out + token.to(tl.int64) * topk, SEARCH)


def window_sizes(tokens, width, capacity):
    """Rows and keys of a window: as many rows as select at the same time, as many of their keys as the rest holds; the
    windows of a call equal, up to whole tiles of the score kernel."""
    row_bytes = 8 * capacity
    most_rows = max(min(ROWS, WORKSPACE_BYTES // (row_bytes + 4 * FEWEST_KEYS)), 1)
    rows = min(equal_parts(tokens, most_rows, BLOCK_Q if most_rows >= BLOCK_Q else 1), tokens)
    most_keys = max((WORKSPACE_BYTES // rows - row_bytes) // 4, FEWEST_KEYS)
    return rows, equal_parts(width, most_keys // KEY_STEP * KEY_STEP, KEY_STEP)


def equal_parts(total, most, step):
    """The size of the fewest equal parts of at most `most`, in whole steps; `most` is a multiple of step or less."""
    parts = triton.cdiv(total, most)
    return min(triton.cdiv(triton.cdiv(total, parts), step) * step, max(most, step))


def select_keys(score, width, topk, cu_seqlens_q, key_bounds, num_keys, q, *tensors):
    """Window by window: score(scores of the window, ...), then its rows' candidates."""
    tokens = q.shape[0]
    if cu_seqlens_q.shape[0] == 1 or width == 0:  # no sequence or no key
        return torch.full((tokens, topk), -1, dtype=torch.int32, device=q.device)
    out = torch.empty((tokens, topk), dtype=torch.int32, device=q.device)
    size = sizes(topk, width, tokens)
    capacity, unscored = size["CAPACITY"], width <= topk
    rows, keys = (
        (tokens, width) if unscored or not tokens else window_sizes(tokens, width, capacity)
    )
    held = 0 if unscored else rows
    scores = torch.empty((held, keys), dtype=torch.float32, device=q.device)
    candidates = torch.empty((held, 2, capacity), dtype=torch.int32, device=q.device)
    counts = torch.empty(held, dtype=torch.int32, device=q.device)
    bounds = torch.empty(held, dtype=torch.float32, device=q.device)
    for first in range(0, tokens, max(rows, 1)):
        end = min(first + rows, tokens)
        for first_key in range(0, width, keys):
            window = Window(first, end, first_key, min(first_key + keys, width), width, topk)
            if not unscored:
                score(scores, window, q, *tensors)
            indexer_topk_select_kernel[(end - first,)](
                scores, cu_seqlens_q, key_bounds, out, candidates, counts, bounds, first, first_key, window.end_key,
                cu_seqlens_q.shape[0] - 1, num_keys, width, keys, topk, STEPS=bisection_steps(cu_seqlens_q),
                PAGED=score is score_paged, **size,
            )  # fmt: skip
    return out


def indexer_topk(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk, max_seqlen_k):
    return select_keys(score_packed, max_seqlen_k, topk, cu_seqlens_q, cu_seqlens_k, k.shape[0], q, weights, k,
                       k_scale, cu_seqlens_q, cu_seqlens_k)  # fmt: skip


def indexer_topk_paged(q, weights, index_cache, page_table, lengths, cu_seqlens_q, topk):
    width = page_table.shape[1] * PAGE_SIZE
    return select_keys(score_paged, width, topk, cu_seqlens_q, lengths, 0, q, weights, index_cache, page_table,
                       lengths, cu_seqlens_q)  # fmt: skip
