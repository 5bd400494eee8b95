"""Messages to prompts: chat template, pictures and videos, placeholders, positions.

A message's content is a text or a list of parts: {"type": "text", "text": ...}, {"type": "image", "image": ...},
{"type": "video", "video": ...}. The template puts one placeholder where a picture or video goes; it becomes as many as
there are vision tokens, a video's frames each behind `<|frame|>` and the second at which they are shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from .config import KeyeConfig
from .images import image_patches
from .requests import Prompt
from .rope import mrope_positions
from .video import Video, VideoOptions, budgets, read_video

Message = dict[str, Any]
IMAGE_PAD, VIDEO_PAD, FRAME = "<|image_pad|>", "<|video_pad|>", "<|frame|>"
# Used where the checkpoint brings none; that of the published model is Qwen3-Thinking's with placeholders (the end of
# the generation prompt is an assumption).
DEFAULT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class KeyeProcessor:
    """Makes the prompts of a checkpoint.

    Attributes:
        tokenizer: of `transformers`. config: the checkpoint's.
    """

    def __init__(self, tokenizer: Any, config: KeyeConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.template = getattr(tokenizer, "chat_template", None) or DEFAULT_TEMPLATE

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> KeyeProcessor:
        """Reads tokenizer, chat template and config.json of a checkpoint directory."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        return cls(tokenizer, KeyeConfig.from_pretrained(directory))

    def __call__(self, messages: str | list[Message], *, options: VideoOptions | None = None) -> Prompt:  # fmt: skip
        """The prompt of a conversation; a string is one user message.

        Raises:
            ValueError: a picture or video that cannot be read (it says which), or a text with placeholders of its own.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        images, videos = media_of(messages, "image"), media_of(messages, "video")
        return self.prompt(text, images, videos, options=options)

    def prompt(self, text: str, images: list[Any] | None = None, videos: list[Any] | None = None, *, options: VideoOptions | None = None) -> Prompt:  # fmt: skip
        """The prompt of a text with one placeholder for each picture and video, in their order."""
        images, videos, options = images or [], videos or [], options or VideoOptions()
        found = {pad: text.count(pad) for pad in (IMAGE_PAD, VIDEO_PAD)}
        if found[IMAGE_PAD] != len(images) or found[VIDEO_PAD] != len(videos):
            raise ValueError(
                f"{found[IMAGE_PAD]} picture and {found[VIDEO_PAD]} video placeholders for {len(images)} pictures and "
                f"{len(videos)} videos"
            )
        if options.adaptive and len(videos) > 1:
            raise ValueError(f"adaptive: for a single video, got {len(videos)}")
        patches, grids, pieces = [], [], []
        image, video = enumerate(images), enumerate(zip(videos, budgets(len(videos), options)))
        for piece in re.split(f"({re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)})", text):
            if piece == IMAGE_PAD:
                i, source = next(image)
                part, grid = named(f"picture {i}", image_patches, source)
                patches.append(part)
                grids.append(grid)
                piece = IMAGE_PAD * self.tokens(grid)
            elif piece == VIDEO_PAD:
                i, (source, budget) = next(video)
                read: Video = named(f"video {i}", read_video, source, options, budget)
                patches.append(read.patches)
                grids += [read.grid] * len(read.seconds)
                pads = VIDEO_PAD * self.tokens(read.grid)
                piece = "".join(f"{FRAME}{second:.1f}{pads}" for second in read.seconds)
            pieces.append(piece)
        ids = self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        input_ids = torch.tensor(ids, dtype=torch.int64)
        positions = mrope_positions(input_ids, grids, self.config)
        return Prompt(input_ids, positions, torch.cat(patches) if patches else None, grids)

    def tokens(self, grid: tuple[int, int, int]) -> int:
        merge = 1 if self.config.vision is None else self.config.vision.spatial_merge_size
        return grid[1] * grid[2] // merge**2


def media_of(messages: list[Message], kind: str) -> list[Any]:
    """Pictures or videos of a conversation, in order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]  # fmt: skip
    return [part[kind] for part in parts if part["type"] == kind]


def named(what: str, function: Any, *args: Any) -> Any:
    """function(*args); a ValueError says what it was about."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
