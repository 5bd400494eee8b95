"""Images: reading, the published resize rule, and the patches the ViT takes.

An image becomes h x w patches of 14 x 14 pixels in raster order; 2 x 2 patches make one visual token, so sides are
multiples of `factor` = 28. Pixels stay uint8 until `normalize`, a quarter of the memory: a long video is 0.7 million patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ImageSource = Image.Image | np.ndarray | Tensor | str | Path

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ImageBudget:
    """Visual tokens of one image, 28 x 28 pixels each: 3,136 to 16,056,320 pixels."""

    min_tokens: int = 4
    max_tokens: int = 20_480

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"{self}: expected 1 <= min_tokens <= max_tokens")


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size an image is resized to: sides rounded to multiples of `factor`, the area brought into bounds.

    Above `max_pixels` both sides shrink by sqrt(height * width / max_pixels) and round down, below `min_pixels` they grow
    by the inverse and round up. The aspect ratio holds up to the rounding. Where `min_pixels` is close to `max_pixels` rounding
    may pass the other bound, and no side gets shorter than `factor`.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: a side below 1, or an aspect ratio above 200.

    Source: keye-vl-utils 1.5.2, `smart_resize`; Python's round, half to even.
    """
    _check_size(height, width)
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def load_image(source: ImageSource) -> Image.Image:
    """Reads one picture as RGB, upright by its EXIF orientation.

    Args:
        source: a path, a PIL image of any mode, an array [H, W, 3] uint8 or a tensor [3, H, W] uint8. 16-bit grey is
            scaled to 8 bits; an alpha channel is dropped.

    Raises:
        ValueError: what cannot be read, with the path and the reason: a missing, empty, truncated or foreign file, a
            decompression bomb, another shape or dtype.
    """
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.dim() != 3 or source.shape[0] != 3:
            raise ValueError(f"expected a tensor [3, H, W] uint8, got {_form(source)}")
        source = source.permute(1, 2, 0).cpu().numpy()
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"expected an array [H, W, 3] uint8, got {_form(source)}")
        if source.size == 0:
            raise ValueError(f"an empty array: {_form(source)}")
        return Image.fromarray(np.ascontiguousarray(source))
    if not isinstance(source, (Image.Image, str, Path)):
        raise ValueError(f"expected a path, PIL image, array or tensor, got {type(source)}")
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise ValueError(f"{source}: no such file")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with Image.open(source) as image:
            return _to_rgb(image)
    except (
        Exception
    ) as error:  # PIL's decoders raise a dozen types, whatever a broken file makes them trip over
        name = "PIL image" if isinstance(source, Image.Image) else source
        raise ValueError(f"{name}: not a usable image: {error}") from error


def resize_image(image: Image.Image, budget: ImageBudget, *, factor: int = 28) -> Tensor:
    """Resizes an RGB image to its `smart_resize` size, bicubic: [3, height, width] uint8."""
    height, width = smart_resize(
        image.height,
        image.width,
        factor=factor,
        min_pixels=budget.min_tokens * factor**2,
        max_pixels=budget.max_tokens * factor**2,
    )
    return to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an RGB image: [3, H, W] uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def patchify(frames: Tensor, patch_size: int = 14) -> Tensor:
    """Cuts images into patches in raster order (image, row, column).

    Args:
        frames: [F, 3, h * patch_size, w * patch_size].

    Returns:
        [F * h * w, 3, patch_size, patch_size], the same dtype.
    """
    num_frames, channels, height, width = frames.shape
    h, w = height // patch_size, width // patch_size
    cut = frames.reshape(num_frames, channels, h, patch_size, w, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, patch_size, patch_size)


def normalize(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std per channel: [N, 3, p, p] uint8 to float32."""
    m, s = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return patches.float().div_(255).sub_(m).div_(s)


def _to_rgb(image: Image.Image) -> Image.Image:
    _check_size(image.height, image.width)  # from the header: an absurd size is refused undecoded
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range of values; convert it to 8 bits")
    if image.mode.startswith("I;16"):  # PIL's convert clips at 255 and would show white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"expected a height and a width of at least 1, got {height} x {width}")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} x {width}"
        )


def _form(source: Tensor | np.ndarray) -> str:
    return f"{list(source.shape)} {source.dtype}"
