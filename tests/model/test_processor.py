"""Pictures, videos and prompts, by the published rules."""

import itertools
import math

import av
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_model import KeyeConfig
from keye_model.images import (  # fmt: skip
    FACTOR,
    MAX_PIXELS,
    MIN_PIXELS,
    image_patches,
    load_image,
    smart_resize,
)
from keye_model.processor import KeyeProcessor
from keye_model.rope import mrope_positions
from keye_model.tiny import demo_picture, save_demo_video, tiny_config, tiny_tokenizer
from keye_model.video import Frames, VideoOptions, read_video, sample


@pytest.fixture(scope="module")
def processor():
    tokenizer = tiny_tokenizer()
    return KeyeProcessor(tokenizer, tiny_config(tokenizer))


# ---- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, expected", [
    ((280, 280), (280, 280)), ((281, 300), (280, 308)), ((13, 13), (56, 56)), ((10, 100), (28, 112)),
    ((5000, 5000), (4004, 4004)), ((14, 2800), (28, 2800)), ((42, 70), (56, 56)),
])  # fmt: skip
def test_smart_resize(size, expected):
    """By hand: 13 -> 28 is below 4 tokens, so sqrt(3136 / 169) = 4.3 and 13 * 4.3 = 56; 5000 -> 5012 is above 20,480 of
    them, so 5000 / sqrt(5000^2 / 16,056,320) = 4007, down to 4004; 42 / 28 and 70 / 28 round to 2."""
    assert smart_resize(*size) == expected


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_smart_resize_keeps_its_limits(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times"):
            smart_resize(height, width)
        return
    h, w = smart_resize(height, width)
    assert h % FACTOR == w % FACTOR == 0 and h > 0 and w > 0
    assert h * w >= MIN_PIXELS
    # a side of one token cannot shrink further: long strips may pass the limit
    assert h * w <= MAX_PIXELS or min(h, w) == FACTOR


def test_patches_are_the_picture():
    image = demo_picture(280)
    patches, grid = image_patches(image)
    assert (
        grid == (1, 20, 20) and patches.shape == (400, 3, 14, 14) and patches.dtype == torch.float32
    )
    rows = patches.view(20, 20, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, 280, 280)
    pixels = ((rows * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    assert (pixels == numpy.asarray(image)).all()


def test_all_forms_of_a_picture_are_one(tmp_path):
    image = demo_picture(56)
    array = numpy.asarray(image)
    image.save(tmp_path / "a.png")
    forms = [image, image.convert("RGBA"), str(tmp_path / "a.png"), tmp_path / "a.png", array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1)]  # fmt: skip
    assert all((numpy.asarray(load_image(form)) == array).all() for form in forms)


@pytest.mark.parametrize("make, message", [
    (lambda d: d / "absent.png", "absent.png: not a readable picture"),
    (lambda d: (d / "x.png").write_bytes(b"no picture") and d / "x.png", "x.png: not a readable picture"),
    (lambda d: truncated(d / "t.png"), "t.png: not a readable picture"),
    (lambda d: Image.new("RGB", (3, 700)), "200 times"),
    (lambda d: numpy.zeros((4, 4), numpy.uint8), r"expected an array \[H, W, 3\]"),
    (lambda d: numpy.zeros((4, 4, 3)), "of float64"),
    (lambda d: numpy.zeros((0, 4, 3), numpy.uint8), "0 x 4 pixels"),
    (lambda d: 7, "got int"),
])  # fmt: skip
def test_broken_pictures(processor, tmp_path, make, message):
    content = [
        {"type": "image", "image": demo_picture()},
        {"type": "image", "image": make(tmp_path)},
    ]
    with pytest.raises(ValueError, match="picture 1: .*" + message):
        processor([{"role": "user", "content": content}])
    assert processor([{"role": "user", "content": content[:1]}]).grids == [(1, 20, 20)]


def truncated(path):
    demo_picture(400).save(path)
    path.write_bytes(path.read_bytes()[:300])
    return path


# ---- videos ----------------------------------------------------------------------------------------


def test_a_video_file(tmp_path):
    """24 frames at 8 a second: 2 a second for 3 s are 6, evenly spread from the first to the last."""
    save_demo_video(tmp_path / "v.mp4")
    video = read_video(tmp_path / "v.mp4", VideoOptions(), 10_000)
    assert video.seconds == [i / 8 for i in (0, 5, 9, 14, 18, 23)]
    assert video.grid == (1, 16, 16) and video.patches.shape == (6 * 256, 3, 14, 14)
    bright = (
        (video.patches.view(6, 16, 16, 3, 14, 14)[:, :, :, 0].amax((-2, -1)) > 0).any(1).float()
    )
    centres = (bright * torch.arange(16)).sum(1) / bright.sum(1)
    assert (centres.diff() > 1).all()  # the disc moves to the right


def test_frame_lists():
    frames = [demo_picture(112)] * 4
    video = read_video(Frames(frames, fps=4.0), VideoOptions(), 10_000)
    assert video.seconds == [0.0, 0.25, 0.5, 0.75] and video.grid == (
        1,
        16,
        16,
    )  # grown to 64 tokens
    assert len(read_video([numpy.asarray(f) for f in frames], VideoOptions(), 10_000).seconds) == 4


def test_sampling_rules():
    assert sample(240, 24.0, 2.0, 184_320) == [round(i * 239 / 19) for i in range(20)]
    assert len(sample(5, 30.0, 2.0, 184_320)) == 2  # two at least
    assert sample(1, 30.0, 2.0, 184_320) == [0]
    assert len(sample(10**6, 30.0, 2.0, 184_320)) == 2880  # of 64 tokens each
    assert len(sample(100, 1.0, 2.0, 184_320)) == 100  # not more than there are


@pytest.mark.parametrize("frames, budget, adaptive, side", [
    (4, 10_000, False, 16), (4, 4 * 100, False, 10), (4, 10, False, 8), (4, 8 * 4 * 100, True, 10),
])  # fmt: skip
def test_tokens_of_a_frame(frames, budget, adaptive, side):
    """Between 64 and 256 by the budget; adaptive: 4 s are below 256 s, an eighth of it."""
    video = read_video(
        Frames([demo_picture(800)] * frames, 1.0), VideoOptions(adaptive=adaptive), budget
    )
    assert video.grid == (1, 2 * side, 2 * side)


@pytest.mark.parametrize("make, message", [
    (lambda d: d / "absent.mp4", "absent.mp4: not a readable video"),
    (lambda d: (d / "x.mp4").write_bytes(b"no video") and d / "x.mp4", "x.mp4: not a readable video"),
    (lambda d: cut(d / "c.mp4"), "c.mp4"),
    (lambda d: sound_only(d / "s.wav"), "holds no video"),
    (lambda d: [], "0 frames"),
    (lambda d: Frames([demo_picture()], fps=math.nan), "frames a second"),
    (lambda d: [Image.new("RGB", (2, 900))], "200 times"),
])  # fmt: skip
def test_broken_videos(processor, tmp_path, make, message):
    with pytest.raises(ValueError, match="video 0: .*" + message):
        processor([{"role": "user", "content": [{"type": "video", "video": make(tmp_path)}]}])


def cut(path):
    save_demo_video(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 800), numpy.int16), layout="mono")
        frame.sample_rate = 8000
        for packet in itertools.chain(stream.encode(frame), stream.encode()):
            container.mux(packet)
    return path


