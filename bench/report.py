"""What is kept of a benchmark run, and the tables made from it.

A run appends one JSON line per case: where and when it was measured (commit, device, driver, versions), what (op,
case, work), and how fast (median, limit, peak memory, every peer's median of the same run). The tables on the screen,
those in the README and the plots are all made from such lines.

    python -m bench.report bench/results/h200.jsonl                     prints the Markdown tables
    python -m bench.report bench/results/h200.jsonl --write README.md   between <!-- bench:h200 --> and <!-- /bench -->;
                                                                        <!-- bench:h200 op op --> holds those ops only
    python -m bench.report bench/results/h200.jsonl --plot DIR          PNG plots

Of several lines of one op and case the last counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .case import Case
from .roofline import Ceilings
from .timing import OURS, Result

ROOT = Path(__file__).parent.parent
Line = dict[str, Any]


def environment(device: torch.device) -> Line:
    """Where a run takes place. DSA_COMMIT names the commit where the tree came without its .git folder."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = device.type == "cuda"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "commit": os.environ.get("DSA_COMMIT") or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "driver": (_output(query) or "unknown").splitlines()[0] if gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def _commit() -> str:
    """The commit, with -dirty if the tree differs from it; kept results and the tables made of them do not count."""
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    changes = _output(["git", "status", "--porcelain", "--", ".", ":!bench/results", ":!README.md"])
    return commit + ("-dirty" if changes else "")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found[1] if found else name
    best = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{name}, {best}, {threads} thread{'s' if threads > 1 else ''}"


def line(op: str, case: Case, result: Result, ceilings: Ceilings, where: Line) -> Line:
    """The JSON line of a measured case."""
    limit, bound = ceilings.limit_us(case.flops, case.bytes, case.dtype)
    return {
        **where,
        "op": op,
        "case": case.name,
        "implementation": result.implementation,
        "median_us": round(result.median_us, 3),
        "samples": result.samples,
        "timing": result.how,
        "flops": case.flops,
        "bytes": case.bytes,
        "dtype": case.dtype,
        "bound": bound,
        "limit_us": round(limit, 3),
        "fraction": round(limit / result.median_us, 6),
        "peak_mib": None if result.peak_mib is None else round(result.peak_mib, 2),
        "peers": {
            name: value if isinstance(value, str) else round(value, 3)
            for name, value in result.peers.items()
        },
        "context": case.context,
        "series": case.series,
    }


def load(path: Path) -> list[Line]:
    """The last line of every op and case, in the order in which the cases first appear."""
    latest: dict[tuple[str, str], Line] = {}
    for text in path.read_text().splitlines():
        if text.strip():
            entry = json.loads(text)
            latest[entry["op"], entry["case"]] = entry
    return list(latest.values())


