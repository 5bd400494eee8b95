"""DeepSeek Sparse Attention for GQA models: CUDA, TileLang, Triton and C++ kernels as torch ops.

Every public function below calls `torch.ops.dsa_kernels.<name>`; its docstring is its contract.
"""

from . import native

native.load_cpu_library()

from .dispatch import explain, registered_ops, use  # noqa: E402
from .indexer_prepare import IndexerNorms, indexer_prepare  # noqa: E402
from .native import build_info  # noqa: E402
from .paged_cache import (  # noqa: E402
    read_index_cache,
    read_kv_cache,
    token_slots,
    write_index_cache,
    write_kv_cache,
)
from .topk_select import topk_select  # noqa: E402

__all__ = [
    "IndexerNorms",
    "build_info",
    "explain",
    "indexer_prepare",
    "read_index_cache",
    "read_kv_cache",
    "registered_ops",
    "token_slots",
    "topk_select",
    "use",
    "write_index_cache",
    "write_kv_cache",
]
