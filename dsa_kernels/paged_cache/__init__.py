"""paged_cache: layout, writers and readers of the paged KV cache and of the paged index cache.

A page holds PAGE_SIZE = 64 tokens. KV pages are [pages, 64, G, D], one tensor for K and one for V. An index page is a row
of uint8 [pages, 64 * (Di + 4)]: 64 * Di bytes of e4m3 keys, token-major, then 64 float32 scales. A slot is the place of a
token, page * 64 + offset, int64. Position p of request b lives in page page_table[b, p // 64] at offset p % 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOATS, FP8, FP32, INT32, INT64, UINT8, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, register

PAGE_SIZE = 64


def write_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Copies token t to the place slots[t] of both caches, in place: k_cache[slot // 64, slot % 64] = k[t].

    A slot outside [0, 64 * pages), -1 above all, is skipped. Slots must be distinct; where two tokens name one slot its
    content is not defined.

    Args:
        k, v: [T, G, D] float32 or bfloat16, each token's [G, D] contiguous (a split of a projection will do).
        k_cache, v_cache: [pages, 64, G, D], the dtype of k, each page contiguous.
        slots: [T] int64, see `token_slots`.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact copies; bitwise deterministic; no host sync; CUDA-graph safe; T = 0 writes nothing; allocates nothing.
    """
    _write_kv(k, v, k_cache, v_cache, slots)


def write_index_cache(k: Tensor, k_scale: Tensor, index_cache: Tensor, slots: Tensor) -> None:
    """Copies the index key and the scale of token t to the place slots[t] of the index cache, in place.

    Slots as in `write_kv_cache`.

    Args:
        k: [T, Di] float8_e4m3fn, last dimension contiguous.
        k_scale: [T] float32.
        index_cache: [pages, 64 * (Di + 4)] uint8, each page contiguous and at a multiple of 4 bytes.
        slots: [T] int64.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device.

    Exact copies; bitwise deterministic; no host sync; CUDA-graph safe; T = 0 writes nothing; allocates nothing.
    """
    _write_index(k, k_scale, index_cache, slots)


