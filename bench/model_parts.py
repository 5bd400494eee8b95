"""python -m bench.model_parts [--device cpu|cuda] [--case TEXT] [--json FILE]

Where the time of the whole network goes: kernel time by part of prefills and of a decode step, peak memory, the largest
context, and a 64-frame video from pixels to tokens. Kernel times are the profiler's, so they leave out gaps; the wall
time beside them does not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from keye_model import Engine, Prompt, SamplingParams

from . import report
from .model import Decoding, cache_of, full_config, network, prefill

# (what a kernel's name holds, the part it belongs to); the first that fits counts.
PARTS = (
    ("mul_sum", "projections"),  # a compiled product of one token
    ("indexer_prepare", "indexer: prologue"), ("indexer", "indexer: scores and selection"), ("topk", "indexer: scores and selection"),
    ("union", "sparse attention"), ("map_tiles", "sparse attention"), ("sparse", "sparse attention"),
    ("varlen", "dense attention"), ("norm_rope", "norms and RoPE"), ("layer_norm", "norms and RoPE"), ("rms_norm", "norms and RoPE"),
    ("router", "routing"), ("routing", "routing"), ("moe", "experts"), ("grouped", "experts"), ("cache", "paged cache"),
    ("gemm", "projections"), ("nvjet", "projections"), ("cutlass", "projections"), ("cublas", "projections"), ("mm", "projections"),
)  # fmt: skip


def part_of(kernel: str) -> str:
    return next((part for piece, part in PARTS if piece in kernel.lower()), "elementwise and other")


def measure(call: Callable[[], Any], device: torch.device, *, warm: bool = False) -> dict[str, Any]:
    """Wall milliseconds (under the profiler) and milliseconds by part of a second call, peak GiB over what was there
    before both; of one call alone if everything is `warm`."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    if not warm:
        call()
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall = (time.perf_counter() - start) * 1e3
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**30 if on_gpu else None
    parts: dict[str, float] = {}
    for event in trace.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts[part_of(event.key)] = parts.get(part_of(event.key), 0.0) + spent / 1e3
    return {"wall_ms": wall, "peak_gib": peak, "parts_ms": parts}


def prefill_column(tokens: int, device: torch.device) -> dict[str, Any]:
    network(device)  # its memory is no part of a prefill's
    ids = torch.randint(0, full_config(device).vocab_size - 2, (tokens,), device=device)
    cache_of.cache_clear()
    return measure(lambda: prefill(ids), device, warm=tokens > 131072)


def decode_column(batch: int, context: int, device: torch.device) -> dict[str, Any]:
    cache_of.cache_clear()
    return measure(Decoding(device, batch, context, dense=False), device)


def video_column(device: torch.device, *, answer: bool, chunk: int | None, frames: int = 64) -> dict[str, Any]:  # fmt: skip
    """A video of random frames of 256 tokens: through ViT and projector, or to its first answer."""
    cache_of.cache_clear()
    model = network(device)
    grids = [(1, 32, 32)] * frames
    pixels = torch.randn(frames * 1024, 3, 14, 14, device=device)
    config = model.config
    ids = torch.tensor([1, *[config.video_token_id] * (frames * 256), 2])
    engine = Engine(model, len(ids) // 64 + 2)
    prompt, params = Prompt(ids, None, pixels, grids), SamplingParams(max_new_tokens=16, ignore_eos=True)  # fmt: skip

    @torch.no_grad()
    def encode() -> Any:
        return model.encode(pixels, grids, chunk=chunk)

    return measure((lambda: engine.generate([prompt], params)) if answer else encode, device)


def columns(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    on_gpu = device.type == "cuda"
    sizes = (8192, 32768, 131072, 262144) if on_gpu else (2304,)
    decodes = ((1, 131072), (8, 32768)) if on_gpu else ((1, 4096),)
    found = {f"prefill {n}": partial(prefill_column, n, device) for n in sizes}
    found |= {f"decode {b} x {n}": partial(decode_column, b, n, device) for b, n in decodes}
    if full_config(device).vision is not None:
        found["ViT, one pass"] = partial(video_column, device, answer=False, chunk=None)
        found["ViT, chunks of 8192"] = partial(video_column, device, answer=False, chunk=8192)
        found["video and 16 tokens"] = partial(video_column, device, answer=True, chunk=None)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model_parts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", default="", metavar="TEXT", help="only columns that hold this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line per column")
    args = parser.parse_args(argv)
    device, console = torch.empty(0, device=args.device).device, Console(width=160)
    results = {name: run() for name, run in columns(device).items() if args.case in name}
    where = report.environment(device)
    lines = [{**where, "op": "model_parts", "case": k, **v} for k, v in results.items()]
    header, rows, _ = report.table(lines)
    table = Table(title="milliseconds by part", title_justify="left")
    for k, name in enumerate(header):
        table.add_column(name, justify="right" if k else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if args.json is not None:
        with args.json.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
