"""The union of the keys that 16 consecutive query tokens select: an ascending list with a 16-bit token mask per key.

Tokens are cut into tiles of BLOCK_T = 16 of one sequence (`map_tiles`; a sequence of n tokens has at least ceil(n / 16)
tiles, the spare ones are empty). `union_chunks` then builds the lists of as many tiles at a time as the workspace
holds. One program per tile, persistent, with a private bitmap of one bit a (token, key) that stays in L2:

1. atomic_or of every id into its token's bitmap. Ids ascend, so a warp's 32 ids fall into few sectors.
2. OR of the 16 bitmaps, popcount prefix over the words, and the present keys go to the list, bit by bit.
3. For every listed key its bit of the 16 bitmaps is gathered into the mask: 32 keys in order lie in few sectors.
4. The bitmaps are cleared for the program's next tile.

No sort, no step in which the order of the atomics shows. Measured for one 131072 sequence, K = 2048, on an H200: 4.5 ms,
of which the 268M scattered writes of step 1 take 3.3. The CUDA version (csrc/sparse_attention/sm90_union.cu) keeps the
bitmaps in shared memory.
"""

import torch
import triton
import triton.language as tl

from ..triton_math import popcount
from ..triton_sequences import boundary_block, find_tile, most_tiles

BLOCK_T = 16
UNION_CAPACITY = 12288  # keys a list holds; a tile that needs more is cheaper to gather by token
LIST_BYTES = 180_000_000  # lists of one chunk
BITMAP_BYTES = 70_000_000  # of all programs
PROGRAMS_PER_SM = 1
BUILD_WARPS = 16
IDS = 512  # ids a row and step: 16 registers a thread with 16 warps
WORDS = 512  # bitmap words a step of the list: 16384 keys
LIST_BLOCK = 128  # a list is padded to whole blocks of it
RANKS = 1024  # list entries a step of the mask gather
TILE_FIELDS = tl.constexpr(5)  # a row of map_tiles


