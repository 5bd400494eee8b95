"""How one call is timed and its memory read, on each kind of device.

`CpuClock` reads the host clock; its memory figure is the kernel's high-water mark of resident memory over the call
(Linux: the free heap is given back first, then the mark is reset), so it covers torch's allocations and those of C++
alike. `CudaClock` records an event on either side of the call after it has overwritten the L2 with other data; the
overwriting also keeps the GPU busy while the host issues the call, so that a call of a few launches shows no gaps.
Short calls are captured into CUDA graphs: their replays leave the host out altogether. A call that cannot be captured
(it reads device data on the host, or allocates outside torch) stays with plain events, and the result says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 2.0**20
FLUSH_BYTES = 256 << 20  # at least four times the L2 of an H200 (60 MB), 80 us of writing
STATUS = Path("/proc/self/status")

Call = Callable[[], Any]


class CpuClock:
    """perf_counter around a call."""

    how = "host clock"
    input_bytes = 1.0 * 2**30  # all input sets of a case together

    def time(self, call: Call) -> float:
        """Microseconds of one call; its result is freed after the clock stops."""
        start = time.perf_counter()
        result = call()
        stop = time.perf_counter()
        del result
        return (stop - start) * 1e6

    def peak_mib(self, call: Call) -> float | None:
        """MiB that a call needs at its peak over what was there before; None where the system does not tell."""
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_kib("VmRSS")
            call()
            return max(_status_kib("VmHWM") - before, 0.0) / 1024
        except (OSError, AttributeError, KeyError):  # not Linux with glibc, or a sandbox without it
            return None

    def capture(self, calls: list[Call]) -> list[Call] | None:
        return None

    def clear(self) -> None:
        gc.collect()


class CudaClock:
    """CUDA events around a call or its graph, with a cold L2."""

    how = "events"

    def __init__(self, device: torch.device) -> None:
        if device.index is not None:
            torch.cuda.set_device(device)
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(FLUSH_BYTES, 4 * cache), dtype=torch.uint8, device=device)

    @property
    def input_bytes(self) -> float:
        return torch.cuda.mem_get_info(self.device)[0] / 8

    def time(self, call: Call) -> float:
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        result = call()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop) * 1e3

    def peak_mib(self, call: Call) -> float | None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        torch.cuda.synchronize(self.device)
        del result
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB

    def capture(self, calls: list[Call]) -> list[Call] | None:
        """Replays of one graph per call, or None if the calls cannot be captured."""
        stream = torch.cuda.current_stream(self.device)
        pool = torch.cuda.graph_pool_handle()
        try:
            with _sync_is_an_error():  # a cheaper way to find out than a failed capture
                calls[0]()
            replays: list[Call] = []
            for call in calls:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    call()
                replays.append(graph.replay)
            for replay in replays:
                replay()
            torch.cuda.synchronize(self.device)
            return replays
        except Exception:  # whatever a peer does inside a capture: the plain call still works
            torch.cuda.set_stream(stream)
            self._clean_up(pool)
            return None

    def _clean_up(self, pool: tuple[int, int]) -> None:
        """A capture whose end fails leaves the allocator and the random generator in their capturing state: closes the
        pool, and makes one more capture, which ends well."""
        torch.cuda.synchronize(self.device)
        with contextlib.suppress(
            RuntimeError
        ):  # the failure came before a capture: nothing is open
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            self.flush[:16].zero_()

    def clear(self) -> None:
        torch.compiler.reset()  # a compiled peer specialises on each case's shape
        gc.collect()
        torch.cuda.empty_cache()


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def _status_kib(key: str) -> float:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return float(lines[key].split()[0])


@contextlib.contextmanager
def _sync_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(before)
