"""Videos: decoding against the frames that were written, lists of frames, broken files."""

import math

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_model.tiny import demo_image, demo_video
from keye_model.video import FrameList, VideoBudget, sample_video

BUDGET = VideoBudget()


def write_video(path, levels, *, fps=10, size=(112, 112), codec="ffv1", **options):
    """A lossless video: frame i is grey of levels[i]."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for level in levels:
            pixels = np.full((*size, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_decoded_frames_are_the_written_ones(tmp_path):
    levels = np.arange(31) * 8
    path = write_video(tmp_path / "a.mkv", levels, fps=5)
    video = sample_video(path, BUDGET)
    indices = [0, 3, 5, 8, 11, 14, 16, 19, 22, 25, 27, 30]
    assert video.frames.shape == (12, 3, 224, 224) and video.frames.dtype == torch.uint8
    for frame, index in zip(video.frames, indices):
        assert (frame == levels[index]).all()
    assert video.timestamps == pytest.approx([i / 5 for i in indices])


def test_frames_are_resized_like_torch_does(tmp_path):
    path = demo_video(tmp_path / "v.mp4", num_frames=9, fps=2, height=90, width=160)
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = sample_video(path, BUDGET)
    frames = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        frames, video.frames.shape[2:], mode="bilinear", antialias=True
    )
    assert torch.equal(video.frames, expected)
    listed = sample_video(FrameList(decoded, fps=2), BUDGET)
    assert torch.equal(listed.frames, expected) and listed.timestamps == video.timestamps


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.avi", "mpeg4"), ("a.ts", "libx264")],
)
def test_containers(tmp_path, name, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    levels = range(20, 240, 8)
    path = write_video(tmp_path / name, levels, fps=14, codec=codec)  # 28 frames, 2 s
    video = sample_video(str(path), BUDGET)
    assert video.timestamps == pytest.approx([i / 14 for i in (0, 9, 18, 27)])
    means = video.frames.float().mean((1, 2, 3)).tolist()
    nearest = [min(range(28), key=lambda i: abs(levels[i] - mean)) for mean in means]
    assert nearest == [0, 9, 18, 27]


def test_a_turned_telephone_video_stands_upright(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :64] = 255  # the left half is white
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    # ISO 14496-12: the matrix of the track header; (0, 1, -1, 0) is a quarter turn clockwise.
    one = 0x10000
    straight, turned = (
        b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 0x40000000))
        for a, b, c, d in ((one, 0, 0, one), (0, one, -one, 0))
    )
    content = path.read_bytes()
    header = content.index(b"tkhd")
    matrix = content.index(straight, header)
    path.write_bytes(content[:matrix] + turned + content[matrix + len(turned) :])
    frames = sample_video(path, BUDGET).frames.float()
    height, width = frames.shape[2:]
    assert height > width
    top, bottom = frames[:, :, : height // 2 - 28], frames[:, :, height // 2 + 28 :]
    assert top.mean() > 240 and bottom.mean() < 15


def test_frame_lists(tmp_path):
    images = [np.full((100, 100, 3), i, np.uint8) for i in range(24)]
    everything = sample_video(images, BUDGET)
    assert everything.timestamps is None and len(everything.frames) == 24
    assert torch.equal(sample_video(np.stack(images), BUDGET).frames, everything.frames)
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert torch.equal(sample_video(tensor, BUDGET).frames, everything.frames)

    timed = sample_video(FrameList(images, fps=8), BUDGET)  # 3 s: 6 frames, a step of 4.6
    assert timed.frames[:, 0, 0, 0].tolist() == [0, 5, 9, 14, 18, 23]
    assert timed.timestamps == pytest.approx([0, 0.625, 1.125, 1.75, 2.25, 2.875])

    seconds = [i**2 / 4 for i in range(24)]
    stamped = sample_video(FrameList(images, timestamps=seconds), BUDGET)
    assert stamped.timestamps == seconds

    mixed = [demo_image(tmp_path / "a.png"), Image.new("RGB", (50, 80)), images[0]]
    assert sample_video(mixed, BUDGET).frames.shape == (3, 3, 252, 308)  # the size of the first


@pytest.mark.parametrize(
    "times", [[0.0], [0.0, math.nan], [0.0, math.inf], [1.0, 0.5], [-1.0, 0.0]]
)
def test_absurd_timestamps(times):
    with pytest.raises(ValueError, match="timestamps: expected 2 ascending"):
        FrameList([Image.new("RGB", (8, 8))] * 2, timestamps=times)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ([], "0 frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "0 frames"),
        (None, "NoneType"),
        (Image.new("RGB", (8, 8)), "expected a path"),
        (["nowhere.png"], "frame 0: nowhere.png: no such file"),
        ([Image.new("RGB", (8, 8)), None], "frame 1: expected a path"),
        ([Image.new("RGB", (1, 201))] * 2, "frame 0: .*aspect ratio"),
        ("nowhere.mp4", "nowhere.mp4: no such file"),
    ],
)
def test_absurd_sources(source, reason):
    with pytest.raises(ValueError, match=reason):
        sample_video(source, BUDGET)


def test_an_absurd_frame_size(tmp_path):
    path = write_video(tmp_path / "a.mkv", range(4), size=(2, 402))
    with pytest.raises(ValueError, match=r"a\.mkv: .*aspect ratio of at most 200, got 2 x 402"):
        sample_video(path, BUDGET)


@pytest.mark.parametrize("content", [b"", b"no video", bytes(5000)], ids=["empty", "text", "zeros"])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mp4: not a readable video"):
        sample_video(path, BUDGET)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_truncated_files(tmp_path, name):
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = write_video(tmp_path / name, range(60), fps=10, codec="mpeg4", **options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name}: truncated: 6.0 s long, data for \d\.\d s"):
        sample_video(path, BUDGET)


def test_an_index_at_the_end_that_was_cut_off(tmp_path):
    path = demo_video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.mp4: not a readable video"):
        sample_video(path, BUDGET)


def write_sound(path, picture=None):
    """A second of silence, with or without a cover picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        cover = None
        if picture is not None:
            cover = container.add_stream("png", rate=1)
            cover.width = cover.height = 32
            cover.pix_fmt = "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        if cover is not None:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(cover.encode(frame) + cover.encode())
        container.mux(stream.encode(silence) + stream.encode())


