"""Multiprocessors that are not free: a kernel on a stream of its own holds them."""

import functools

import numpy
import pytest
import torch

SOURCE = r"""
extern "C" __global__ void hold(volatile int* is_held, long long cycles) {
    if (threadIdx.x == 0) is_held[blockIdx.x] = 1;
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
    """Returns when `count` multiprocessors (of the 132 of an H200) have no shared memory to give, for about 3 ms."""
    kernel, stream = hold_kernel()
    torch.cuda.synchronize()  # what was held before is free, and nothing is in the way
    is_held = torch.zeros(count, dtype=torch.int32, pin_memory=True)
    with stream:
        arguments = (numpy.uint64(is_held.data_ptr()), numpy.int64(CYCLES))
        kernel((count,), (32,), arguments, shared_mem=SHARED_BYTES)
    while not is_held.all():
        pass
