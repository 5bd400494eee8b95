"""Videos: frame sampling, the token budget, decoding.

A video is a row of frames with their times in seconds. `plan_frames` says which frames are taken and to which size they all
are resized; frames are resized as they are decoded, so no more is held than the sampled ones at their final size, however
long the film. A file is read twice: once demuxed to count frames, which headers state wrongly or not at all, once decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .images import ImageSource, load_image, smart_resize, to_tensor

ADAPTIVE_SHARES = (
    (256.0, 0.125),
    (512.0, 0.25),
    (1024.0, 0.5),
)  # up to seconds, part of the tokens
TRUNCATED_SECONDS = 0.5  # missing at the end: one frame at the default rate


@dataclass(frozen=True)
class VideoBudget:
    """How densely a video is sampled, in frames a second and visual tokens (28 x 28 pixels each).

    `total_tokens` is shared equally by the videos of a request. `adaptive` gives a single video of up to 256, 512 or
    1024 seconds an eighth, a quarter or half of it (arXiv 2606.10651).
    """

    fps: float = 2.0
    min_frames: int = 2
    min_tokens: int = 64  # a frame
    max_tokens: int = 256  # a frame
    total_tokens: int = 184_320
    adaptive: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.fps)
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"{self}: expected 1 <= min_tokens <= max_tokens")

    def tokens_for(self, seconds: float | None, num_videos: int) -> int:
        """The tokens one of `num_videos` videos may take; `seconds` is its length where it is known."""
        total = self.total_tokens // num_videos
        if self.adaptive and num_videos == 1 and seconds is not None:
            total = next(
                (int(p * total) for limit, p in ADAPTIVE_SHARES if seconds <= limit), total
            )
        return total


@dataclass(frozen=True)
class FrameList:
    """A video given as pictures: `fps` or one of `timestamps` (seconds, ascending) a picture, or neither.

    Frames are sampled from it as from a file where `fps` is known; otherwise all are taken, as far as the budget allows.
    """

    images: Sequence[ImageSource] | np.ndarray | Tensor
    fps: float | None = None
    timestamps: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if len(self.images) == 0:
            raise ValueError("a video of 0 frames")
        if self.fps is not None:
            _check_rate(self.fps)
        times = self.timestamps
        if times is not None and not (
            len(times) == len(self.images)
            and all(math.isfinite(t) and t >= 0 for t in times)
            and all(a <= b for a, b in pairwise(times))
        ):
            raise ValueError(
                f"timestamps: expected {len(self.images)} ascending finite seconds, got {times}"
            )


VideoSource = str | Path | FrameList | Sequence[ImageSource] | np.ndarray | Tensor


@dataclass(frozen=True)
class SampledVideo:
    """What the network sees of a video."""

    frames: Tensor  # [n, 3, height, width] uint8, resized
    timestamps: list[float] | None  # [n] seconds, None where unknown


Plan = Callable[..., tuple[list[int], tuple[int, int]]]  # plan_frames with the budget filled in


def plan_frames(
    num_frames: int,
    fps: float | None,
    height: int,
    width: int,
    budget: VideoBudget,
    *,
    num_videos: int = 1,
    factor: int = 28,
) -> tuple[list[int], tuple[int, int]]:
    """Which frames of a video are taken, and their size.

    n = num_frames / fps * min(budget.fps, fps), at least min_frames, at most what fits at min_tokens a frame. The frames
    are linspace(0, num_frames - 1, n), rounded; each gets total / n tokens, within [min_tokens, max_tokens]. n times the
    tokens of a frame never passes the total.

    Args:
        num_frames, fps, height, width: of the source; fps None where it has no clock: all frames are wanted.
        factor: side of a visual token in pixels.

    Returns:
        n ascending indices, and (height, width) in pixels.

    Raises:
        ValueError: a size `smart_resize` refuses, or no room for one frame.

    Source: keye-vl-utils 1.5.2 and SGLang's Keye-VL-2.0 processor. Theirs may pass the total by one token a frame.
    """
    seconds = None if fps is None else num_frames / fps
    total = budget.tokens_for(seconds, num_videos)
    wanted = num_frames if fps is None else int(num_frames / fps * min(budget.fps, fps))
    n = min(max(wanted, budget.min_frames), num_frames, total // budget.min_tokens)
    tokens = min(budget.max_tokens, total // max(n, 1))
    size = smart_resize(
        height,
        width,
        factor=factor,
        min_pixels=budget.min_tokens * factor**2,
        max_pixels=tokens * factor**2,
    )
    # Small and very long frames are rounded up past their tokens: fewer of them are taken.
    n = min(n, total * factor**2 // (size[0] * size[1]))
    if n < 1:
        raise ValueError(f"{total} tokens hold no frame of {size[0]} x {size[1]} pixels")
    # float32 like the published code, so that indices agree where a half is rounded
    return torch.linspace(0, num_frames - 1, n).round().long().tolist(), size


def sample_video(
    source: VideoSource, budget: VideoBudget, *, num_videos: int = 1, factor: int = 28
) -> SampledVideo:
    """Reads the frames `plan_frames` asks for, resized by bilinear interpolation with antialiasing.

    Args:
        source: a path, a `FrameList`, or pictures without a clock: a sequence, an array [N, H, W, 3] uint8 or a tensor
            [N, 3, H, W] uint8. All frames get the size planned for the first.
        num_videos: videos of the request, which share the budget.

    Raises:
        ValueError: a file that is missing, foreign, truncated, or has no video stream, no frame, no frame rate or no
            decodable frame; a picture that cannot be read. With the path or the number of the frame, and the reason.

    Timestamps of files are index / average rate: frames of varying length are numbered, not timed.
    """
    plan = partial(plan_frames, budget=budget, num_videos=num_videos, factor=factor)
    if isinstance(source, (str, Path)):
        try:
            return _sample_file(Path(source), plan)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if not isinstance(source, FrameList):
        if not isinstance(source, (Sequence, np.ndarray, Tensor)):
            raise ValueError(
                f"expected a path, FrameList or sequence of pictures, got {type(source)}"
            )
        source = FrameList(source)
    return _sample_list(source, plan)


def _sample_list(video: FrameList, plan: Plan) -> SampledVideo:
    first = _frame_of(video, 0)
    indices, size = plan(len(video.images), video.fps, *first.shape[1:])
    frames = torch.empty(len(indices), 3, *size, dtype=torch.uint8)
    for place, index in zip(frames, indices):
        place.copy_(_resize(_frame_of(video, index), size))
    times = None
    if video.timestamps is not None:
        times = [float(video.timestamps[index]) for index in indices]
    elif video.fps is not None:
        times = _times(indices, video.fps)
    return SampledVideo(frames, times)


def _frame_of(video: FrameList, index: int) -> Tensor:
    try:
        return to_tensor(load_image(video.images[index]))
    except ValueError as error:
        raise ValueError(f"frame {index}: {error}") from error


def _sample_file(path: Path, plan: Plan) -> SampledVideo:
    num_frames, fps = _count_frames(path)
    for _ in range(2):
        frames, indices, taken, decoded = torch.empty(0), [0], 0, 0
        for frame in _decode(path):
            if decoded == 0:
                indices, size = plan(num_frames, fps, *_pixels(frame).shape[1:])
                frames = torch.empty(len(indices), 3, *size, dtype=torch.uint8)
            if decoded == indices[taken]:
                frames[taken] = _resize(_pixels(frame), size)
                taken += 1
            decoded += 1
            if taken == len(indices):
                return SampledVideo(frames, _times(indices, fps))
        if decoded == 0:
            break
        # Some packets show nothing, as where a cut left no key frame at the start: sample what does.
        num_frames = decoded
    raise ValueError("no frame can be decoded")


def _count_frames(path: Path) -> tuple[int, float]:
    """The frames the file holds, and its average rate in frames a second."""
    num_frames, end = 0, 0.0
    with _open(path) as (container, stream):
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            num_frames += (
                packet.stream_index == stream.index and packet.size > 0 and not packet.is_discard
            )
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        promised = ((container.duration or 0) + (container.start_time or 0)) / av.time_base
    if num_frames == 0:
        raise ValueError("a video of 0 frames")
    if end < promised - TRUNCATED_SECONDS:
        raise ValueError(f"truncated: {promised:.1f} s long, data for {end:.1f} s")
    _check_rate(rate)
    return num_frames, rate


def _decode(path: Path) -> Iterator[av.VideoFrame]:
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; whatever FFmpeg finds wrong is a ValueError."""
    if not path.is_file():
        raise ValueError("no such file")
    try:
        # "file:" keeps FFmpeg from reading a protocol into a name such as "a:b.mp4".
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise ValueError("no video stream")
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video: {error.strerror}") from error


def _pixels(frame: av.VideoFrame) -> Tensor:
    """[3, H, W] uint8 RGB, upright: FFmpeg's rotation is counterclockwise, in degrees."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _resize(frame: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(frame[None], size, mode="bilinear", antialias=True)[0]


def _times(indices: list[int], fps: float) -> list[float]:
    # float32 like the published code: the prompt shows one decimal, and 0.15 rounds to 0.2 so
    return (torch.tensor(indices, dtype=torch.float32) / fps).tolist()


def _check_rate(fps: float) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a positive number of frames a second, got {fps}")