# ---- prompts ---------------------------------------------------------------------------------------


def test_text(processor):
    prompt = processor("Hello, wörld 漢!")
    text = processor.tokenizer.decode(prompt.input_ids)
    assert text == "<|im_start|>user\nHello, wörld 漢!<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.pixel_values is None and prompt.grids == []
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids)).expand(3, -1))


def test_expanded_prompt(processor, tmp_path):
    save_demo_video(tmp_path / "v.mp4", seconds=1.0)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image", "image": demo_picture(56)}, {"type": "text", "text": "and"},
            {"type": "video", "video": str(tmp_path / "v.mp4")}, {"type": "text", "text": "differ?"},
        ]},
    ]  # fmt: skip
    prompt = processor(messages)
    frame = "<|video_pad|>" * 64
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 4
        + "<|vision_end|>and<|vision_start|><|frame|>0.0" + frame + "<|frame|>0.9" + frame
        + "<|vision_end|>differ?<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert processor.tokenizer.decode(prompt.input_ids) == expected
    assert prompt.grids == [(1, 4, 4), (1, 16, 16), (1, 16, 16)]
    assert len(prompt.pixel_values) == 16 + 2 * 256
    assert torch.equal(prompt.pixel_values[:16], image_patches(demo_picture(56))[0])


