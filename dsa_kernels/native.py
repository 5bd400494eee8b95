"""Loads the compiled libraries: where they are, what they hold, what is absent and why."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parent
CPU_LIBRARY = PACKAGE / "libdsa_kernels_cpu.so"
CUDA_LIBRARY = PACKAGE / "libdsa_kernels_cuda.so"
_RESOURCES = {
    "registers": r"Used (\d+) registers",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
    "shared_bytes": r"(\d+) bytes smem",
}


def load_cpu_library() -> None:
    """Loads the schemas of every op and the C++ kernels. The package does not work without it."""
    if not CPU_LIBRARY.exists():
        raise ImportError(
            f"{CPU_LIBRARY} is missing: install with `make` or `pip install --no-build-isolation .`, "
            "or build in place with `python setup.py build_ext --inplace`"
        )
    torch.ops.load_library(str(CPU_LIBRARY))


@functools.cache
def cuda_library_absent() -> str | None:
    """None if the CUDA library is loaded, else the reason why it is not."""
    if not CUDA_LIBRARY.exists():
        return "the CUDA library was not built (nvcc 12.8 or newer was not found at install time)"
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    torch.ops.load_library(str(CUDA_LIBRARY))
    return None


def has_kernel(library: str, op: str) -> bool:
    """Whether `library` ("cpu" or "cuda") holds a compiled kernel for `op`."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        f"dsa_kernels_{library}::{op}", library.upper()
    )


def build_info() -> dict[str, Any]:
    """What this install contains.

    Returns:
        compiler, nvcc, cuda_archs, cpu_isas (compiled), cpu_isa (chosen here), cuda_library (path or
        the reason why it is absent), and `kernels`: registers, stack, spill and static shared-memory
        bytes of every CUDA kernel as ptxas reported them at build time. No GPU is needed.
    """
    from . import _C  # type: ignore[attr-defined]

    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "cuda_library": cuda_library_absent() or str(CUDA_LIBRARY),
        "kernels": _kernel_resources(_C.ptxas_report(), _C.demangle),
    }


def _kernel_resources(report: str, demangle: Callable[[str], str]) -> list[dict[str, Any]]:
    """One entry per CUDA kernel and architecture, from the text of `ptxas -v`."""
    kernels: list[dict[str, Any]] = []
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            kernels.append({"name": demangle(entry[1]), "arch": entry[2], "shared_bytes": 0})
        elif kernels:
            kernels[-1] |= {
                key: int(found[1])
                for key, pattern in _RESOURCES.items()
                if (found := re.search(pattern, line))
            }
    return kernels
