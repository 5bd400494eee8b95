"""How the programs of a Triton kernel find their rows in packed sequences, without a list of tiles and without the
longest sequence.

With a = cu_seqlens, sequence s owns the tiles of BLOCK rows from a[s] // BLOCK + s + 1 on, at least as many as it has
blocks, so `most_tiles` always suffice. `find_tile` finds a tile's sequence by reductions over cu_seqlens, one load deep;
surplus tiles have no rows. Rows before the first and after the last boundary are two more sequences, without anything
in the other tensor.
"""

import triton
import triton.language as tl

MAX_BOUNDARIES = 1024  # read at once


@triton.jit
def find_tile(cu_a, cu_b, num_seqs, total_a, total_b, tile, BLOCK: tl.constexpr, SEQS: tl.constexpr):  # fmt: skip
    """Tile `tile` of the rows a: its first row, the bounds of its sequence in a, and the bounds in b."""
    above = num_seqs + 1  # the first boundary whose tiles start above this one
    begin_a = 0
    begin_b = 0
    first = 0  # the first tile of the sequence
    for base in range(0, num_seqs + 1, SEQS):
        s = base + tl.arange(0, SEQS)
        inside = s <= num_seqs
        a = tl.minimum(tl.maximum(tl.load(cu_a + s, mask=inside, other=0), 0), total_a)
        b = tl.minimum(tl.maximum(tl.load(cu_b + s, mask=inside, other=0), 0), total_b)
        start = a // BLOCK + s + 1
        above = tl.minimum(above, tl.min(tl.where(inside & (start > tile), s, num_seqs + 1)))
        before = inside & (s < above)
        begin_a = tl.maximum(begin_a, tl.max(tl.where(before, a, 0)))
        begin_b = tl.maximum(begin_b, tl.max(tl.where(before, b, 0)))
        first = tl.maximum(first, tl.max(tl.where(before, start, 0)))
    last = tl.minimum(above, num_seqs)
    end_a = tl.maximum(tl.minimum(tl.load(cu_a + last), total_a), begin_a)
    end_b = tl.maximum(tl.minimum(tl.load(cu_b + last), total_b), begin_b)
    end_a = tl.where(above > num_seqs, total_a, end_a)  # behind the last sequence
    end_b = tl.where((above > num_seqs) | (above == 0), begin_b, end_b)
    return begin_a + (tile - first) * BLOCK, begin_a, end_a, begin_b, end_b


def most_tiles(rows: int, num_seqs: int, block: int) -> int:
    """Tiles that hold all rows, whatever the lengths."""
    return rows // block + num_seqs + 2


def boundary_block(num_seqs: int) -> int:
    """SEQS of `find_tile`."""
    return min(triton.next_power_of_2(num_seqs + 1), MAX_BOUNDARIES)