@triton.jit
def load_tile(tiles, tile):
    """First token, tokens, first key, keys (of the tile's sequence)."""
    row = tiles + tl.cast(tile, tl.int64) * TILE_FIELDS
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def map_tiles_kernel(cu_rows, cu_others, tiles, num_sequences, num_rows, num_others, BLOCK: tl.constexpr,
                     SEQS: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    first, begin, end, first_other, end_other = find_tile(cu_rows, cu_others, num_sequences, num_rows, num_others, tile,
                                                          BLOCK, SEQS)  # fmt: skip
    row = tiles + tile * TILE_FIELDS
    tl.store(row, first)
    tl.store(row + 1, tl.minimum(tl.maximum(end - first, 0), BLOCK))
    tl.store(row + 2, first_other)
    tl.store(row + 3, end_other - first_other)
    tl.store(row + 4, first - begin)


@triton.jit(
    do_not_specialize=["index_stride"]
)  # one layout, 4 bytes a lane, for the ids and their atomics
def build_union_kernel(indices, tiles, keys, masks, counts, bitmaps, num_tiles, topk, index_stride, num_words,
                       capacity, BLOCK_T: tl.constexpr, IDS: tl.constexpr, WORDS: tl.constexpr,
                       RANKS: tl.constexpr, LIST_BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    bitmap = bitmaps + program.to(tl.int64) * num_words * BLOCK_T
    lane = tl.arange(
        0, BLOCK_T * IDS
    )  # flat: a second dimension would let the compiler put tokens before ids
    t = lane // IDS
    for tile in range(program, num_tiles, tl.num_programs(0)):
        first, tokens, _, length = load_tile(tiles, tile)
        list_start = tl.cast(tile, tl.int64) * capacity
        row = indices + (first + t).to(tl.int64) * index_stride
        end = tl.zeros([BLOCK_T * IDS], tl.int32)
        for start in range(0, topk, IDS):
            column = start + lane % IDS
            key = tl.load(row + column, mask=(t < tokens) & (column < topk), other=-1)
            valid = (key >= 0) & (key < length)
            tl.atomic_or(bitmap + t * num_words + (key >> 5), 1 << (key & 31), mask=valid, sem="relaxed")  # fmt: skip
            end = tl.maximum(end, tl.where(valid, key + 1, 0))
        last_key = tl.max(end, 0) - 1
        used_words = (last_key + 32) // 32
        tl.debug_barrier()

        total = 0
        for start in range(0, used_words, WORDS):
            word = start + tl.arange(0, WORDS)
            present = tl.zeros([WORDS], tl.int32)
            for i in tl.static_range(BLOCK_T):
                present |= tl.load(bitmap + i * num_words + word, mask=word < used_words, other=0)
            count = popcount(present)
            rank = total + tl.cumsum(count, 0) - count
            for bit in range(32):
                listed = (present >> bit) & 1
                tl.store(keys + list_start + rank, word * 32 + bit, mask=(listed == 1) & (rank < capacity))  # fmt: skip
                rank += listed
            total += tl.sum(count, 0)
        tl.store(counts + tile, total)
        pad_at = total + tl.arange(0, LIST_BLOCK)  # the last key again, selected by nobody
        pad = (pad_at < tl.cdiv(total, LIST_BLOCK) * LIST_BLOCK) & (pad_at < capacity)
        tl.store(keys + list_start + pad_at, tl.zeros([LIST_BLOCK], tl.int32) + last_key, mask=pad)
        tl.store(masks + list_start + pad_at, tl.zeros([LIST_BLOCK], tl.int32), mask=pad)
        tl.debug_barrier()

        for start in range(0, tl.where(total <= capacity, total, 0), RANKS):
            entry = start + tl.arange(0, RANKS)
            key = tl.load(keys + list_start + entry, mask=entry < total, other=0)
            mask = tl.zeros([RANKS], tl.int32)
            for i in tl.static_range(BLOCK_T):
                bits = tl.load(bitmap + i * num_words + (key >> 5), mask=entry < total, other=0)
                mask |= ((bits >> (key & 31)) & 1) << i
            tl.store(masks + list_start + entry, mask, mask=entry < total)
        tl.debug_barrier()

        for start in range(0, used_words, WORDS):
            word = start + tl.arange(0, WORDS)
            for i in tl.static_range(BLOCK_T):
                tl.store(bitmap + i * num_words + word, tl.zeros([WORDS], tl.int32), mask=word < used_words)  # fmt: skip
        tl.debug_barrier()


def map_tiles(cu_rows, cu_others, num_rows, num_others, block=BLOCK_T):
    """Cuts the sequences of `cu_rows` into tiles of `block` rows.

    Returns int32 [tiles, 5]: first row, rows (0 in a spare tile), of the same sequence in
    `cu_others` the first row and their number, the first row's position in its sequence. Rows of no sequence are in
    tiles whose sequence has none of the others.
    """
    num_sequences = cu_rows.shape[0] - 1
    shape = (most_tiles(num_rows, num_sequences, block), TILE_FIELDS.value)
    tiles = torch.empty(shape, dtype=torch.int32, device=cu_rows.device)
    map_tiles_kernel[shape[:1]](
        cu_rows, cu_others, tiles, num_sequences, num_rows, num_others, BLOCK=block, SEQS=boundary_block(num_sequences),
        num_warps=1,
    )  # fmt: skip
    return tiles


def sm_count(device):
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def list_capacity(topk, num_keys):
    """Entries a list has: what the worst union needs, at most UNION_CAPACITY; whole blocks."""
    needed = triton.cdiv(min(BLOCK_T * topk, num_keys), LIST_BLOCK) * LIST_BLOCK
    return max(min(needed, UNION_CAPACITY), LIST_BLOCK)


def can_overflow(topk, num_keys):
    return min(BLOCK_T * topk, num_keys) > UNION_CAPACITY


def build_union(indices, tiles, keys, masks, counts, num_keys, list_block):
    num_tiles = tiles.shape[0]
    num_words = max(triton.cdiv(num_keys, 32), 1)
    most_programs = max(BITMAP_BYTES // (BLOCK_T * num_words * 4), 1)
    programs = min(PROGRAMS_PER_SM * sm_count(indices.device), most_programs, num_tiles)
    if programs == 0:
        return
    shape = (programs, BLOCK_T, num_words)
    bitmaps = torch.zeros(shape, dtype=torch.int32, device=indices.device)
    build_union_kernel[(programs,)](
        indices, tiles, keys, masks, counts, bitmaps, num_tiles, indices.shape[1], indices.stride(0),
        num_words, keys.shape[1], BLOCK_T=BLOCK_T, IDS=IDS, WORDS=WORDS, RANKS=RANKS,
        LIST_BLOCK=list_block, num_warps=BUILD_WARPS,
    )  # fmt: skip


def union_chunks(indices, cu_seqlens_q, cu_seqlens_k, num_keys):
    """Yields (tiles, keys, masks, counts) for chunks of consecutive tiles; the next chunk overwrites the lists.

    tiles [C, 5] as in `map_tiles`; keys, masks [C, capacity] and counts [C] as the op build_union leaves them.
    """
    num_tokens, topk = indices.shape
    tiles = map_tiles(cu_seqlens_q, cu_seqlens_k, num_tokens, num_keys)
    capacity = list_capacity(topk, num_keys)
    chunk = max(LIST_BYTES // (capacity * 8), 1)
    chunk = triton.cdiv(tiles.shape[0], triton.cdiv(tiles.shape[0], chunk))  # equal parts
    keys, masks = torch.empty((2, chunk, capacity), dtype=torch.int32, device=indices.device)
    counts = torch.empty(chunk, dtype=torch.int32, device=indices.device)
    for part in tiles.split(chunk):
        n = part.shape[0]
        torch.ops.dsa_kernels.build_union(
            indices, part, keys[:n], masks[:n], counts[:n], num_keys, LIST_BLOCK
        )
        yield part, keys[:n], masks[:n], counts[:n]
