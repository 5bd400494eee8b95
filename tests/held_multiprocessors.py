"""Multiprocessors that are not free: a kernel on a stream of its own holds them."""

import functools

import numpy
import pytest

SOURCE = r"""
extern "C" __global__ void hold(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {
    }
}
"""
SHARED_BYTES = 220 << 10  # of a block, so that next to nothing fits beside it
CYCLES = 6_000_000  # about 3 ms


@functools.cache
def hold_kernel():
    cupy = pytest.importorskip("cupy")
    kernel = cupy.RawKernel(SOURCE, "hold")
    kernel.max_dynamic_shared_size_bytes = SHARED_BYTES
    return kernel, cupy.cuda.Stream(non_blocking=True)


def hold_multiprocessors(count):
    """For about 3 ms from now on, `count` multiprocessors (of the 132 of an H200) have no shared memory to give."""
    kernel, stream = hold_kernel()
    with stream:
        kernel((count,), (32,), (numpy.int64(CYCLES),), shared_mem=SHARED_BYTES)