def read_kv_cache(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    """Gathers the first cu_seqlens[b+1] - cu_seqlens[b] tokens of every request b into packed tensors.

    Row r with cu_seqlens[b] <= r < cu_seqlens[b+1] holds position r - cu_seqlens[b] of request b. Rows of no request,
    positions past the page table and pages outside [0, pages) read as 0. Where cu_seqlens does not ascend, a row reads
    as 0 or as that of a request whose range holds it.

    Args:
        k_cache, v_cache: [pages, 64, G, D] float32 or bfloat16, each page contiguous.
        page_table: [B, max_pages] int32, last dimension contiguous.
        cu_seqlens: [B + 1] int32, on the device.
        total: rows of the result, known on the host; normally cu_seqlens[-1].

    Returns:
        k, v: [total, G, D], the dtype of the caches.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or total < 0.

    Exact copies; bitwise deterministic; no host sync; CUDA-graph safe; total = 0 gives empty tensors; allocates the
    result alone.
    """
    return _read_kv(k_cache, v_cache, page_table, cu_seqlens, total)


def read_index_cache(
    index_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    """Gathers the index keys and scales of every request into packed tensors; rows as in `read_kv_cache`.

    Args:
        index_cache: [pages, 64 * (Di + 4)] uint8, each page contiguous and at a multiple of 4 bytes.
        page_table: [B, max_pages] int32, last dimension contiguous.
        cu_seqlens: [B + 1] int32, on the device.
        total: rows of the result, known on the host.

    Returns:
        k: [total, Di] float8_e4m3fn; k_scale: [total] float32. Rows without a token are 0 in both.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or total < 0.

    Exact copies; bitwise deterministic; no host sync; CUDA-graph safe; total = 0 gives empty tensors; allocates the
    result alone.
    """
    return _read_index(index_cache, page_table, cu_seqlens, total)


def token_slots(
    page_table: Tensor, cu_seqlens_q: Tensor, lengths: Tensor, num_tokens: int
) -> Tensor:
    """The slots of a step's new tokens: token i of request b has position lengths[b] - n_b + i.

    n_b = cu_seqlens_q[b+1] - cu_seqlens_q[b] is the request's number of new tokens; lengths counts them in.

    Args:
        page_table: [B, max_pages] int32.
        cu_seqlens_q: [B + 1] int32, on the device.
        lengths: [B] int32, keys in the cache after the step.
        num_tokens: T, known on the host.

    Returns:
        slots: [T] int64, page * 64 + offset; -1 for tokens of no request, at negative positions, past the page table
        or in a page below 0 (the writers skip pages past the cache).

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, or num_tokens < 0.

    Exact; bitwise deterministic; no host sync; CUDA-graph safe; T = 0 or B = 0 give no slot or -1; plain torch with a
    few temporaries of 8 T bytes.
    """
    a = Arguments("token_slots")
    a.tensor("page_table", page_table, "B M", INT32)
    a.tensor("cu_seqlens_q", cu_seqlens_q, "B+1", INT32, contiguous=True)
    a.tensor("lengths", lengths, "B", INT32, contiguous=True)
    a.integer("num_tokens", num_tokens, 0)
    token = torch.arange(num_tokens, dtype=torch.int32, device=page_table.device)
    batch, limit = a["B"], a["M"] * PAGE_SIZE
    if batch == 0 or limit == 0:
        return torch.full_like(token, -1, dtype=torch.int64)
    # In the whole array: torch.compile (2.11, 2.13) searches a slice of it from the array's start.
    b = (torch.searchsorted(cu_seqlens_q, token, right=True) - 1).clamp(0, batch - 1)
    start, stop, token = cu_seqlens_q[b].long(), cu_seqlens_q[b + 1].long(), token.long()
    position = lengths[b].long() - (stop - token)
    inside = (start <= token) & (token < stop) & (position >= 0) & (position < limit)
    position = position.clamp(0, limit - 1)
    page = page_table[b, position // PAGE_SIZE].long()
    return torch.where(inside & (page >= 0), page * PAGE_SIZE + position % PAGE_SIZE, -1)


def check_index_cache(a: Arguments, index_cache: Tensor, dim: int | None = None) -> None:
    """Checks the layout of an index cache whose keys have `dim` elements (None: any number)."""
    a.tensor("index_cache", index_cache, "P _", UINT8)
    width = index_cache.shape[1]
    if dim is None:
        is_page = width % PAGE_SIZE == 0 and width > 4 * PAGE_SIZE
    else:
        is_page = width == PAGE_SIZE * (dim + 4)
    expected = f"shape [P, 64 * ({'Di' if dim is None else dim} + 4)]"
    a.require(is_page, "index_cache", expected, list(index_cache.shape))
    stride, offset = index_cache.stride(0), index_cache.storage_offset()
    aligned = stride % 4 == 0 and offset % 4 == 0
    a.require(aligned, "index_cache", "pages at multiples of 4 bytes", f"{stride=}, {offset=}")


def _check_kv_caches(a: Arguments, k_cache: Tensor, v_cache: Tensor) -> None:
    a.tensor("k_cache", k_cache, f"P {PAGE_SIZE} G D", FLOATS, inner=3)
    a.tensor("v_cache", v_cache, f"P {PAGE_SIZE} G D", (k_cache.dtype,), inner=3)


def _check_requests(a: Arguments, page_table: Tensor, cu_seqlens: Tensor, total: int) -> None:
    a.tensor("page_table", page_table, "B _", INT32)
    a.tensor("cu_seqlens", cu_seqlens, "B+1", INT32, contiguous=True)
    a.integer("total", total, 0)


def _check_write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    a = Arguments("write_kv_cache")
    a.tensor("k", k, "T G D", FLOATS, inner=2)
    a.tensor("v", v, "T G D", (k.dtype,), inner=2)
    _check_kv_caches(a, k_cache, v_cache)
    a.require(k_cache.dtype == k.dtype, "k_cache", f"{k.dtype} (that of k)", k_cache.dtype)
    a.tensor("slots", slots, "T", INT64, contiguous=True)


def _check_write_index(k: Tensor, k_scale: Tensor, index_cache: Tensor, slots: Tensor) -> None:
    a = Arguments("write_index_cache")
    a.tensor("k", k, "T D", FP8)
    a.tensor("k_scale", k_scale, "T", FP32, contiguous=True)
    check_index_cache(a, index_cache, a["D"])
    a.tensor("slots", slots, "T", INT64, contiguous=True)


def _check_read_kv(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, total: int
) -> None:
    a = Arguments("read_kv_cache")
    _check_kv_caches(a, k_cache, v_cache)
    _check_requests(a, page_table, cu_seqlens, total)


def _check_read_index(
    index_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, total: int
) -> None:
    a = Arguments("read_index_cache")
    check_index_cache(a, index_cache)
    _check_requests(a, page_table, cu_seqlens, total)


def _fake_read_kv(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    shape = (total, *k_cache.shape[2:])
    return k_cache.new_empty(shape), v_cache.new_empty(shape)


def _fake_read_index(
    index_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, total: int
) -> tuple[Tensor, Tensor]:
    dim = index_cache.shape[1] // PAGE_SIZE - 4
    k = index_cache.new_empty((total, dim), dtype=torch.float8_e4m3fn)
    return k, index_cache.new_empty((total,), dtype=torch.float32)


def _fake_write(*args: Tensor) -> None:
    return None


_table = [TRITON, CPU, REFERENCE]
_write_kv = register(
    "write_kv_cache", room=__name__, check=_check_write_kv, fake=_fake_write, table=_table
)
_write_index = register(
    "write_index_cache", room=__name__, check=_check_write_index, fake=_fake_write, table=_table
)
_read_kv = register(
    "read_kv_cache", room=__name__, check=_check_read_kv, fake=_fake_read_kv, table=_table
)
_read_index = register(
    "read_index_cache", room=__name__, check=_check_read_index, fake=_fake_read_index, table=_table
)
