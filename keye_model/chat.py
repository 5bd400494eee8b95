"""Prompts: the default chat template, and how placeholders of images and videos become visual tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

IMAGE_PAD, VIDEO_PAD, FRAME = "<|image_pad|>", "<|video_pad|>", "<|frame|>"
PLACEHOLDER = re.compile(f"({re.escape(IMAGE_PAD)}|{re.escape(VIDEO_PAD)})")

# Qwen3's thinking template with Keye's placeholders, for checkpoints that bring none. As there, the thoughts of turns before
# the last question are left out, and the answer opens with <think> unless enable_thinking is false.
CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception('the default chat template knows no tools') }}{% endif %}
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set turn = namespace(text='') %}
    {%- if message.content is string %}
        {%- set turn.text = message.content %}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}
                {%- set turn.text = turn.text + part.text %}
            {%- elif part.type in ('image', 'video') %}
                {%- set turn.text = turn.text + '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' %}
            {%- else %}
                {{- raise_exception('content of type ' + part.type) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 < last.question and '</think>' in turn.text %}
        {%- set turn.text = turn.text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + turn.text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is not defined or enable_thinking %}{{ '<think>\\n' }}{% endif %}
{%- endif %}
"""


def take_media(
    messages: Sequence[dict[str, Any]], images: Sequence[Any] = (), videos: Sequence[Any] = ()
) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """Splits chat messages into what a template reads and the media, in the order of the prompt.

    A part {"type": "image", "image": source} becomes {"type": "image"}, likewise "video". A part without a source takes the
    next of `images` or `videos`; what is left of these comes last.

    Returns:
        (messages, images, videos); the arguments are left as they are.
    """
    given = {"image": iter(images), "video": iter(videos)}
    media: dict[str, list[Any]] = {"image": [], "video": []}
    plain = []
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list):
            for part in parts:
                kind = part.get("type")
                if kind in media:
                    source = part.get(kind)
                    media[kind].extend([source] if source is not None else islice(given[kind], 1))
            parts = [{"type": p["type"]} if p.get("type") in media else p for p in parts]
        plain.append({**message, "content": parts})
    return plain, [*media["image"], *given["image"]], [*media["video"], *given["video"]]


def video_text(num_tokens: int, num_frames: int, timestamps: Sequence[float] | None) -> str:
    """The text of a video: for every frame <|frame|>, its time in seconds with one decimal, then its visual tokens."""
    pads = VIDEO_PAD * num_tokens
    times = [""] * num_frames if timestamps is None else [f"{t:.1f}" for t in timestamps]
    return "".join(FRAME + time + pads for time in times)
