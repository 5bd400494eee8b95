"""Rows of scores made to break a selection."""

import torch


def hard_rows(width):
    """Ties, plateaus, infinities and NaN, [R, width]."""
    x = torch.randn(width)
    plateau = torch.where(torch.rand(width) < 2 / 3, 0.0, torch.rand(width) * 1e-3)
    special = x.clone()
    special[::7], special[1::7], special[2::7] = torch.inf, -torch.inf, torch.nan
    last_bit = (
        torch.ones(width)
        .view(torch.int32)
        .add(torch.randint(0, 2, (width,)).int())
        .view(torch.float32)
    )
    zeros = torch.where(torch.rand(width) < 0.5, 0.0, -0.0)
    return torch.stack([
        x, torch.zeros(width), plateau, special, last_bit, zeros, torch.sign(x), torch.arange(width).float(),
        -torch.arange(width).float(), torch.full((width,), torch.nan), torch.full((width,), -torch.inf),
    ])  # fmt: skip


def deceptive_rows(width):
    """Rows of which a sample tells little: the best lie close together, where nobody looked, or where everybody did, one of
    them far from all others, with NaN that no bound holds back; [R, width]."""
    x, place = torch.randn(width), torch.arange(width)
    few_nan = torch.where(torch.rand(width) < 0.02, torch.nan, x)
    return torch.stack([
        torch.where(place % 4096 < 64, x + 100, x), torch.where(place < width // 2, x, x - 100),
        torch.where(torch.rand(width) < 0.9, torch.nan, x), torch.where(torch.rand(width) < 0.1, torch.inf, -torch.inf),
        (torch.rand(width) < 0.3).float(), torch.where(place % 128 == 5, x + 100, x),
        torch.where(place == 0, 1e4, x), (6 * x).exp(), few_nan, *(torch.where(seen, few_nan.nan_to_num() + 100, few_nan)
          for seen in (place % 128 < 4, place % 256 < 8, place // 128 % 32 == 0)),
    ])  # fmt: skip
