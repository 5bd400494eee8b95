"""The processor: tokenizer, prompts, expansion, order of patches, errors."""

import dataclasses
import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_model.chat import CHAT_TEMPLATE
from keye_model.config import KeyeConfig
from keye_model.images import ImageBudget, load_image, resize_image
from keye_model.processor import KeyeProcessor
from keye_model.rope import mrope_positions
from keye_model.tiny import (
    SPECIAL_TOKENS,
    TOKEN_IDS,
    demo_image,
    demo_video,
    tiny_config,
    tiny_tokenizer,
)
from keye_model.video import FrameList, VideoBudget, sample_video

IMAGE, VIDEO = TOKEN_IDS["<|image_pad|>"], TOKEN_IDS["<|video_pad|>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny_config().save_pretrained(directory)
    tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint):
    return KeyeProcessor.from_pretrained(checkpoint)


def user(*parts):
    return [
        {
            "role": "user",
            "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts],
        }
    ]


def picture(height, width):
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


# Tokenizer and configuration


def test_tokenizer_round_trip(processor):
    text = "Zwölf Häuser, 十二座房子, 🏠×12\n\t \x00"
    ids = processor.tokenizer(text)["input_ids"]
    assert ids and max(ids) < 256 and processor.tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    marked = "<|im_start|>user\nhi<think>no</think><|im_end|>"
    ids = processor.tokenizer(marked)["input_ids"]
    assert processor.tokenizer.decode(ids) == marked
    shown = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert shown == "user\nhi<think>no</think>"
    for token in SPECIAL_TOKENS:
        assert processor.tokenizer(token)["input_ids"] == [TOKEN_IDS[token]]


def test_configuration_and_tokenizer_agree(checkpoint, processor):
    config = KeyeConfig.from_pretrained(checkpoint)
    assert config.to_dict() == tiny_config().to_dict()
    assert len(processor.tokenizer) <= config.vocab_size
    assert config.eos_token_ids[0] == processor.tokenizer.eos_token_id
    wrong = dataclasses.replace(config, image_token_id=5)
    with pytest.raises(ValueError, match=r"<\|image_pad\|>: 5 in the config, 261 in the tokenizer"):
        KeyeProcessor(processor.tokenizer, wrong)


def test_from_pretrained_reads_what_the_directory_has(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").unlink()
    assert KeyeProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "own"}))
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "min_pixels": 1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    own = KeyeProcessor.from_pretrained(tmp_path)
    assert own.apply_chat_template(user("hi")) == "own"
    assert (own.image_mean, own.image_std) == ((0.1, 0.2, 0.3), (1, 1, 1))


# Prompts


def test_chat_template(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        *user({"type": "video"}, "Two?", {"type": "image"}),
    ]
    before = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "Two?<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    )
    template = processor.apply_chat_template
    assert template(messages) == before + "<|im_start|>assistant\n<think>\n"
    assert template(messages, enable_thinking=False) == before + "<|im_start|>assistant\n"
    assert template(messages, add_generation_prompt=False) == before
    # The thoughts of the answer to the last question stay: that is what training sees.
    answer = {"role": "assistant", "content": "<think>\nso\n</think>\n\nNo."}
    assert template([*messages, answer], add_generation_prompt=False) == (
        before + "<|im_start|>assistant\n<think>\nso\n</think>\n\nNo.<|im_end|>\n"
    )


def test_the_default_template_refuses_what_it_would_drop(processor):
    with pytest.raises(Exception, match="knows no tools"):
        processor.apply_chat_template(user("hi"), tools=[{"type": "function"}])
    with pytest.raises(Exception, match="content of type audio"):
        processor.apply_chat_template(user({"type": "audio"}))


def test_text_only(processor):
    inputs = processor(user("hi"), enable_thinking=False)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert inputs.input_ids.tolist() == processor.tokenizer(text)["input_ids"]
    assert inputs.pixel_values is None and inputs.grids == []
    assert torch.equal(inputs.position_ids, torch.arange(len(inputs.input_ids)).expand(3, -1))
    assert len(processor("").input_ids) == 0


