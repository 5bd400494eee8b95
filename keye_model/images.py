"""Pictures to patches.

A picture is resized so that both sides are multiples of 28 (2 x 2 patches of 14 make a token) and its tokens are within
limits, scaled to [-1, 1] and cut into patches [3, 14, 14] in raster order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .vision import Grid

PATCH = 14
FACTOR = 2 * PATCH  # pixels of a token along one side
MIN_PIXELS = 4 * FACTOR**2
MAX_PIXELS = 20480 * FACTOR**2
MAX_ASPECT = 200


def smart_resize(height: int, width: int, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:  # fmt: skip
    """The size to resize to: sides rounded to multiples of 28, shrunk or grown together into the limits.

    Raises:
        ValueError: an empty picture, or one side more than 200 times the other.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height} x {width} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{height} x {width} pixels: one side is more than {MAX_ASPECT} times the other")  # fmt: skip
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width)]
    if sides[0] * sides[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width)]  # fmt: skip
    elif sides[0] * sides[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width)]
    return sides[0], sides[1]


def load_image(source: Any) -> Image.Image:
    """An RGB picture from a PIL image, a path, or an array or tensor [H, W, 3] or [3, H, W] of uint8.

    Raises:
        ValueError: the file is missing, truncated or no picture, or the array has another shape or dtype.
    """
    if isinstance(source, (str, Path)):
        try:
            with Image.open(source) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:  # what PIL's readers raise
            raise ValueError(f"{source}: not a readable picture ({error})") from error
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source).convert("RGB")
    if isinstance(source, (numpy.ndarray, Tensor)):
        array = numpy.asarray(source)
        if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
            array = array.transpose(1, 2, 0)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != numpy.uint8:
            raise ValueError(f"expected an array [H, W, 3] of uint8, got {list(array.shape)} of {array.dtype}")  # fmt: skip
        if array.size == 0:
            raise ValueError(f"a picture of {array.shape[0]} x {array.shape[1]} pixels")
        return Image.fromarray(numpy.ascontiguousarray(array))
    raise ValueError(f"expected a PIL image, a path or an array, got {type(source).__name__}")


def image_patches(source: Any, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> tuple[Tensor, Grid]:  # fmt: skip
    """Patches [h * w, 3, 14, 14] float32 of a picture, and its grid (1, h, w)."""
    image = load_image(source)
    height, width = smart_resize(image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels)  # fmt: skip
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(resized)).permute(2, 0, 1)
    return to_patches(pixels.float()), (1, height // PATCH, width // PATCH)


def to_patches(pixels: Tensor) -> Tensor:
    """[3, H, W] of 0..255 to [H / 14 * W / 14, 3, 14, 14] of -1..1, in raster order."""
    pixels = (pixels / 255 - 0.5) / 0.5
    rows = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, h, w, 14, 14]
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1)
