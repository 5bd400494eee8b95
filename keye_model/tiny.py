"""A complete random tiny checkpoint, and a picture and a video to show it: everything runs in seconds on any machine."""

from __future__ import annotations

from pathlib import Path

import av
import numpy
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .config import IndexerConfig, KeyeConfig, VisionConfig
from .model import KeyeVL
from .weights import save_pretrained

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<|frame|>", "<think>", "</think>",
)  # fmt: skip
VOCABULARY = 512


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the format of Qwen's, with the model's special tokens and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([__doc__ or "", Path(__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")  # fmt: skip


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> KeyeConfig:
    """The model's form at sizes that the kernels serve: head dims 64 and 72, 8 experts, 64 selected tokens."""
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in SPECIAL}
    return KeyeConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, max_position_embeddings=8192,
        rope_scaling={"rope_type": "default", "mrope_section": [8, 12, 12]},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        vision=VisionConfig(hidden_size=144, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2),
        indexer=IndexerConfig(indexer_num_heads=4, indexer_head_dim=64, topk=64),
    )  # fmt: skip


def save_tiny_checkpoint(directory: str | Path, *, seed: int = 0) -> None:
    """Writes config, random weights and tokenizer: what `from_pretrained` and `KeyeProcessor` read."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = KeyeVL(tiny_config(tokenizer))
    model.init_weights()
    save_pretrained(model, directory, progress=False)
    tokenizer.save_pretrained(str(directory))


def demo_picture(size: int = 280) -> Image.Image:
    """A red disc and a blue square on grey."""
    image = Image.new("RGB", (size, size), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    draw.ellipse((size // 8, size // 8, size // 2, size // 2), fill=(220, 40, 40))
    draw.rectangle((size // 2, size // 2, size * 7 // 8, size * 7 // 8), fill=(40, 60, 220))
    return image


def save_demo_video(
    path: str | Path, *, seconds: float = 3.0, fps: int = 8, size: int = 224
) -> None:
    """A disc that moves from left to right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        count = round(seconds * fps)
        for i in range(count):
            image = Image.new("RGB", (size, size), (30, 30, 30))
            x = (size - 60) * i // max(count - 1, 1)
            ImageDraw.Draw(image).ellipse((x, size // 2 - 30, x + 60, size // 2 + 30), fill=(240, 200, 40))  # fmt: skip
            for packet in stream.encode(av.VideoFrame.from_ndarray(numpy.asarray(image), format="rgb24")):  # fmt: skip
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
