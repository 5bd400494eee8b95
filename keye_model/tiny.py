"""A tiny Keye-VL-2.0: checkpoint, tokenizer, a picture and a video, for tests and first steps. No network needed."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from .chat import CHAT_TEMPLATE
from .config import IndexerConfig, KeyeConfig, VisionConfig
from .model import KeyeVL
from .weights import save_pretrained

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<|frame|>", "<think>", "</think>",
)  # fmt: skip
TOKEN_IDS = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}  # after the 256 bytes


def tiny_config() -> KeyeConfig:
    """A network of under two million parameters with every part of the real one, in sizes the kernels take."""
    return KeyeConfig(
        vocab_size=320,  # 266 tokens, and unused rows as in the real one
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        max_position_embeddings=32768,
        rope_scaling={"rope_type": "default", "mrope_section": [8, 12, 12]},
        image_token_id=TOKEN_IDS["<|image_pad|>"],
        video_token_id=TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=TOKEN_IDS["<|vision_end|>"],
        eos_token_id=[TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
        vision=VisionConfig(
            hidden_size=144, intermediate_size=288, num_hidden_layers=2, num_attention_heads=2
        ),
        indexer=IndexerConfig(indexer_num_heads=4, indexer_head_dim=64, topk=64),
    )


def tiny_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """Writes tokenizer.json, tokenizer_config.json and the chat template: Qwen's byte-level BPE with no merges.

    Every byte is a token, then come the special tokens; ids agree with `tiny_config`.
    """
    alphabet = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    thoughts = ("<think>", "</think>")  # shown when special tokens are skipped, as in Qwen3
    tokenizer.add_tokens(
        [AddedToken(t, special=t not in thoughts, normalized=False) for t in SPECIAL_TOKENS]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(directory)
    return fast


def save_tiny_checkpoint(directory: str | Path, *, seed: int = 0) -> None:
    """Writes configuration, random weights and tokenizer: what `from_pretrained` and `KeyeProcessor` read."""
    torch.manual_seed(seed)
    model = KeyeVL(tiny_config())
    model.init_weights()
    save_pretrained(model, directory, progress=False)
    tiny_tokenizer(directory)


def demo_image(path: str | Path, *, height: int = 240, width: int = 320) -> Path:
    """Draws a picture of a house under a sun; the suffix of `path` is the format."""
    image = Image.new("RGB", (width, height), "skyblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 0.7, width, height), fill="forestgreen")
    draw.rectangle((width * 0.2, height * 0.45, width * 0.5, height * 0.8), fill="firebrick")
    roof = [
        (width * 0.15, height * 0.45),
        (width * 0.35, height * 0.2),
        (width * 0.55, height * 0.45),
    ]
    draw.polygon(roof, fill="saddlebrown")
    draw.ellipse((width * 0.7, height * 0.08, width * 0.86, height * 0.3), fill="gold")
    image.save(path)
    return Path(path)


def demo_video(
    path: str | Path, *, num_frames: int = 32, fps: int = 8, height: int = 128, width: int = 192
) -> Path:
    """Writes an MPEG-4 video of a disc that goes round over a background that gets brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = (
            width,
            height,
            "yuv420p",
            2_000_000,
        )
        for i in range(num_frames):
            level = 40 + 160 * i // num_frames
            image = Image.new("RGB", (width, height), (level, level, level))
            angle = 2 * math.pi * i / num_frames
            x, y = (
                width / 2 + width / 3 * math.cos(angle),
                height / 2 + height / 3 * math.sin(angle),
            )
            ImageDraw.Draw(image).ellipse((x - 16, y - 16, x + 16, y + 16), fill="red")
            frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)
