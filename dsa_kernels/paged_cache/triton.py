"""paged_cache in Triton: copies of rows between packed tensors and pages.

One program moves a tile of tokens and of columns. It loads the tile's slots (a writer) or works out the tile's places
from cu_seqlens and the page table (a reader), then copies under a mask, so that a row without a place touches no memory.
A reader finds the request of each row by bisection of cu_seqlens and checks what it found. Pages, slots and rows are
int64. Bound by bytes: every row is read once and written once.
"""

import torch
import triton
import triton.language as tl

PAGE_SIZE = tl.constexpr(64)
TILE_BYTES = 8192  # per tensor and program: 4 warps with four 16-byte accesses a thread
MAX_COLUMNS = 1024
INDEX_TOKENS = 64  # tokens a program of the index cache's reader and writer
NUM_WARPS = 4


@triton.jit
def token_places(
    rows, total, pages, page_table, table_stride, max_pages, cu_seqlens, batch, search_steps
):
    """Which packed rows (int64) hold a token, and that token's page and offset, int64."""
    first = tl.zeros_like(rows)
    last = first + batch
    for _ in range(search_steps):  # the first request that ends past the row
        middle = (first + last) // 2
        searching = first < last
        stop = tl.load(cu_seqlens + 1 + middle, mask=searching, other=0).to(tl.int64)
        first = tl.where(searching & (stop <= rows), middle + 1, first)
        last = tl.where(searching & (stop > rows), middle, last)
    inside = (rows < total) & (first < batch)
    start = tl.load(cu_seqlens + first, mask=inside, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens + 1 + first, mask=inside, other=0).to(tl.int64)
    position = rows - start
    limit = tl.cast(max_pages, tl.int64) * PAGE_SIZE
    inside = inside & (position >= 0) & (rows < stop) & (position < limit)
    entry = page_table + first * table_stride + position // PAGE_SIZE
    page = tl.load(entry, mask=inside, other=-1).to(tl.int64)
    return inside & (page >= 0) & (page < pages), page, position % PAGE_SIZE


@triton.jit
def load_slots(slots, token, num_tokens, pages):
    """Which tokens have a slot in the cache, and the slot's page and offset, int64."""
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    valid = (slot >= 0) & (slot < tl.cast(pages, tl.int64) * PAGE_SIZE)
    return valid, slot // PAGE_SIZE, slot % PAGE_SIZE