def test_a_text_only_checkpoint(processor):
    text_only = KeyeProcessor(processor.tokenizer, dataclasses.replace(tiny_config(), vision=None))
    assert len(text_only("hello").input_ids) == 5
    with pytest.raises(ValueError, match="images: this checkpoint has no vision tower"):
        text_only("<|image_pad|>", [picture(30, 30)])


def test_image_and_video_in_one_prompt(processor, tmp_path):
    """The whole expansion, the patches in its order, and the grid, with the image before and after the video."""
    image = demo_image(tmp_path / "a.png", height=56, width=84)  # 2 x 3 tokens
    frames = [np.full((56, 56, 3), i, np.uint8) for i in (10, 20)]  # 64 tokens each
    video = FrameList(frames, timestamps=[0.25, 61.97])
    inputs = processor(
        user("a", {"type": "image", "image": image}, {"type": "video", "video": video}, "b",
             {"type": "image", "image": str(image)}),
        enable_thinking=False,
    )  # fmt: skip
    picture_text = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    pads = "<|video_pad|>" * 64
    film = f"<|vision_start|><|frame|>0.2{pads}<|frame|>62.0{pads}<|vision_end|>"
    expected = (
        f"<|im_start|>user\na{picture_text}{film}b{picture_text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.tokenizer.decode(inputs.input_ids) == expected
    assert inputs.grids == [(1, 4, 6), (1, 16, 16), (1, 16, 16), (1, 4, 6)]
    pixels = inputs.pixel_values
    assert pixels.shape == (24 + 256 + 256 + 24, 3, 14, 14) and pixels.dtype == torch.float32
    assert torch.equal(pixels[:24], pixels[-24:])
    resized = resize_image(load_image(image), ImageBudget()).float() / 127.5 - 1
    torch.testing.assert_close(pixels[6 + 2], resized[:, 14:28, 28:42])  # row 1, column 2
    for block, level in ((pixels[24:280], 10), (pixels[280:536], 20)):
        torch.testing.assert_close(block, torch.full_like(block, level / 127.5 - 1))
    assert (inputs.input_ids == IMAGE).sum() == 12 and (inputs.input_ids == VIDEO).sum() == 128


def test_a_video_without_a_clock_has_no_times(processor):
    inputs = processor("<|video_pad|>", videos=[[picture(56, 56)] * 3])
    assert processor.tokenizer.decode(inputs.input_ids) == ("<|frame|>" + "<|video_pad|>" * 64) * 3


def test_a_video_file(processor, tmp_path):
    path = demo_video(tmp_path / "v.mp4")
    inputs = processor(user({"type": "video", "video": path}, "What turns?"))
    video = sample_video(path, VideoBudget())
    h, w = video.frames.shape[2] // 14, video.frames.shape[3] // 14
    assert inputs.grids == [(1, h, w)] * 8
    text = processor.tokenizer.decode(inputs.input_ids)
    assert [f"<|frame|>{t:.1f}<|video_pad|>" in text for t in video.timestamps] == [True] * 8


def test_media_beside_the_messages(processor):
    a, b, c = picture(56, 56), picture(56, 84), picture(84, 56)
    inside = processor(user(*({"type": "image", "image": x} for x in (a, b, c))))
    mixed = processor(
        user({"type": "image"}, {"type": "image", "image": b}, {"type": "image"}), [a, c]
    )
    text = processor("<|image_pad|>x<|image_pad|><|image_pad|>", [a, b, c])
    assert torch.equal(inside.input_ids, mixed.input_ids)
    for other in (mixed, text):
        assert torch.equal(inside.pixel_values, other.pixel_values)
        assert inside.grids == other.grids


def test_messages_are_left_as_they_are(processor):
    image = picture(56, 56)
    messages = user({"type": "image", "image": image}, "hi")
    processor(messages)
    assert messages == user({"type": "image", "image": image}, "hi")


def test_budgets(processor, tmp_path):
    image, path = picture(280, 280), demo_video(tmp_path / "v.mp4")
    assert (processor("<|image_pad|>", [image]).input_ids == IMAGE).sum() == 100
    small = processor("<|image_pad|>", [image], image_budget=ImageBudget(max_tokens=16))
    assert (small.input_ids == IMAGE).sum() == 16
    # two videos share the tokens
    budget = VideoBudget(min_tokens=16, total_tokens=320)
    inputs = processor("<|video_pad|>" * 2, videos=[path] * 2, video_budget=budget)
    tokens = sum(h * w for _, h, w in inputs.grids) // 4
    assert len(inputs.grids) == 16 and tokens <= 320
    alone = processor("<|video_pad|>", videos=[path], video_budget=budget)
    assert math.prod(alone.grids[0]) > math.prod(inputs.grids[0])


# Errors


@pytest.mark.parametrize(
    ("prompt", "num_images", "num_videos", "reason"),
    [
        ("hi", 1, 0, r"the prompt has 0 <\|image_pad\|>, but 1 images came"),
        ("<|image_pad|>", 0, 0, r"the prompt has 1 <\|image_pad\|>, but 0 images came"),
        ("<|image_pad|><|video_pad|>", 1, 2, r"the prompt has 1 <\|video_pad\|>, but 2 videos came"),
        (user({"type": "image"}, {"type": "image"}), 1, 0, r"2 <\|image_pad\|>, but 1 images came"),
        (user("text with <|image_pad|>"), 0, 0, r"1 <\|image_pad\|>, but 0 images came"),
        (user({"type": "image", "image": "a.png"}), 1, 0, r"1 <\|image_pad\|>, but 2 images came"),
    ],
)  # fmt: skip
def test_counts_that_do_not_match(processor, prompt, num_images, num_videos, reason):
    with pytest.raises(ValueError, match=reason):
        processor(prompt, [picture(30, 30)] * num_images, [[picture(30, 30)]] * num_videos)


def test_one_broken_medium_leaves_the_others_alone(processor, tmp_path):
    good = demo_image(tmp_path / "good.png")
    broken, film = tmp_path / "broken.png", tmp_path / "film.mp4"
    broken.write_bytes(good.read_bytes()[:300])
    film.write_bytes(b"no film")
    before = processor("<|image_pad|>", [good])
    with pytest.raises(
        ValueError, match=r"images\[1\]: .*broken\.png: not a usable image: .*truncated"
    ):
        processor("<|image_pad|><|image_pad|>", [good, broken])
    with pytest.raises(ValueError, match=r"videos\[0\]: .*film\.mp4: not a readable video"):
        processor("<|image_pad|><|video_pad|>", [good], [film])
    after = processor("<|image_pad|>", [good])
    assert torch.equal(before.pixel_values, after.pixel_values)


def test_threads_do_not_disturb_each_other(processor, tmp_path):
    good, film = demo_image(tmp_path / "a.png"), demo_video(tmp_path / "v.mp4")
    expected = processor("<|image_pad|><|video_pad|>", [good], [film])
    failures = []

    def work(broken):
        try:
            inputs = processor(
                "<|image_pad|><|video_pad|>", ["none.png" if broken else good], [film]
            )
            same = torch.equal(inputs.pixel_values, expected.pixel_values)
            failures.extend([] if same and not broken else ["differs"])
        except ValueError as error:
            failures.extend([] if broken else [error])

    threads = [threading.Thread(target=work, args=(i % 2 == 1,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4))
def test_tokens_patches_and_positions_agree(processor, sizes):
    images = [
        picture(height, width)
        for height, width in sizes
        if max(height, width) <= 150 * min(height, width)
    ]
    inputs = processor("a<|image_pad|>" * len(images), images)
    patches = torch.tensor(inputs.grids, dtype=torch.int64).reshape(-1, 3).prod(1)
    assert (
        (inputs.input_ids == IMAGE).sum() * 4
        == patches.sum()
        == (0 if inputs.pixel_values is None else len(inputs.pixel_values))
    )
    expected = mrope_positions(
        inputs.input_ids,
        torch.tensor(inputs.grids, dtype=torch.int64).reshape(-1, 3),
        tiny_config(),
    )
    assert torch.equal(inputs.position_ids, expected)
