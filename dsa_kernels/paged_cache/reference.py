"""The definition of paged_cache: index arithmetic and one indexed assignment or gather per tensor."""

import torch


def write_kv_cache(k, v, k_cache, v_cache, slots):
    valid = (slots >= 0) & (slots < k_cache.shape[0] * 64)
    page, offset = slots[valid] // 64, slots[valid] % 64
    k_cache[page, offset] = k[valid]
    v_cache[page, offset] = v[valid]


def write_index_cache(k, k_scale, index_cache, slots):
    keys, scales = index_parts(index_cache)
    valid = (slots >= 0) & (slots < index_cache.shape[0] * 64)
    page, offset = slots[valid] // 64, slots[valid] % 64
    keys[page, offset] = k.view(torch.uint8)[valid]
    scales[page, offset] = k_scale[valid]


def read_kv_cache(k_cache, v_cache, page_table, cu_seqlens, total):
    inside, page, offset = places(k_cache.shape[0], page_table, cu_seqlens, total)
    k = k_cache.new_zeros((total, *k_cache.shape[2:]))
    v = torch.zeros_like(k)
    k[inside], v[inside] = k_cache[page, offset], v_cache[page, offset]
    return k, v


def read_index_cache(index_cache, page_table, cu_seqlens, total):
    keys, scales = index_parts(index_cache)
    inside, page, offset = places(index_cache.shape[0], page_table, cu_seqlens, total)
    k = keys.new_zeros((total, keys.shape[2]))
    k_scale = scales.new_zeros(total)
    k[inside], k_scale[inside] = keys[page, offset], scales[page, offset]
    return k.view(torch.float8_e4m3fn), k_scale


def index_parts(index_cache):
    """Views of the keys [pages, 64, Di] uint8 and of the scales [pages, 64] float32."""
    dim = index_cache.shape[1] // 64 - 4
    keys, scales = index_cache[:, : 64 * dim], index_cache[:, 64 * dim :]
    return keys.unflatten(1, (64, dim)), scales.view(torch.float32)


def places(pages, page_table, cu_seqlens, total):
    """Which packed rows hold a token, and that token's page and offset."""
    row = torch.arange(total, dtype=torch.int32, device=page_table.device)
    b = torch.searchsorted(
        cu_seqlens[1:], row, right=True
    )  # the first request that ends past the row
    inside = (b < len(page_table)) & (cu_seqlens[b] <= row)
    inside &= row < cu_seqlens[(b + 1).clamp(max=len(page_table))]
    position = row.long() - cu_seqlens[b].long()
    inside &= position < page_table.shape[1] * 64
    page = torch.full_like(b, -1)
    page[inside] = page_table[b[inside], position[inside] // 64].long()
    inside &= (page >= 0) & (page < pages)
    return inside, page[inside], position[inside] % 64
