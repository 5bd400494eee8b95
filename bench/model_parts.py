"""python -m bench.model_parts [--device cpu|cuda] [--json FILE]

Where the time of the whole network goes: kernel time by part of prefills and of a decode step, peak memory, the largest
context, and a 64-frame video from pixels to tokens. Kernel times are the profiler's, so they leave out gaps; the wall
time beside them does not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
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


def video(device: torch.device, frames: int = 64) -> dict[str, dict[str, Any]]:
    """A video of random frames of 256 tokens: through ViT and projector whole and in chunks, and to its first answer."""
    model = network(device)
    grids = [(1, 32, 32)] * frames
    pixels = torch.randn(frames * 1024, 3, 14, 14, device=device)
    config = model.config
    ids = torch.tensor([1, *[config.video_token_id] * (frames * 256), 2])
    engine = Engine(model, len(ids) // 64 + 2)

    @torch.no_grad()
    def encode(chunk: int | None) -> Any:
        return model.encode(pixels, grids, chunk=chunk)

    def answer() -> Any:
        prompt = Prompt(ids, None, pixels, grids)
        return engine.generate([prompt], SamplingParams(max_new_tokens=16, ignore_eos=True))

    return {
        "ViT, one pass": measure(lambda: encode(None), device),
        "ViT, chunks of 8192": measure(lambda: encode(8192), device),
        "video and 16 tokens": measure(answer, device),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model_parts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line per column")
    args = parser.parse_args(argv)
    device, console = torch.empty(0, device=args.device).device, Console(width=160)
    sizes = (8192, 32768, 131072, 262144) if device.type == "cuda" else (2304,)
    decodes = ((1, 131072), (8, 32768)) if device.type == "cuda" else ((1, 4096),)
    vocabulary = full_config(device).vocab_size - 2
    results: dict[str, dict[str, Any]] = {}
    network(device)  # its memory is no part of a prefill's
    for tokens in sizes:
        ids = torch.randint(0, vocabulary, (tokens,), device=device)
        cache_of.cache_clear()
        results[f"prefill {tokens}"] = measure(
            lambda ids=ids: prefill(ids), device, warm=tokens > 131072
        )  # type: ignore[misc]
    for batch, context in decodes:
        cache_of.cache_clear()
        step = Decoding(device, batch, context, dense=False)
        results[f"decode {batch} x {context}"] = measure(step, device)
    cache_of.cache_clear()
    if full_config(device).vision is not None:
        results |= video(device)
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
