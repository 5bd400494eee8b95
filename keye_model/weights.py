"""Checkpoints: the published tensor names and shapes, and nothing else knows them.

Every published tensor is a view into one of our parameters: q, k and v are rows of one matrix, the experts' matrices are
ours transposed, the patch convolution is a reshaped linear. `published_views` lists these views; loading copies into them
and saving copies out of them, so neither holds the model twice.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .config import KeyeConfig, VisionConfig
from .decoder import DecoderLayer
from .model import KeyeVL
from .moe import Experts
from .vision import VisionLayer, VisionTower

Views = dict[str, Tensor]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Tensors of published checkpoints that the network has no use for: SigLIP's pooling head and text tower, the table of
# positions for the mode without interpolation, frequencies that are computed.
IGNORED = re.compile(
    r"(visual\.)?(vision_model\.)?(head\.|embeddings\.(packing_position_embedding|position_ids))"
    r"|text_model\.|logit_(scale|bias)$|.*\.rotary_emb\.inv_freq$"
)


def published_views(model: KeyeVL) -> Views:
    """Name -> view of our parameters in the published shape."""
    views: Views = {
        "model.embed_tokens.weight": model.decoder.embed.weight,
        "model.norm.weight": model.decoder.norm.weight,
    }
    if not model.config.tie_word_embeddings:
        views["lm_head.weight"] = model.lm_head.weight
    for i, layer in enumerate(cast(list[DecoderLayer], model.decoder.layers)):
        views |= prefixed(f"model.layers.{i}.", decoder_layer(layer))
    if model.visual is not None and model.projector is not None:
        assert model.config.vision is not None
        views |= prefixed("visual.vision_model.", vision_tower(model.visual, model.config.vision))
        views |= prefixed("mlp_AR.", {
            **module("pre_norm", model.projector.norm),
            **module("linear_1", model.projector.linear_1),
            **module("linear_2", model.projector.linear_2),
        })  # fmt: skip
    return views


def decoder_layer(layer: DecoderLayer) -> Views:
    attention, mlp = layer.attention, layer.mlp
    experts = cast(Experts, mlp.experts)
    views = {
        **module("input_layernorm", layer.attention_norm),
        **module("post_attention_layernorm", layer.mlp_norm),
        **rows("self_attn.{}_proj.weight", "qkv", attention.qkv.weight, attention.splits),
        "self_attn.o_proj.weight": attention.out.weight,
        "self_attn.q_norm.weight": attention.q_norm,
        "self_attn.k_norm.weight": attention.k_norm,
        "mlp.gate.weight": mlp.router.weight,
        "mlp.experts.gate_up_proj": experts.w13.transpose(1, 2),  # [E, in, out]
        "mlp.experts.down_proj": experts.w2.transpose(1, 2),
    }
    if (indexer := attention.indexer) is not None:
        queries, gates, key = indexer.splits
        names = "self_attn.sa_indexer.{}_proj.weight"
        views |= rows(names, "qk", indexer.proj.weight, (queries + gates, key))
        views["self_attn.sa_indexer.q_norm.weight"] = indexer.q_norm
        views |= module("self_attn.sa_indexer.k_norm", indexer.k_norm)
    return views


def vision_tower(visual: VisionTower, config: VisionConfig) -> Views:
    patch = (config.num_channels, config.patch_size, config.patch_size)
    views = {
        "embeddings.patch_embedding.weight": visual.patch_embedding.weight.unflatten(1, patch),
        "embeddings.patch_embedding.bias": visual.patch_embedding.bias,
        "embeddings.position_embedding.weight": visual.positions,
        **module("post_layernorm", visual.norm),
    }
    for i, layer in enumerate(cast(list[VisionLayer], visual.layers)):
        qkv, thirds = layer.attention.qkv, (config.hidden_size,) * 3
        views |= prefixed(f"encoder.layers.{i}.", {
            **module("layer_norm1", layer.norm1), **module("layer_norm2", layer.norm2),
            **rows("self_attn.{}_proj.weight", "qkv", qkv.weight, thirds),
            **rows("self_attn.{}_proj.bias", "qkv", qkv.bias, thirds),
            **module("self_attn.out_proj", layer.attention.out),
            **module("mlp.fc1", layer.up), **module("mlp.fc2", layer.down),
        })  # fmt: skip
    return views


def prefixed(prefix: str, views: Views) -> Views:
    return {prefix + name: view for name, view in views.items()}


def module(name: str, part: nn.Module) -> Views:
    return {f"{name}.{key}": value for key, value in part.named_parameters(recurse=False)}


def rows(pattern: str, letters: str, matrix: Tensor, sizes: tuple[int, ...]) -> Views:
    return {pattern.format(letter): part for letter, part in zip(letters, matrix.split(sizes))}


def expert_views(views: Views) -> Views:
    """The per-expert form of the fused expert tensors: mlp.experts.{e}.{gate,up,down}_proj.weight [out, in]."""
    separate: Views = {}
    for name, view in views.items():
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for e, expert in enumerate(view.transpose(1, 2)):
                gate, up = expert.chunk(2)
                separate |= {
                    f"{prefix}{e}.gate_proj.weight": gate,
                    f"{prefix}{e}.up_proj.weight": up,
                }
        elif name.endswith(".experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            separate |= {f"{prefix}{e}.down_proj.weight": w for e, w in enumerate(view.transpose(1, 2))}  # fmt: skip
    return separate


def fused_name(name: str) -> str:
    """Of a per-expert tensor, the name of the fused one that holds it."""
    which = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
    return re.sub(r"\.(\d+)\.(gate|up|down)_proj\.weight$", lambda m: f".{which[m[2]]}", name)


def empty_model(config: KeyeConfig, device: torch.device | str, dtype: torch.dtype) -> KeyeVL:
    """The network with uninitialised parameters, allocated once and where they belong."""
    with torch.device("meta"):
        model = KeyeVL(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.decoder.embed.weight
    return model


def from_pretrained(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
) -> KeyeVL:
    """Loads a checkpoint directory: config.json and one or several safetensors files.

    Tensors go one by one from the mapped file to the device, converted to dtype there.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a tensor is missing, surplus, misshapen or truncated; it is named.
    """
    model = empty_model(KeyeConfig.from_pretrained(directory), device, dtype)
    load(published_views(model), directory, progress=progress)
    return model


def import_qwen3_moe(
    directory: str | Path,
    config: KeyeConfig,
    *,
    siglip: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
) -> KeyeVL:
    """Starts from a plain Qwen3-MoE checkpoint, and a SigLIP one for the ViT: how DSA training begins.

    What the checkpoints do not hold (indexer, projector, without `siglip` the ViT) gets random weights.

    Args:
        config: the network to make; its decoder must have the sizes of the checkpoint's.
        siglip: directory of a SigLIP checkpoint, the whole model or its vision part.
    """
    model = empty_model(config, device, dtype)
    model.init_weights()
    views = published_views(model)
    text = {n: v for n, v in views.items() if n.startswith(("model.", "lm_head.")) and "indexer" not in n}  # fmt: skip
    load(text, directory, progress=progress)
    if siglip is not None:
        tower = "visual.vision_model."
        visual = {n.removeprefix(tower): v for n, v in views.items() if n.startswith(tower)}
        load(visual, siglip, prefix="vision_model.", progress=progress)
    return model


@torch.no_grad()
def load(views: Views, directory: str | Path, *, prefix: str = "", progress: bool = True) -> None:
    """Copies every tensor of a checkpoint into its view; see `from_pretrained` for what is an error. Names in the file
    may begin with `prefix`, those of the views do not."""
    separate = expert_views(views)
    missing, surplus, wrong = set(views), [], []
    parts_left = Counter(map(fused_name, separate))
    files = checkpoint_files(Path(directory))
    for path, name, tensor in tqdm(tensors_of(files), total=count(files), unit="tensor", disable=not progress, desc="loading"):  # fmt: skip
        name = name.removeprefix(prefix)
        view = views.get(name, separate.get(name))
        if view is None:
            if not IGNORED.match(name):
                surplus.append(name)
        elif tensor.shape != view.shape:
            wrong.append(
                f"{name}: expected {list(view.shape)}, got {list(tensor.shape)} in {path.name}"
            )
        else:
            view.copy_(tensor.to(view.device))
            whole = name if name in views else fused_name(name)
            parts_left[whole] -= 1
            if name in views or parts_left[whole] == 0:
                missing.discard(whole)
    problems = [f"misshapen: {text}" for text in wrong]
    problems += [f"missing: {name}" for name in sorted(missing)]
    problems += [f"surplus: {name}" for name in sorted(surplus)]
    if problems:
        raise ValueError(f"{directory} does not hold this network:\n  " + "\n  ".join(problems))


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or the only one."""
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [SINGLE]
    files = [directory / name for name in names]
    if absent := [str(path) for path in files if not path.is_file()]:
        raise FileNotFoundError(f"missing checkpoint files: {', '.join(absent)}")
    return files


def count(files: list[Path]) -> int:
    return sum(len(names_in(path)) for path in files)


def names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error


def tensors_of(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                yield path, name, file.get_tensor(name)


@torch.no_grad()
def save_pretrained(model: KeyeVL, directory: str | Path, *, shard_bytes: int = 5 << 30, progress: bool = True) -> None:  # fmt: skip
    """Writes config.json and safetensors files of at most shard_bytes (one tensor at least) in the published names."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    views = published_views(model)
    shards: list[list[str]] = [[]]
    size = 0
    for name, view in views.items():
        if shards[-1] and size + view.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += view.nbytes
    files = [SINGLE] if len(shards) == 1 else [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]  # fmt: skip
    for file, names in zip(tqdm(files, unit="file", disable=not progress, desc="saving"), shards):
        part = {name: views[name].detach().to("cpu", copy=True).contiguous() for name in names}
        save_file(part, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        total = sum(view.nbytes for view in views.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (directory / INDEX).write_text(text + "\n")
