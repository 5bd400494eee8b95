"""Videos to patches: frames are sampled evenly, resized together, and keep the time at which they are shown.

Every frame becomes a grid of its own; how many tokens it has follows from how many frames share the video's budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from .images import FACTOR, PATCH, load_image, smart_resize, to_patches
from .vision import Grid

MIN_FRAMES = 2
MIN_TOKENS, MAX_TOKENS = 64, 256  # of a frame
TOTAL_TOKENS = 180 * 1024  # of all videos of a request
# Seconds up to which a video gets a part of the budget (arXiv 2606.10651; the published server rounds differently).
ADAPTIVE = ((256, 0.125), (512, 0.25), (1024, 0.5), (2048, 1.0))


@dataclass(frozen=True)
class VideoOptions:
    """How videos are sampled.

    Attributes:
        fps: frames a second to look at, at most those of the video.
        total_tokens: budget of all videos of a request, in equal parts.
        adaptive: a short single video gets a part of the budget only.
    """

    fps: float = 2.0
    total_tokens: int = TOTAL_TOKENS
    adaptive: bool = False


@dataclass(frozen=True)
class Video:
    """Attributes: patches [n * h * w, 3, 14, 14] float32; grid (1, h, w) of every frame; seconds of each of the n frames."""

    patches: Tensor
    grid: Grid
    seconds: list[float]


@dataclass(frozen=True)
class Frames:
    """A video given as its frames, `fps` of them a second."""

    frames: list[Any]
    fps: float = 2.0


def read_video(source: Any, options: VideoOptions, budget: int) -> Video:
    """Samples a video file, a list of pictures or `Frames` within a budget of tokens.

    Raises:
        ValueError: no readable video, no frame in it, or frames too narrow.
    """
    if isinstance(source, (list, tuple)):
        source = Frames(list(source))
    if isinstance(source, Frames):
        if not source.frames or not (0 < source.fps < math.inf):
            raise ValueError(f"{len(source.frames)} frames at {source.fps} frames a second")
        every = [numpy.asarray(load_image(frame)) for frame in source.frames]
        indices = sample(len(every), source.fps, source.fps, budget)
        return assemble(iter([every[i] for i in indices]), indices, source.fps, options, budget)
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise ValueError(f"{source}: holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            count = count_frames(str(source))
            if count == 0 or not (0 < fps < math.inf):
                raise ValueError(f"{source}: {count} frames at {fps} frames a second")
            indices = sample(count, fps, options.fps, budget)
            frames = decode(container.decode(stream), indices)
            return assemble(frames, indices, fps, options, budget)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{source}: not a readable video ({error})") from error


def count_frames(path: str) -> int:
    """Frames of the first video stream, by its packets: a header may be wrong or silent about them."""
    with av.open(path) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def sample(count: int, source_fps: float, fps: float, budget: int) -> list[int]:
    """Indices of the frames to look at, evenly spread from the first to the last."""
    wanted = int(count / source_fps * min(fps, source_fps))
    number = min(max(wanted, MIN_FRAMES), max(budget // MIN_TOKENS, MIN_FRAMES), count)
    return torch.linspace(0, count - 1, number, dtype=torch.float64).round().long().tolist()


def decode(frames: Iterator[av.VideoFrame], indices: list[int]) -> Iterator[numpy.ndarray]:
    """The frames at ascending indices, one at a time; the last one again where the file ends early."""
    wanted = iter(indices)
    target, last = next(wanted, None), None
    for i, frame in enumerate(frames):
        if target is None:
            return
        if i < target:
            continue
        last = frame.to_ndarray(format="rgb24")
        while target is not None and target <= i:
            yield last
            target = next(wanted, None)
    if last is None:
        raise ValueError("no frame could be decoded")
    while target is not None:
        yield last
        target = next(wanted, None)


def assemble(frames: Iterator[numpy.ndarray], indices: list[int], fps: float, options: VideoOptions, budget: int) -> Video:  # fmt: skip
    """Resizes each frame as it comes: no more than the sampled ones, in their final size, are held."""
    seconds = [i / fps for i in indices]
    if options.adaptive:
        duration = (indices[-1] + 1) / fps
        budget = int(budget * next((part for limit, part in ADAPTIVE if duration <= limit), 1.0))
    tokens = min(max(budget // len(indices), MIN_TOKENS), MAX_TOKENS)
    patches, size = [], None
    for frame in frames:
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
        if size is None:
            size = smart_resize(*pixels.shape[2:], min_pixels=MIN_TOKENS * FACTOR**2, max_pixels=tokens * FACTOR**2)  # fmt: skip
        resized = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        patches.append(to_patches(resized[0].round().clamp(0, 255)))
    assert size is not None
    return Video(torch.cat(patches), (1, size[0] // PATCH, size[1] // PATCH), seconds)


def budgets(number: int, options: VideoOptions) -> list[int]:
    """Tokens of each of a request's videos."""
    return [options.total_tokens // max(number, 1)] * number
