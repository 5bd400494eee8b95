"""The ceilings of this machine, measured: what `% of limit` in every table is a percentage of.

The limit of a case is the larger of two times: its useful FLOPs at the matrix rate of their dtype, and its fewest
bytes at copy bandwidth (bytes read plus bytes written). Figures above 100 % are possible and printed as they are:
what fits a cache moves faster than a copy through memory.

On a GPU, CuPy RawKernel probes with plain 16-byte accesses give copy bandwidth, the read bandwidth of the L2, and
gathers of whole rows by row size for a footprint inside and outside the L2; torch.matmul and torch._scaled_mm give the
matrix rates (8192^3, random data: zeros run faster). Without CuPy, torch's own kernels stand in and the notes say so.
Rates are medians on a GPU, which no one else uses, and the best of several on a CPU, which others do use.
`python -m bench roofline` prints all of it; a benchmark run measures only what its limits need.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

GIB = 2**30
ROW_BYTES = (256, 512, 1024, 2048)
FOOTPRINTS = (16 << 20, 256 << 20)
L2_BYTES = 16 << 20  # fits either half of the 50-60 MB L2 of a Hopper

# Every thread has four loads of 16 bytes in flight; count is a multiple of four times the number of threads.
PROBES = r"""
extern "C" __global__ void copy16(const uint4* __restrict__ in, uint4* __restrict__ out, size_t count) {
    size_t stride = (size_t)gridDim.x * blockDim.x, i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < count; i += 4 * stride) {
        uint4 a = in[i], b = in[i + stride], c = in[i + 2 * stride], d = in[i + 3 * stride];
        out[i] = a; out[i + stride] = b; out[i + 2 * stride] = c; out[i + 3 * stride] = d;
    }
}

__device__ unsigned mix(uint4 v) { return v.x ^ v.y ^ v.z ^ v.w; }

// Reads `count` pieces of 16 bytes past the L1, going round and round the first mask + 1 of `in`. The sum is stored
// only if it has one unlikely value: the loads stay.
extern "C" __global__ void read16(const uint4* in, unsigned* sink, size_t count, size_t mask) {
    size_t stride = (size_t)gridDim.x * blockDim.x, i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + 3 * stride < count; i += 4 * stride) {
        uint4 a = __ldcg(in + (i & mask)), b = __ldcg(in + ((i + stride) & mask));
        uint4 c = __ldcg(in + ((i + 2 * stride) & mask)), d = __ldcg(in + ((i + 3 * stride) & mask));
        sum += mix(a) + mix(b) + mix(c) + mix(d);
    }
    if (sum == 0x9e3779b9u) *sink = sum;
}

__device__ uint4 piece(const uint4* in, const int* rows, size_t i, int shift) {
    return in[((size_t)rows[i >> shift] << shift) + (i & (((size_t)1 << shift) - 1))];
}

// Reads the rows rows[0], rows[1], ... of 2^shift pieces each; neighbouring threads read neighbouring pieces.
extern "C" __global__ void gather16(const uint4* __restrict__ in, const int* __restrict__ rows, unsigned* sink,
                                    size_t count, int shift) {
    size_t stride = (size_t)gridDim.x * blockDim.x, i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + 3 * stride < count; i += 4 * stride) {
        uint4 a = piece(in, rows, i, shift), b = piece(in, rows, i + stride, shift);
        uint4 c = piece(in, rows, i + 2 * stride, shift), d = piece(in, rows, i + 3 * stride, shift);
        sum += mix(a) + mix(b) + mix(c) + mix(d);
    }
    if (sum == 0x9e3779b9u) *sink = sum;
}
"""


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device.

    Attributes:
        copy: bytes/s of a copy through memory, read plus written.
        flops: FLOP/s of a large matrix product by dtype ("bf16", "fp8", "fp32").
        details: further rates in bytes/s, by what they are.
        notes: what stood in for what.
    """

    copy: float
    flops: dict[str, float]
    details: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def limit_us(self, flops: float, bytes: float, dtype: str) -> tuple[float, str]:
        """The shortest time the work can take, and what bounds it ("flops" or "bytes")."""
        compute = flops / self.flops[dtype] * 1e6
        memory = bytes / self.copy * 1e6
        return (compute, "flops") if compute > memory else (memory, "bytes")


def measure(device: torch.device, full: bool = False) -> Ceilings:
    """Measures what the limits need; with `full`, L2 and gather bandwidth too."""
    return _measure_cuda(device, full) if device.type == "cuda" else _measure_cpu()


def _measure_cpu() -> Ceilings:
    source = torch.rand(GIB // 16)  # 256 MiB
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))
    fp32, bf16 = _matmul_cpu(torch.float32, 2048), _matmul_cpu(torch.bfloat16, 256)
    if bf16 > fp32 / 4:  # units for bf16 (AMX, AVX512-BF16): a product large enough to fill them
        bf16 = _matmul_cpu(torch.bfloat16, 2048)
    notes = ["fp8 is held against the faster of bf16 and fp32: a CPU has no FP8 units"]
    if bf16 < fp32:
        rate = f"{bf16 / 1e9:,.1f} GFLOPS"
        notes.append(f"bf16 is held against fp32: torch's own bf16 product reaches {rate} here")
    best = max(bf16, fp32)
    return Ceilings(copy, {"fp32": fp32, "bf16": best, "fp8": best}, notes=tuple(notes))


