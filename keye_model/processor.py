"""The processor: chat messages, images and videos in; token ids, patches and positions out.

Every image and every frame is one grid row [1, h, w] in patches, and h * w / 4 tokens of the prompt; rows, patches and
tokens stand in the order of the prompt, so the model scatters its visual features to the pad tokens as they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .chat import CHAT_TEMPLATE, IMAGE_PAD, PLACEHOLDER, VIDEO_PAD, take_media, video_text
from .config import KeyeConfig
from .images import ImageBudget, ImageSource, load_image, normalize, patchify, resize_image
from .requests import Prompt
from .rope import mrope_positions
from .video import VideoBudget, VideoSource, sample_video
from .vision import Grid


class KeyeProcessor:
    """Turns conversations into prompts of the engine. Holds no state of a request: one processor may serve many threads.

    Args:
        tokenizer: must map <|image_pad|> and <|video_pad|> to the ids of `config`.
        config: for token ids, patch and merge size.
        chat_template: Jinja; None takes the tokenizer's, or Qwen3's with Keye's placeholders.
        image_mean, image_std: of pixels in [0, 1], per channel.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        config: KeyeConfig,
        *,
        chat_template: str | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.chat_template = chat_template or tokenizer.chat_template or CHAT_TEMPLATE
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        if config.vision is not None:
            self.patch_size = config.vision.patch_size
            self.factor = config.vision.patch_size * config.vision.spatial_merge_size
            for token, expected in (
                (IMAGE_PAD, config.image_token_id),
                (VIDEO_PAD, config.video_token_id),
            ):
                found = tokenizer.convert_tokens_to_ids(token)
                if found != expected:
                    raise ValueError(f"{token}: {expected} in the config, {found} in the tokenizer")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> KeyeProcessor:
        """Reads config.json, tokenizer.json and, where they are, the chat template and preprocessor_config.json."""
        directory = Path(directory)
        # The file's own class: AutoTokenizer would ask for code that comes with the checkpoint.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        template = _read_json(directory / "chat_template.json").get("chat_template")
        pixels = _read_json(directory / "preprocessor_config.json")
        given = {key: pixels[key] for key in ("image_mean", "image_std") if key in pixels}
        return cls(
            tokenizer, KeyeConfig.from_pretrained(directory), chat_template=template, **given
        )

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, with one placeholder an image or video.

        Args:
            messages: {"role": ..., "content": text or parts}; a part is {"type": "text", "text": ...}, {"type": "image"}
                or {"type": "video"}, the latter two with or without their source under "image" or "video".
            variables: further variables of the template. The default one has `enable_thinking`, true unless given.
        """
        plain, _, _ = take_media(messages)
        text = self.tokenizer.apply_chat_template(
            plain,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return str(text)

    def __call__(
        self,
        prompt: str | Sequence[dict[str, Any]],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        image_budget: ImageBudget | None = None,
        video_budget: VideoBudget | None = None,
        **template: Any,
    ) -> Prompt:
        """Prepares one request.

        Args:
            prompt: messages, see `apply_chat_template`, or text that holds <|image_pad|> and <|video_pad|> once an image
                and video.
            images, videos: in the order of their placeholders, where the messages do not bring them.
            image_budget, video_budget: None takes the published ones.
            template: arguments of `apply_chat_template`.

        Raises:
            ValueError: a number of placeholders that is not that of the media given; media that cannot be used, as
                `images[1]: path: reason`. Nothing outlives the call.
        """
        if not isinstance(prompt, str):
            _, images, videos = take_media(prompt, images, videos)
            prompt = self.apply_chat_template(prompt, **template)
        pieces = PLACEHOLDER.split(prompt)  # text, placeholder, text, ..., text
        self._check_counts(pieces, images, videos)

        image_budget, video_budget = image_budget or ImageBudget(), video_budget or VideoBudget()
        image_sources: Iterator[tuple[int, Any]] = iter(enumerate(images))
        video_sources: Iterator[tuple[int, Any]] = iter(enumerate(videos))
        grids: list[Grid] = []
        patches: list[Tensor] = []
        for place in range(1, len(pieces), 2):
            is_image = pieces[place] == IMAGE_PAD
            index, source = next(image_sources if is_image else video_sources)
            try:
                if is_image:
                    frames, text = self._image(source, image_budget)
                else:
                    frames, text = self._video(source, video_budget, len(videos))
            except ValueError as error:
                kind = "images" if is_image else "videos"
                raise ValueError(f"{kind}[{index}]: {error}") from error
            sides = frames.shape[2] // self.patch_size, frames.shape[3] // self.patch_size
            grids += [(1, *sides)] * len(frames)
            patches.append(patchify(frames, self.patch_size))
            pieces[place] = text

        ids = self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        input_ids = torch.tensor(ids, dtype=torch.int64)
        positions = mrope_positions(
            input_ids, torch.tensor(grids, dtype=torch.int64).reshape(-1, 3), self.config
        )
        pixels = normalize(torch.cat(patches), self.image_mean, self.image_std) if patches else None
        return Prompt(input_ids, positions, pixels, grids)

    def _check_counts(self, pieces: list[str], images: Sequence, videos: Sequence) -> None:
        for token, given, kind in ((IMAGE_PAD, images, "images"), (VIDEO_PAD, videos, "videos")):
            asked = pieces[1::2].count(token)
            if asked != len(given):
                raise ValueError(f"the prompt has {asked} {token}, but {len(given)} {kind} came")
            if asked and self.config.vision is None:
                raise ValueError(f"{kind}: this checkpoint has no vision tower")

    def _image(self, source: ImageSource, budget: ImageBudget) -> tuple[Tensor, str]:
        """The image as [1, 3, H, W] uint8, and the text its placeholder becomes."""
        frames = resize_image(load_image(source), budget, factor=self.factor)[None]
        return frames, IMAGE_PAD * self._num_tokens(frames)

    def _video(
        self, source: VideoSource, budget: VideoBudget, num_videos: int
    ) -> tuple[Tensor, str]:
        """The frames as [n, 3, H, W] uint8, and the text the video's placeholder becomes."""
        video = sample_video(source, budget, num_videos=num_videos, factor=self.factor)
        num_tokens = self._num_tokens(video.frames)
        return video.frames, video_text(num_tokens, len(video.frames), video.timestamps)

    def _num_tokens(self, frames: Tensor) -> int:
        """Of one frame."""
        return frames.shape[-2] * frames.shape[-1] // self.factor**2


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
