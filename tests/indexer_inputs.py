"""Random inputs of the two rooms that score index keys, packed and paged; their opcheck."""

import torch


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def e4m3(*shape, device):
    return torch.randn(shape, device=device).to(torch.float8_e4m3fn)


def packed(cu_q, cu_k, heads, dim, device, tokens=None, keys=None):
    """q, weights, k, k_scale, cu_seqlens_q, cu_seqlens_k"""
    tokens, keys = tokens or cu_q[-1], keys or cu_k[-1]
    return (
        e4m3(tokens, heads, dim, device=device),
        torch.randn(tokens, heads, device=device),
        e4m3(keys, dim, device=device),
        torch.rand(keys, device=device) + 0.5,
        int32(cu_q, device),
        int32(cu_k, device),
    )


def paged(cu_q, lengths, max_pages, heads, dim, device):
    """q, weights, index_cache, page_table, lengths, cu_seqlens_q: shuffled pages; garbage where nothing may be read."""
    used = [(n + 63) // 64 for n in lengths]
    num_pages = sum(used) + 3
    order = torch.randperm(num_pages).int()
    table = torch.randint(-(2**31), 2**31 - 1, (len(lengths), max_pages), dtype=torch.int32)
    cache = torch.full((num_pages, 64, dim + 4), 0xFF, dtype=torch.uint8)  # NaN keys, NaN scales
    keys = cache.view(num_pages, -1)[:, : 64 * dim].view(num_pages, 64, dim)
    scales = cache.view(num_pages, -1)[:, 64 * dim :].view(num_pages, 64, 4)
    for b, n in enumerate(lengths):
        table[b, : used[b]] = order[sum(used[:b]) : sum(used[: b + 1])]
        for page, first in zip(table[b, : used[b]].tolist(), range(0, n, 64)):
            here = min(64, n - first)
            keys[page, :here] = e4m3(here, dim, device="cpu").view(torch.uint8)
            scales[page, :here] = (torch.rand(here, 1) + 0.5).view(torch.uint8).view(here, 4)
    tokens = cu_q[-1]
    return (
        e4m3(tokens, heads, dim, device=device),
        torch.randn(tokens, heads, device=device),
        cache.view(num_pages, -1).to(device),
        table.to(device),
        int32(lengths, device),
        int32(cu_q, device),
    )


def opcheck(op, args):
    """Every check but test_schema, which compares inputs by arithmetic that torch lacks for float8."""
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, args, test_utils=checks)
