"""DeepSeek Sparse Attention for GQA models: CUDA, TileLang, Triton and C++ kernels as torch ops.

Every public function below calls `torch.ops.dsa_kernels.<name>`; its docstring is its contract.
"""

from . import native

native.load_cpu_library()

from .dispatch import explain, registered_ops, use  # noqa: E402
from .native import build_info  # noqa: E402
from .sparse_decode import sparse_decode  # noqa: E402
from .topk_select import topk_select  # noqa: E402
from .varlen_attention import varlen_attention  # noqa: E402

__all__ = [
    "build_info",
    "explain",
    "registered_ops",
    "sparse_decode",
    "topk_select",
    "use",
    "varlen_attention",
]