@triton.jit
def write_kv_cache_kernel(k, v, k_cache, v_cache, slots, num_tokens, width, pages, k_stride, v_stride, k_page_stride,
                          v_page_stride, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    valid, page, offset = load_slots(slots, token, num_tokens, pages)
    mask = valid[:, None] & (column < width)
    inner = offset[:, None] * width + column
    k_row = tl.load(k + token[:, None] * k_stride + column, mask=mask)
    v_row = tl.load(v + token[:, None] * v_stride + column, mask=mask)
    tl.store(k_cache + page[:, None] * k_page_stride + inner, k_row, mask=mask)
    tl.store(v_cache + page[:, None] * v_page_stride + inner, v_row, mask=mask)


@triton.jit
def write_index_cache_kernel(k, k_scale, keys, scales, slots, num_tokens, pages, k_stride, page_stride,
                             DIM: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)[None, :]
    valid, page, offset = load_slots(slots, token, num_tokens, pages)
    mask = valid[:, None] & (column < DIM)
    key = tl.load(k + token[:, None] * k_stride + column, mask=mask)
    scale = tl.load(k_scale + token, mask=valid)
    tl.store(keys + page[:, None] * page_stride + offset[:, None] * DIM + column, key, mask=mask)
    tl.store(scales + page * (page_stride // 4) + 16 * DIM + offset, scale, mask=valid)


@triton.jit
def read_kv_cache_kernel(k, v, k_cache, v_cache, page_table, cu_seqlens, total, width, pages, k_page_stride,
                         v_page_stride, table_stride, max_pages, batch, search_steps, TOKENS: tl.constexpr,
                         COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside, page, offset = token_places(
        row, total, pages, page_table, table_stride, max_pages, cu_seqlens, batch, search_steps
    )
    mask = inside[:, None] & (column < width)
    inner = offset[:, None] * width + column
    k_row = tl.load(k_cache + page[:, None] * k_page_stride + inner, mask=mask, other=0.0)
    v_row = tl.load(v_cache + page[:, None] * v_page_stride + inner, mask=mask, other=0.0)
    out = row[:, None] * width + column
    mask = (row < total)[:, None] & (column < width)
    tl.store(k + out, k_row, mask=mask)
    tl.store(v + out, v_row, mask=mask)


@triton.jit
def read_index_cache_kernel(k, k_scale, keys, scales, page_table, cu_seqlens, total, pages, page_stride, table_stride,
                            max_pages, batch, search_steps, DIM: tl.constexpr, COLUMNS: tl.constexpr,
                            TOKENS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside, page, offset = token_places(
        row, total, pages, page_table, table_stride, max_pages, cu_seqlens, batch, search_steps
    )
    source = keys + page[:, None] * page_stride + offset[:, None] * DIM + column
    key = tl.load(source, mask=inside[:, None] & (column < DIM), other=0)
    source = scales + page * (page_stride // 4) + 16 * DIM + offset
    scale = tl.load(source, mask=inside, other=0.0)
    mask = (row < total)[:, None] & (column < DIM)
    tl.store(k + row[:, None] * DIM + column, key, mask=mask)
    tl.store(k_scale + row, scale, mask=row < total)


def tile(cache):
    """(tokens, columns) of a program of the KV cache's reader and writer, and the row's width."""
    width = cache.shape[2] * cache.shape[3]
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    return max(TILE_BYTES // (columns * cache.element_size()), 1), columns, width


def write_kv_cache(k, v, k_cache, v_cache, slots):
    tokens, columns, width = tile(k_cache)
    num_tokens, pages = k.shape[0], k_cache.shape[0]
    if num_tokens * width * pages == 0:
        return
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(width, columns))
    write_kv_cache_kernel[grid](
        k, v, k_cache, v_cache, slots, num_tokens, width, pages, k.stride(0), v.stride(0), k_cache.stride(0),
        v_cache.stride(0), TOKENS=tokens, COLUMNS=columns, num_warps=NUM_WARPS,
    )  # fmt: skip


def write_index_cache(k, k_scale, index_cache, slots):
    (num_tokens, dim), pages = k.shape, index_cache.shape[0]
    if num_tokens * pages == 0:
        return
    write_index_cache_kernel[(triton.cdiv(num_tokens, INDEX_TOKENS),)](
        k.view(torch.uint8), k_scale, index_cache, index_cache.view(torch.float32), slots, num_tokens, pages,
        k.stride(0), index_cache.stride(0), DIM=dim, COLUMNS=triton.next_power_of_2(dim), TOKENS=INDEX_TOKENS,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def read_kv_cache(k_cache, v_cache, page_table, cu_seqlens, total):
    tokens, columns, width = tile(k_cache)
    k = torch.empty((total, *k_cache.shape[2:]), dtype=k_cache.dtype, device=k_cache.device)
    v = torch.empty_like(k)
    if total * width == 0:
        return k, v
    grid = (triton.cdiv(total, tokens), triton.cdiv(width, columns))
    read_kv_cache_kernel[grid](
        k, v, k_cache, v_cache, page_table, cu_seqlens, total, width, k_cache.shape[0], k_cache.stride(0),
        v_cache.stride(0), page_table.stride(0), page_table.shape[1], page_table.shape[0],
        page_table.shape[0].bit_length(), TOKENS=tokens, COLUMNS=columns, num_warps=NUM_WARPS,
    )  # fmt: skip
    return k, v


def read_index_cache(index_cache, page_table, cu_seqlens, total):
    dim = index_cache.shape[1] // 64 - 4
    k = torch.empty((total, dim), dtype=torch.uint8, device=index_cache.device)
    k_scale = torch.empty((total,), dtype=torch.float32, device=index_cache.device)
    if total > 0:
        read_index_cache_kernel[(triton.cdiv(total, INDEX_TOKENS),)](
            k, k_scale, index_cache, index_cache.view(torch.float32), page_table, cu_seqlens, total,
            index_cache.shape[0], index_cache.stride(0), page_table.stride(0), page_table.shape[1],
            page_table.shape[0], page_table.shape[0].bit_length(), DIM=dim, COLUMNS=triton.next_power_of_2(dim),
            TOKENS=INDEX_TOKENS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return k.view(torch.float8_e4m3fn), k_scale
