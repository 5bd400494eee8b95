"""The paged cache: keys, values and index keys of every layer, 64 tokens a page, and who owns which page.

One page number stands for the same page in all layers. Pages are counted: samples of one prompt share its full pages, the
last, partly filled one is copied for each.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from dsa_kernels.paged_cache import PAGE_SIZE

from .attention import LayerCache
from .config import KeyeConfig

Pages = array  # of type "i": the page numbers of a sequence, which a tensor can read where they lie


class OutOfPages(Exception):
    """There are fewer free pages than asked for; nothing was taken."""


class PagedCache:
    """Pages of all layers and the allocator over them.

    Args:
        num_pages: of 64 tokens; `bytes_per_token` tells what a token takes.
    """

    def __init__(
        self, config: KeyeConfig, num_pages: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        layers = config.num_hidden_layers
        shape = (layers, num_pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.index = None
        if config.indexer is not None:
            page = PAGE_SIZE * (config.indexer.indexer_head_dim + 4)
            self.index = torch.zeros(layers, num_pages, page, dtype=torch.uint8, device=device)
        self.layers = [LayerCache(self.k[i], self.v[i], None if self.index is None else self.index[i]) for i in range(layers)]  # fmt: skip
        self.num_pages = num_pages
        self.free = list(reversed(range(num_pages)))
        self.owners = [0] * num_pages

    def allocate(self, number: int) -> Pages:
        """Takes free pages, with one owner each."""
        if number > len(self.free):
            raise OutOfPages(f"{number} pages asked for, {len(self.free)} of {self.num_pages} free")
        pages = Pages("i", (self.free.pop() for _ in range(number)))
        for page in pages:
            self.owners[page] = 1
        return pages

    def share(self, pages: Pages) -> Pages:
        """One more owner for each of the pages."""
        for page in pages:
            self.owners[page] += 1
        return pages[:]

    def release(self, pages: Pages) -> None:
        """One owner less; a page without an owner is free."""
        for page in pages:
            self.owners[page] -= 1
            if self.owners[page] == 0:
                self.free.append(page)

    def fork(self, pages: Pages, length: int) -> Pages:
        """The pages of another sequence that begins with the same `length` tokens: full pages shared, a last one copied."""
        full, rest = divmod(length, PAGE_SIZE)
        copied = self.allocate(1 if rest else 0)
        for new in copied:
            for part in self.parts():
                part[:, new].copy_(part[:, pages[full]])
        return self.share(pages[:full]) + copied

    def parts(self) -> list[Tensor]:
        """Keys, values and index keys, [layers, pages, ...] each."""
        return [part for part in (self.k, self.v, self.index) if part is not None]


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def bytes_per_token(config: KeyeConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Cache bytes of a token over all layers."""
    kv = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    index = 0 if config.indexer is None else config.indexer.indexer_head_dim + 4
    return config.num_hidden_layers * (kv + index)
