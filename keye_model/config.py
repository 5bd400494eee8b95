"""Configuration: dataclasses that read and write the published flat config.json.

The text decoder's keys lie at the top level, the ViT's in `vision_config`, the indexer's in `sa_config`, the M-RoPE
sections in `rope_scaling`. Keys that are not known here are kept and written back. A plain Qwen3-MoE config.json reads as
a decoder without ViT and indexer. Defaults are Keye-VL-2.0-30B-A3B's.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "config.json"


@dataclass
class VisionConfig:
    """The ViT: SigLIP-so400m at native resolution."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384  # of the learned positions: (image_size // patch_size)^2 of them
    patch_size: int = 14
    spatial_merge_size: int = 2
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Learned positions along one side."""
        return self.image_size // self.patch_size


@dataclass
class IndexerConfig:
    """The lightning indexer of every decoder layer (`sa_config`)."""

    indexer_num_heads: int = 16
    indexer_head_dim: int = 64
    topk: int = 2048
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class KeyeConfig:
    """The whole network. `vision` and `indexer` are None where a checkpoint has none."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 48
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int = 128
    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e7
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_scaling: dict[str, Any] | None = field(
        default_factory=lambda: {"rope_type": "default", "mrope_section": [16, 24, 24]}
    )
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    eos_token_id: int | list[int] | None = 151645
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    indexer: IndexerConfig | None = field(default_factory=IndexerConfig)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KeyeConfig:
        """Reads the contents of a config.json, this model's or a Qwen3-MoE's."""
        values = dict(values)
        vision, indexer = values.pop("vision_config", None), values.pop("sa_config", None)
        rope = values.pop("rope_parameters", None) or {}  # where transformers 5 writes it
        if "rope_theta" in rope:
            values.setdefault("rope_theta", rope["rope_theta"])
        values.setdefault("rope_scaling", None)
        if "num_local_experts" in values:  # transformers 5
            values.setdefault("num_experts", values.pop("num_local_experts"))
        config = _from_dict(cls, values)
        config.vision = None if vision is None else _from_dict(VisionConfig, vision)
        config.indexer = None if indexer is None else _from_dict(IndexerConfig, indexer)
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json, in the published form."""
        values = _to_dict(self)
        for key, part in (("vision_config", self.vision), ("sa_config", self.indexer)):
            if part is not None:
                values[key] = _to_dict(part)
        values.setdefault("model_type", "KeyeVL2")
        values.setdefault("architectures", ["KeyeVL2MoeForConditionalGeneration"])
        return values

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> KeyeConfig:
        path = Path(directory) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: a checkpoint directory holds a {FILE}")
        return cls.from_dict(json.loads(path.read_text()))

    def save_pretrained(self, directory: str | Path) -> None:
        (Path(directory) / FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def check(self) -> None:
        """Raises ValueError for sizes that do not fit together."""
        half, section = self.head_dim // 2, self.mrope_section
        kind = (self.rope_scaling or {}).get("rope_type", "default")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        rules = {
            f"num_attention_heads {heads}: expected a multiple of num_key_value_heads {groups}": heads % groups == 0,
            f"num_experts_per_tok {self.num_experts_per_tok}: expected at most num_experts {self.num_experts}":
                self.num_experts_per_tok <= self.num_experts,
            f"mrope_section {section}: expected a sum of head_dim / 2 = {half}": not section or sum(section) == half,
            f"rope_scaling: expected rope_type default or mrope, got {kind}": kind in ("default", "mrope"),
        }  # fmt: skip
        for message, holds in rules.items():
            if not holds:
                raise ValueError(message)

    @property
    def mrope_section(self) -> tuple[int, ...]:
        """How many of the head_dim / 2 frequencies turn with the t, h and w position; () for plain RoPE."""
        return tuple((self.rope_scaling or {}).get("mrope_section", ()))

    @property
    def mrope_interleaved(self) -> bool:
        return bool((self.rope_scaling or {}).get("mrope_interleaved", False))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(ids or ())


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)} - {"vision", "indexer", "extra"}
    given = {key: value for key, value in values.items() if key in known}
    return cls(**given, extra={key: value for key, value in values.items() if key not in known})


def _to_dict(config: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(config) if f.name not in ("vision", "indexer", "extra")]  # fmt: skip
    return {name: getattr(config, name) for name in names} | config.extra