def _matmul_cpu(dtype: torch.dtype, n: int) -> float:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2.0 * n**3 / _best_seconds(lambda: a @ b)


def _best_seconds(call: Callable[[], object], least: int = 5, patience: float = 0.5) -> float:
    call()
    times: list[float] = []
    while len(times) < least or sum(times) < patience:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _measure_cuda(device: torch.device, full: bool) -> Ceilings:
    if device.index is not None:
        torch.cuda.set_device(device)
    notes: list[str] = []
    flops = _matrix_rates(device, notes)
    copy = _copy_rate(device)
    try:
        import cupy

        probed, details = _probe_cupy(cupy, full)
        details = {"copy, torch": copy, "copy, 16-byte loads and stores": probed} | details
        copy = max(copy, probed)
    except Exception as error:  # not installed, or its compiler does not know this device
        notes.append(f"torch's kernels instead of CuPy's probes ({type(error).__name__}: {error})")
        details = _probe_torch(device) if full else {}
    return Ceilings(copy, flops, details, tuple(notes))


def _copy_rate(device: torch.device) -> float:
    source = torch.rand(GIB // 4, device=device)
    target = torch.empty_like(source)
    return 2 * GIB / _median_seconds(lambda: target.copy_(source))


def _matrix_rates(device: torch.device, notes: list[str]) -> dict[str, float]:
    n = 8192
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    work = 2.0 * n**3
    flops = {
        "fp32": work / _median_seconds(lambda: a @ b, 5),
        "bf16": work / _median_seconds(lambda: a16 @ b16),
    }
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        flops["fp8"] = work / _median_seconds(
            lambda: torch._scaled_mm(
                a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        )
    except (RuntimeError, TypeError, ValueError) as error:
        notes.append(f"fp8 is held against bf16: torch._scaled_mm does not run here ({error})")
        flops["fp8"] = flops["bf16"]
    return flops


def _median_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def _probe_cupy(cupy: Any, full: bool) -> tuple[float, dict[str, float]]:
    """Copy bandwidth and details through RawKernels; CuPy and torch both use the device's default stream."""
    import numpy

    device = torch.cuda.current_device()
    blocks = torch.cuda.get_device_properties(device).multi_processor_count * 32
    size = GIB - GIB % (4 * 16 * 256 * blocks)  # whole turns of every thread
    pieces = numpy.uint64(size // 16)
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=PROBES)

        def seconds(name: str, *args: Any) -> float:
            kernel = module.get_function(name)
            return _median_seconds(lambda: kernel((blocks,), (256,), args))

        source = cupy.arange(GIB // 4, dtype=cupy.uint32)
        target, sink = cupy.empty_like(source), cupy.zeros(1, dtype=cupy.uint32)
        copy = 2 * size / seconds("copy16", source, target, pieces)
        details: dict[str, float] = {}
        if full:
            mask = numpy.uint64(L2_BYTES // 16 - 1)
            details[_l2()] = size / seconds("read16", source, sink, pieces, mask)
            for footprint, row in itertools.product(FOOTPRINTS, ROW_BYTES):
                rows = cupy.asarray(_random_rows(row, footprint).numpy())
                shift = numpy.int32((row // 16).bit_length() - 1)
                details[_gather(row, footprint)] = size / seconds(
                    "gather16", source, rows, sink, pieces, shift
                )
        torch.cuda.synchronize()
        del source, target
        cupy.get_default_memory_pool().free_all_blocks()
    return copy, details


def _probe_torch(device: torch.device) -> dict[str, float]:
    """The details through torch's sum and index_select; the latter writes the rows too, and both ways count."""
    source = torch.rand(max(FOOTPRINTS) // 4, device=device)
    target = torch.empty(GIB // 4, device=device)
    details = {_l2(): L2_BYTES / _median_seconds(source[: L2_BYTES // 4].sum)}
    for footprint, row in itertools.product(FOOTPRINTS, ROW_BYTES):
        table, out = source[: footprint // 4].view(-1, row // 4), target.view(-1, row // 4)
        rows = _random_rows(row, footprint).to(device)
        select = functools.partial(torch.index_select, table, 0, rows, out=out)
        details[_gather(row, footprint)] = 2 * GIB / _median_seconds(select)
    return details


def _l2() -> str:
    return f"L2 read, {L2_BYTES >> 20} MiB"


def _random_rows(row_bytes: int, footprint: int) -> torch.Tensor:
    return torch.randint(footprint // row_bytes, (GIB // row_bytes,), dtype=torch.int32)


def _gather(row_bytes: int, footprint: int) -> str:
    return f"gather rows of {row_bytes} B, {footprint >> 20} MiB"
