"""DeepSeek Sparse Attention for GQA models: CUDA, TileLang, Triton and C++ kernels as torch ops.

Every public function below calls `torch.ops.dsa_kernels.<name>`; its docstring is its contract.
"""

from . import native

native.load_cpu_library()

from .dispatch import explain, registered_ops, use  # noqa: E402
from .grouped_gemm import (  # noqa: E402
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_wgrad,
    quantize_blocks,
    quantize_rows,
)
from .indexer_logits import indexer_logits, indexer_logits_paged  # noqa: E402
from .indexer_loss import AttentionTarget, indexer_loss  # noqa: E402
from .indexer_prepare import IndexerNorms, indexer_prepare  # noqa: E402
from .indexer_topk import indexer_topk, indexer_topk_paged  # noqa: E402
from .moe_mlp import experts, moe_mlp  # noqa: E402
from .moe_router import RoutingMap, load_balancing_loss, moe_router, routing_map  # noqa: E402
from .native import build_info  # noqa: E402
from .norm_rope import norm_rope  # noqa: E402
from .paged_cache import (  # noqa: E402
    read_index_cache,
    read_kv_cache,
    token_slots,
    write_index_cache,
    write_kv_cache,
)
from .sparse_attention import sparse_attention  # noqa: E402
from .sparse_decode import sparse_decode  # noqa: E402
from .topk_select import topk_select  # noqa: E402
from .varlen_attention import varlen_attention  # noqa: E402

__all__ = [
    "AttentionTarget",
    "IndexerNorms",
    "RoutingMap",
    "build_info",
    "experts",
    "explain",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "grouped_gemm_wgrad",
    "indexer_logits",
    "indexer_logits_paged",
    "indexer_loss",
    "indexer_prepare",
    "indexer_topk",
    "indexer_topk_paged",
    "load_balancing_loss",
    "moe_mlp",
    "moe_router",
    "norm_rope",
    "quantize_blocks",
    "quantize_rows",
    "read_index_cache",
    "read_kv_cache",
    "registered_ops",
    "routing_map",
    "sparse_attention",
    "sparse_decode",
    "token_slots",
    "topk_select",
    "use",
    "varlen_attention",
    "write_index_cache",
    "write_kv_cache",
]
