"""python -m bench [op ...] [--device cpu|cuda] [--quick] [--case TEXT] [--seconds S] [--json FILE] [--plot DIR]

Measures every case of the ops (bench/<op>.py) on one device and prints a table per op; `python -m bench roofline`
prints the machine's ceilings instead. Exits with 1 if one of our outputs was wrong or one of our calls failed.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import report, roofline
from .case import Case, discover
from .clock import clock_for
from .report import Line
from .timing import Result, measure

SECONDS = {
    "cpu": 10.0,
    "cuda": 3.0,
}  # of timing for one case; the rest of its time goes into checking it
QUICK_SECONDS = 4.0  # the same with --quick,
QUICK_RUN_SECONDS = 300.0  # or less, so that a whole quick run ends within 8 minutes on two cores


def main(argv: list[str] | None = None) -> int:
    found = discover()
    args = parse(argv, list(found))
    device = torch.device(args.device)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if args.ops == ["roofline"]:
        print_ceilings(console, device)
        return 0
    cases = {op: make(device) for op, make in found.items() if op in (args.ops or found)}
    if args.quick:
        cases = {op: [case for case in rows if case.quick] for op, rows in cases.items()}
    if args.case:
        cases = {
            op: [case for case in rows if args.case in case.name] for op, rows in cases.items()
        }
    where = report.environment(device)
    console.print(", ".join(f"{key} {value}" for key, value in where.items() if value))
    ceilings = roofline.measure(device)
    for text in ceilings_summary(ceilings):
        console.print(escape(text), style="dim")
    count = sum(map(len, cases.values()))
    seconds = args.seconds or SECONDS[device.type]
    if args.quick and not args.seconds:
        seconds = min(QUICK_SECONDS, QUICK_RUN_SECONDS / max(count, 1))
    lines, problems = run(console, cases, device, seconds, ceilings, where, args.json)
    for op, rows in cases.items():
        if rows:
            print_table(console, op, [entry for entry in lines if entry["op"] == op])
    if args.plot:
        from .plot import plot

        for path in plot(lines, args.plot):
            console.print(f"plot: {path}")
    for problem in problems:
        console.print(f"[bold red]no speed:[/] {escape(problem)}")
    return 1 if problems else 0


def parse(argv: list[str] | None, ops: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Microbenchmarks.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"roofline, or {', '.join(ops)}")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, help=f"cpu, cuda, cuda:1 ... (here: {best})")
    parser.add_argument("--quick", action="store_true", help="quick cases only, in minutes")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name holds this")
    parser.add_argument("--seconds", type=float, help="of timing for one case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line per case")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write one PNG per op")
    args = parser.parse_args(argv)
    unknown = [op for op in args.ops if op not in ops and args.ops != ["roofline"]]
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch {torch.__version__} sees no CUDA device")
    if unknown:
        parser.error(f"unknown op {', '.join(unknown)}; there are roofline, {', '.join(ops)}")
    return args


def run(
    console: Console,
    cases: dict[str, list[Case]],
    device: torch.device,
    seconds: float,
    ceilings: roofline.Ceilings,
    where: Line,
    json_file: Path | None,
) -> tuple[list[Line], list[str]]:
    """Measures all cases under a progress bar; returns their lines and what was wrong with ours."""
    clock = clock_for(device)
    lines: list[Line] = []
    problems: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, cases.values())))
        for op, rows in cases.items():
            for case in rows:
                progress.update(task, description=escape(f"{op} {case.name}"))
                torch.manual_seed(zlib.crc32(f"{op} {case.name}".encode()))
                result: Result = measure(case, clock, seconds)
                if result.problem:
                    problems.append(f"{op} {case.name} ({result.implementation}): {result.problem}")
                else:
                    lines.append(report.line(op, case, result, ceilings, where))
                    append(json_file, lines[-1])
                clock.clear()
                progress.advance(task)
    return lines, problems


def append(path: Path | None, entry: Line) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def print_table(console: Console, op: str, lines: list[Line]) -> None:
    header, rows, notes = report.table(lines)
    table = Table(title=op, title_justify="left", title_style="bold")
    for k, name in enumerate(header):
        table.add_column(escape(name), justify="left" if k < 2 else "right", no_wrap=k == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table)  # a narrow terminal wraps its lines; rich would cut digits off
    for note in notes:
        console.print(escape(note), style="dim")
    console.print()


def ceilings_summary(ceilings: roofline.Ceilings) -> list[str]:
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOPS" for name, rate in ceilings.flops.items())
    return [f"ceilings: copy {ceilings.copy / 1e9:,.0f} GB/s, {rates}", *ceilings.notes]


def print_ceilings(console: Console, device: torch.device) -> None:
    ceilings = roofline.measure(device, full=True)
    table = Table(title=str(report.environment(device)["device"]), title_justify="left")
    table.add_column("ceiling")
    table.add_column("measured", justify="right")
    table.add_row("copy, read + written", f"{ceilings.copy / 1e9:,.0f} GB/s")
    for name, rate in ceilings.flops.items():
        table.add_row(f"matrix product, {name}", f"{rate / 1e12:.3g} TFLOPS")
    for name, rate in ceilings.details.items():
        table.add_row(name, f"{rate / 1e9:,.0f} GB/s")
    console.print(table)
    for note in ceilings.notes:
        console.print(escape(note), style="dim")


if __name__ == "__main__":
    raise SystemExit(main())