def by_op(lines: Iterable[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for entry in lines:
        groups.setdefault(entry["op"], []).append(entry)
    return groups


def table(lines: list[Line]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and footnotes of one op's table."""
    if "parts_ms" in lines[0]:
        return parts_table(lines)
    series = list(dict.fromkeys(entry["series"] for entry in lines))
    lines = sorted(lines, key=lambda entry: (series.index(entry["series"]), entry["context"] or 0))
    peers = list(dict.fromkeys(name for entry in lines for name in entry["peers"]))
    header = ["case", "by", "median us", "rate", "% of limit", "peak MiB"]
    header += [f"vs {name}" for name in peers]
    rows, notes = [], []
    uncaptured: dict[str, list[str]] = {}  # peers that were timed otherwise than ours -> where
    for entry in lines:
        row = [entry["case"], entry["implementation"], significant(entry["median_us"])]
        row += [_rate(entry), _percent(entry), _mib(entry["peak_mib"])]
        row += [_speedup(entry, name) for name in peers]
        rows.append(row)
        for name, value in entry["peers"].items():
            if isinstance(value, str) and value != "oom":
                where = "" if value.startswith("n/a") else f" ({entry['case']})"
                notes.append(f"{name}{where}: {value}")
        for name, how in entry["timing"].items():
            if how == "events" and entry["timing"].get(OURS) == "graph":
                uncaptured.setdefault(name, []).append(entry["case"])
    for name, cases in uncaptured.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        notes.append(f"{name}: plain events, no CUDA graph ({where})")
    return header, rows, list(dict.fromkeys(notes))


def parts_table(lines: list[Line]) -> tuple[list[str], list[list[str]], list[str]]:
    """The same for lines of bench/model_parts.py: a column a case, a row a part."""
    rows = []
    for part in dict.fromkeys(part for entry in lines for part in entry["parts_ms"]):
        rows.append([part, *(f"{entry['parts_ms'].get(part, 0.0):,.2f}" for entry in lines)])
    rows.sort(key=lambda row: -max(float(cell.replace(",", "")) for cell in row[1:]))
    kernels = [sum(entry["parts_ms"].values()) for entry in lines]
    rows.append(["kernels together, ms", *(f"{ms:,.2f}" for ms in kernels)])
    rows.append(["wall, ms", *(f"{entry['wall_ms']:,.2f}" for entry in lines)])
    peaks = (entry["peak_gib"] for entry in lines)
    rows.append(["peak over weights, GiB", *("-" if p is None else f"{p:.2f}" for p in peaks)])
    return ["part", *(entry["case"] for entry in lines)], rows, []


def significant(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _rate(entry: Line) -> str:
    seconds = entry["median_us"] / 1e6
    if entry["bound"] == "flops":
        rate = entry["flops"] / seconds / 1e9
        teraflops = rate >= 1e3
        return f"{significant(rate / 1e3)} TFLOPS" if teraflops else f"{significant(rate)} GFLOPS"
    rate = entry["bytes"] / seconds / 1e9
    return f"{significant(rate)} GB/s" if rate else "-"


def _percent(entry: Line) -> str:
    return significant(100 * entry["fraction"]) if entry["limit_us"] else "-"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _speedup(entry: Line, peer: str) -> str:
    value = entry["peers"].get(peer, "-")
    if isinstance(value, str):
        return value.split(":")[0]
    return f"{significant(value / entry['median_us'])}x"


def markdown(lines: list[Line]) -> str:
    """One Markdown table per op, and where and when they were measured."""
    parts = []
    for op, entries in by_op(lines).items():
        header, rows, notes = table(entries)
        left = 1 if header[0] == "part" else 2
        align = ["---"] * left + ["---:"] * (len(header) - left)
        text = "\n".join(_markdown_row(cells) for cells in [header, align, *rows])
        parts.append("\n\n".join([f"**`{op}`**", text, *notes]))
    parts.append("\n".join(_sources(lines)))
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sources(lines: list[Line]) -> list[str]:
    """A sentence per machine and software that took part, with its commits and dates."""
    groups: dict[str, list[Line]] = {}
    for entry in lines:
        driver = f", driver {entry['driver']}" if entry["driver"] else ""
        software = f"torch {entry['torch']}, triton {entry['triton']}, Python {entry['python']}"
        groups.setdefault(f"{entry['device']}{driver}, {software}", []).append(entry)
    sentences = []
    for where, entries in groups.items():
        commits = ", ".join(sorted({entry["commit"] for entry in entries}))
        days = [entry["date"][:10] for entry in entries]
        span = " to ".join(sorted({min(days), max(days)}))
        sentences.append(f"Measured on {where}; {span}; at {commits}.")
    return sentences


def replace_between_markers(text: str, name: str, lines: list[Line]) -> str:
    """`text` with what stands between `<!-- bench:name [op ...] -->` and the next `<!-- /bench -->` replaced by the tables
    of those ops, of all without any."""
    pattern = rf"<!-- bench:{re.escape(name)}((?: \w+)*) -->.*?<!-- /bench -->"
    found = re.search(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError(f"the file holds no <!-- bench:{name} --> ... <!-- /bench -->")
    ops = found[1].split()
    tables = markdown([entry for entry in lines if not ops or entry["op"] in ops])
    start = f"<!-- bench:{name}{found[1]} -->"
    return f"{text[: found.start()]}{start}\n\n{tables.strip()}\n\n<!-- /bench -->{text[found.end() :]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables of a run.")
    parser.add_argument("file", type=Path, help="JSON lines, e.g. bench/results/h200.jsonl")
    parser.add_argument("--write", type=Path, metavar="README", help="replace the marked section")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write one PNG per op")
    args = parser.parse_args(argv)
    lines = load(args.file)
    if args.plot:
        from .plot import plot

        for path in plot(lines, args.plot):
            print(path)
    if args.write:
        text = replace_between_markers(args.write.read_text(), args.file.stem, lines)
        args.write.write_text(text)
    elif not args.plot:
        sys.stdout.write(markdown(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
