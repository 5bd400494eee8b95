"""Images: the resize rule by hand and by property, reading of every source, patches, broken files."""

import io

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from keye_model.images import (
    ImageBudget,
    load_image,
    normalize,
    patchify,
    resize_image,
    smart_resize,
    to_tensor,
)
from keye_model.tiny import demo_image

MIN_PIXELS, MAX_PIXELS = 3_136, 16_056_320
BOUNDS = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}


def test_budget_in_pixels():
    assert (ImageBudget().min_tokens * 28**2, ImageBudget().max_tokens * 28**2) == (
        MIN_PIXELS,
        MAX_PIXELS,
    )
    with pytest.raises(ValueError, match="min_tokens <= max_tokens"):
        ImageBudget(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((28, 112), (28, 112)),  # four tokens stay
        ((56, 56), (56, 56)),
        ((480, 640), (476, 644)),  # 17.14 and 22.86 tokens: 17 x 23
        ((70, 70), (56, 56)),  # 2.5 tokens: half to even
        ((98, 98), (112, 112)),  # 3.5 tokens: half to even
        ((1, 1), (56, 56)),  # scaled by 56
        (
            (10, 20),
            (56, 84),
        ),  # 1 x 1 is too small; scaled by sqrt(3136 / 200) = 3.96: 39.6, 79.2, up
        ((1, 200), (28, 196)),  # 1 x 7.14 tokens: 1 x 7, enough
        (
            (8000, 4000),
            (5656, 2828),
        ),  # shrunk by sqrt(32e6 / 16056320) = 1.41173: 5666.8, 2833.4, down
        ((200_000, 1_000), (56_644, 280)),  # 200 : 1, shrunk by 3.5293: 56668, 283.3, down
    ],
)
def test_smart_resize_by_hand(size, expected):
    assert smart_resize(*size, **BOUNDS) == expected


def test_a_side_never_gets_shorter_than_a_token():
    assert smart_resize(100, 20_000, min_pixels=MIN_PIXELS, max_pixels=64 * 28**2) == (28, 3164)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 5), (1, 201), (20_001, 100)])
def test_smart_resize_refuses(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        smart_resize(*size, **BOUNDS)


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_smart_resize_properties(height, width):
    assume(max(height, width) <= 150 * min(height, width))
    h, w = smart_resize(height, width, **BOUNDS)
    assert h % 28 == w % 28 == 0
    assert MIN_PIXELS <= h * w <= MAX_PIXELS
    assert smart_resize(w, h, **BOUNDS) == smart_resize(h, w, **BOUNDS)[::-1] == (w, h)
    if (
        56 <= height <= 4000 and 56 <= width <= 4000
    ):  # rounding moves a side by half a token at most
        assert abs(h - height) <= 14 and abs(w - width) <= 14


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_patches_reassemble(num_frames, h, w):
    frames = torch.randint(0, 256, (num_frames, 3, 14 * h, 14 * w), dtype=torch.uint8)
    patches = patchify(frames)
    assert patches.shape == (num_frames * h * w, 3, 14, 14)
    rows = [
        torch.cat([patches[(f * h + r) * w + c] for c in range(w)], dim=2)
        for f in range(num_frames)
        for r in range(h)
    ]
    rebuilt = torch.stack([torch.cat(rows[f * h : (f + 1) * h], dim=1) for f in range(num_frames)])
    assert torch.equal(rebuilt, frames)


def test_resize_is_pils_bicubic(tmp_path):
    image = load_image(demo_image(tmp_path / "a.png", height=100, width=333))
    pixels = resize_image(image, ImageBudget())
    assert pixels.shape == (3, 112, 336) and pixels.dtype == torch.uint8
    expected = np.asarray(image.resize((336, 112), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_normalize():
    patches = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None, None].expand(
        3, 3, 14, 14
    )
    values = normalize(patches, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[:, 0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    other = normalize(patches, (0.2, 0.4, 0.6), (0.1, 0.2, 0.4))
    torch.testing.assert_close(other[1, :, 3, 5], torch.tensor([0.0, -1.0, -1.0]))


def test_every_source_reads_the_same(tmp_path):
    pixels = np.random.randint(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    sources = [image, pixels, pixels[::-1][::-1], tensor, tensor.contiguous(), tmp_path / "a.png"]
    for source in [*sources, str(tmp_path / "a.png")]:
        assert np.array_equal(np.asarray(load_image(source)), pixels)
    assert torch.equal(to_tensor(image), tensor)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    assert load_image(Image.new(mode, (30, 20))).mode == "RGB"


def test_16_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16).repeat(5, 0)
    Image.fromarray(values).save(tmp_path / "a.png")
    got = np.asarray(load_image(tmp_path / "a.png"))
    assert np.array_equal(got[0], np.array([0, 0, 1, 128, 255])[:, None].repeat(3, 1))


def test_photographs_stand_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image.save(tmp_path / "a.png", exif=exif)
    got = load_image(tmp_path / "a.png")
    assert got.size == (20, 40)
    assert got.getpixel((10, 5)) == (0, 0, 0) and got.getpixel((10, 35)) == (255, 255, 255)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify"),
        (b"not a picture at all", "cannot identify"),
        (png()[:600], "truncated"),
        (png()[:20], "Truncated"),
        (png().replace(b"IDAT", b"IDAX"), ""),
    ],
    ids=["empty", "text", "truncated", "header", "chunk"],
)
def test_broken_files(tmp_path, content, reason):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.png: not a usable image: .*{reason}"):
        load_image(path)


@given(st.data())
def test_damaged_files_read_or_raise_value_error(tmp_path, data):
    content = bytearray(png())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.png"
    path.write_bytes(content)
    try:
        assert load_image(path).mode == "RGB"
    except ValueError as error:
        assert "damaged.png" in str(error)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        ("", "no such file"),
        (b"bytes", "got <class 'bytes'>"),
        (None, "got <class 'NoneType'>"),
        (np.zeros((4, 4), np.uint8), r"\[4, 4\] uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"\[4, 4, 4\] uint8"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\[4, 4, 3\]"),
        (torch.zeros(3, 4, 4), "float32"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "empty"),
        (Image.new("RGB", (0, 5)), "5 x 0"),
        (Image.new("RGB", (2010, 10)), "aspect ratio of at most 200, got 10 x 2010"),
        (Image.new("F", (5, 5)), "mode F"),
        (Image.new("I", (5, 5)), "mode I"),
    ],
)
def test_absurd_sources(source, reason):
    with pytest.raises(ValueError, match=reason):
        load_image(source)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = demo_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.png: .*bomb"):
        load_image(path)