def test_placeholders_must_match(processor):
    with pytest.raises(
        ValueError, match="1 picture and 0 video placeholders for 0 pictures and 0 videos"
    ):
        processor("what is <|image_pad|>?")
    with pytest.raises(
        ValueError, match="0 picture and 0 video placeholders for 2 pictures and 1 videos"
    ):
        processor.prompt("x", images=[demo_picture()] * 2, videos=[[demo_picture()]])
    two = [{"type": "video", "video": [demo_picture()] * 2}] * 2
    with pytest.raises(ValueError, match="adaptive: for a single video"):
        processor([{"role": "user", "content": two}], options=VideoOptions(adaptive=True))


def test_videos_share_the_budget(processor):
    video = {"type": "video", "video": [demo_picture(800)] * 2}
    options = VideoOptions(total_tokens=600)
    alone = processor([{"role": "user", "content": [video]}], options=options)
    shared = processor([{"role": "user", "content": [video] * 3}], options=options)
    assert alone.grids == [(1, 32, 32)] * 2 and shared.grids == [(1, 20, 20)] * 6


def test_own_chat_template_and_directory(tmp_path, processor):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}<think>"
    )
    tokenizer.save_pretrained(str(tmp_path))
    processor.config.save_pretrained(tmp_path)
    again = KeyeProcessor.from_pretrained(tmp_path)
    assert again.tokenizer.decode(again("hi").input_ids) == "user: hi;<think>"
    assert again.config == KeyeConfig.from_dict(processor.config.to_dict())


# ---- positions -------------------------------------------------------------------------------------


def slow_positions(ids, grids, config):
    """The rule, token by token."""
    columns, number, frames, seen = [], 0, iter(grids), {}
    i = 0
    while i < len(ids):
        if ids[i] in (config.image_token_id, config.video_token_id):
            _, h, w = next(frames)
            for row, column in itertools.product(range(h // 2), range(w // 2)):
                columns.append((number, number + row, number + column))
            i += h * w // 4
            number = max(max(c) for c in columns[-(h * w // 4) :]) + 1
        else:
            columns.append((number,) * 3)
            number, i = number + 1, i + 1
    assert not seen
    return torch.tensor(columns).T


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(1, 4), st.integers(1, 4)), max_size=5), st.integers(1, 4))  # fmt: skip
def test_positions_follow_the_rule(parts, tail):
    config = KeyeConfig()
    ids, grids = [], []
    for text, is_video, h, w in parts:
        pad = config.video_token_id if is_video else config.image_token_id
        ids += [1] * (text + 1) + [pad] * (h * w)
        grids.append((1, 2 * h, 2 * w))
    ids += [2] * tail
    expected = slow_positions(ids, grids, config)
    assert torch.equal(mrope_positions(torch.tensor(ids), grids, config), expected)


def test_positions_equal_qwen2_vl():
    """Pictures alone: the rule is theirs."""
    transformers = pytest.importorskip("transformers")
    config = KeyeConfig()
    text = {"vocab_size": 200_000, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}  # fmt: skip
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": 64,
        "spatial_merge_size": 2,
    }
    special = {name: getattr(config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}  # fmt: skip
    theirs = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special))  # fmt: skip
    start, end, pad = (
        config.vision_start_token_id,
        config.vision_end_token_id,
        config.image_token_id,
    )
    ids = torch.tensor([5, 6, start] + [pad] * 6 + [end, 7, 8, start] + [pad] * 8 + [end, 9])
    grids = [(1, 4, 6), (1, 8, 4)]
    kinds = (ids == pad).int()
    arguments = {"input_ids": ids[None], "image_grid_thw": torch.tensor(grids)}
    if "mm_token_type_ids" in theirs.get_rope_index.__code__.co_varnames:
        arguments["mm_token_type_ids"] = kinds[None]
    expected, _ = theirs.get_rope_index(**arguments)
    assert torch.equal(mrope_positions(ids, grids, config), expected[:, 0])


def test_positions_of_placeholders_that_do_not_fit():
    config = KeyeConfig()
    pad = config.image_token_id
    with pytest.raises(
        ValueError, match="3 vision placeholders, but pictures and frames of 4 tokens"
    ):
        mrope_positions(torch.tensor([1, pad, pad, pad]), [(1, 4, 4)], config)
    with pytest.raises(ValueError, match="interrupted"):
        mrope_positions(torch.tensor([pad, pad, 1, pad, pad]), [(1, 4, 4)], config)