@pytest.mark.parametrize("picture", [None, np.zeros((32, 32, 3), np.uint8)], ids=["sound", "cover"])
def test_no_video_stream(tmp_path, picture):
    write_sound(tmp_path / "a.flac", picture)
    with pytest.raises(ValueError, match=r"a\.flac: no video stream"):
        sample_video(tmp_path / "a.flac", BUDGET)


def test_a_video_of_no_frames(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height = stream.width = 32
        stream.pix_fmt = "bgr0"
        container.start_encoding()
    with pytest.raises(ValueError, match=r"a\.mkv: "):
        sample_video(path, BUDGET)


def test_packets_that_show_nothing_are_not_counted(tmp_path):
    """A cut between key frames: the packets up to the next key frame decode to nothing."""
    if "libx264" not in av.codecs_available:
        pytest.skip("this FFmpeg has no libx264")
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "sc_threshold": "0"})
        stream.height = stream.width = 112
        stream.pix_fmt = "yuv420p"
        for i in range(30):
            pixels = np.full((112, 112, 3), 40 + 5 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        out = target.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        for packet in packets[4:]:
            packet.stream = out
            target.mux(packet)
    video = sample_video(cut, BUDGET)
    means = video.frames.float().mean((1, 2, 3))
    assert len(video.frames) == 4 and (means.diff() > 0).all()
    assert means[0] > 40 + 5 * 9 and abs(means[-1] - (40 + 5 * 29)) < 5


@given(st.data())
def test_damaged_files_read_or_raise_value_error(tmp_path, data):
    path = demo_video(tmp_path / "damaged.mp4", num_frames=8, height=32, width=32)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert sample_video(path, BUDGET).frames.dtype == torch.uint8
    except ValueError as error:
        assert "damaged.mp4" in str(error)
