"""indexer_topk in Triton: the rows go through a workspace that stays in L2, two launches a chunk.

The score kernel of indexer_logits fills the chunk's rows (all multiprocessors share each row's keys, so one long row is
no bottleneck there), then one program a row selects with topk_select's select_row. Rows that see at most topk keys are
scored by neither: the score kernel skips their tiles and select_row writes the identity. The chunk's size follows from
max_seqlen_k alone; the launches from T and max_seqlen_k, so nothing is read on the host.

Workspace: SCORE_BYTES of scores and at most SELECT_PROGRAMS buffers of select_row, 60 MiB together.
"""

import torch
import triton
import triton.language as tl

from ..indexer_logits.triton import (
    BLOCK_Q,
    PAGE_SIZE,
    bisection_steps,
    score_packed,
    score_paged,
    visible_keys,
)
from ..topk_select.triton import CAPACITY, num_groups, select_row

SCORE_BYTES = 36 << 20
SELECT_PROGRAMS = 384  # 64 KB of buffers each
SELECT_BLOCK, SELECT_WARPS = 2048, 16


@triton.jit
def indexer_topk_select_kernel(scores, cu_seqlens_q, key_bounds, out, key_buffer, column_buffer, first_token, rows,
                               num_sequences, num_keys, width, row_stride, topk, STEPS: tl.constexpr,
                               PAGED: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
                               CAPACITY: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    buffer = program.to(tl.int64) * CAPACITY
    for row in range(program, rows, tl.num_programs(0)):
        token = first_token + tl.cast(row, tl.int32)
        _, n = visible_keys(token, cu_seqlens_q, key_bounds, num_sequences, num_keys, width, STEPS, PAGED)  # fmt: skip
        select_row(scores + tl.cast(row, tl.int64) * row_stride, n, topk, out + token.to(tl.int64) * topk,
                   key_buffer + buffer, column_buffer + buffer, GROUPS, BLOCK, CAPACITY)  # fmt: skip


def chunk_rows(width: int) -> int:
    """Rows scored and selected together: whole tiles of the score kernel where SCORE_BYTES hold one."""
    rows = max(SCORE_BYTES // (4 * width), 1)
    return rows // BLOCK_Q * BLOCK_Q or rows


def select_keys(score, width, topk, cu_seqlens_q, key_bounds, num_keys, q, *tensors):
    """Chunk by chunk: score(scores of the chunk, ...) and the selection of its rows."""
    tokens = q.shape[0]
    if cu_seqlens_q.shape[0] == 1 or width == 0:  # no sequence or no key
        return torch.full((tokens, topk), -1, dtype=torch.int32, device=q.device)
    out = torch.empty((tokens, topk), dtype=torch.int32, device=q.device)
    unscored = width <= topk
    rows = tokens if unscored else min(chunk_rows(width), tokens)
    programs = min(rows, SELECT_PROGRAMS)
    stride = triton.cdiv(width, 32) * 32
    scores = torch.empty((0 if unscored else rows, stride), dtype=torch.float32, device=q.device)
    buffers = torch.empty((2, 0 if unscored else programs, CAPACITY), dtype=torch.int32, device=q.device)  # fmt: skip
    for first in range(0, tokens, max(rows, 1)):
        end = min(first + rows, tokens)
        if not unscored:
            score(scores, first, end, width, topk, False, q, *tensors)
        indexer_topk_select_kernel[(programs,)](
            scores, cu_seqlens_q, key_bounds, out, buffers[0], buffers[1], first, end - first,
            cu_seqlens_q.shape[0] - 1, num_keys, width, stride, topk, STEPS=bisection_steps(cu_seqlens_q),
            PAGED=score is score_paged, GROUPS=num_groups(topk), BLOCK=SELECT_BLOCK, CAPACITY=CAPACITY,
            num_warps=SELECT_WARPS,
        )  # fmt: skip
    return out


def indexer_topk(q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k, topk, max_seqlen_k):
    return select_keys(score_packed, max_seqlen_k, topk, cu_seqlens_q, cu_seqlens_k, k.shape[0], q, weights, k,
                       k_scale, cu_seqlens_q, cu_seqlens_k)  # fmt: skip


def indexer_topk_paged(q, weights, index_cache, page_table, lengths, cu_seqlens_q, topk):
    width = page_table.shape[1] * PAGE_SIZE
    return select_keys(score_paged, width, topk, cu_seqlens_q, lengths, 0, q, weights, index_cache, page_table,
                       lengths, cu_seqlens_q)  # fmt: skip
