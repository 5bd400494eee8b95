"""keye_model: the Keye-VL-2.0-30B-A3B network on `dsa_kernels`, its checkpoints and an inference engine."""

from .cache import PagedCache, bytes_per_token
from .config import IndexerConfig, KeyeConfig, VisionConfig
from .engine import Engine
from .model import KeyeVL
from .requests import Completion, Delta, Prompt
from .sampling import SamplingParams
from .weights import from_pretrained, import_qwen3_moe, save_pretrained

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "IndexerConfig",
    "KeyeConfig",
    "KeyeVL",
    "PagedCache",
    "Prompt",
    "SamplingParams",
    "VisionConfig",
    "bytes_per_token",
    "from_pretrained",
    "import_qwen3_moe",
    "save_pretrained",
]
