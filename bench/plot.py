"""PNG plots of kept results: time against context length, ours with its peers and the limit, one file per op.

Cases of an op that name a `context` take part; each `series` is a panel of its own, with common axes. Both axes are
logarithmic, so a straight line of slope 1 is work linear in the context.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .report import Line, by_op

COLOURS = ("#d1495b", "#2e6f95", "#66a182", "#edae49", "#8d6a9f", "#7a5c45", "#3aa6a6", "#999999")
MARKERS = "osD^vPX*"
LIMIT = "limit of this machine"


def plot(lines: list[Line], folder: Path) -> list[Path]:
    """Writes <op>.png for every op with something to plot; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for op, entries in by_op(lines).items():
        series: dict[str, list[Line]] = {}
        for entry in entries:
            if entry["context"]:
                series.setdefault(entry["series"], []).append(entry)
        if series:
            paths.append(_figure(op, series, folder / f"{op}.png"))
    return paths


def _figure(op: str, series: dict[str, list[Line]], path: Path) -> Path:
    from matplotlib.figure import Figure

    columns = 2 if len(series) == 4 else min(len(series), 3)
    rows = math.ceil(len(series) / columns)
    width, height = max(4.2 * columns, 5.6), 3.6 * rows + 1.3
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    everything = [entry for entries in series.values() for entry in entries]
    peers = _timed_peers(everything)
    for axis, (name, entries) in zip(axes.flat, series.items()):
        _panel(axis, name, sorted(entries, key=lambda entry: entry["context"]), peers)
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("time of one call")
    for column in range(columns):
        axes[_last_row(column, len(series), columns), column].set_xlabel("tokens")
        axes[_last_row(column, len(series), columns), column].tick_params(labelbottom=True)
    found = {}
    for axis in axes.flat:
        found.update(zip(*reversed(axis.get_legend_handles_labels())))
    handles = {name: found[name] for name in ("ours", *peers, LIMIT)}
    contexts = sorted({entry["context"] for entry in everything})
    axes[0, 0].set_xticks(contexts, [_tokens(context) for context in contexts])  # shared
    device = everything[0]["device"]
    figure.suptitle(f"{op}: time against length\n{device}", fontsize=11)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), max(3, 2 * columns)),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)
    return path


def _timed_peers(entries: list[Line]) -> list[str]:
    names = dict.fromkeys(name for entry in entries for name in entry["peers"])
    return [n for n in names if any(isinstance(e["peers"].get(n), (int, float)) for e in entries)]


def _last_row(column: int, panels: int, columns: int) -> int:
    return (panels - 1 - column) // columns


def _panel(axis: Any, title: str, entries: list[Line], peers: list[str]) -> None:
    contexts = [entry["context"] for entry in entries]
    style = {"markersize": 5, "linewidth": 1.4}
    for k, name in enumerate(peers):
        points = [(e["context"], e["peers"].get(name)) for e in entries]
        points = [(x, y / 1e6) for x, y in points if isinstance(y, (int, float))]
        if points:
            colour = COLOURS[1 + k % (len(COLOURS) - 1)]
            axis.plot(*zip(*points), MARKERS[1 + k % 7] + "-", color=colour, label=name, **style)
    times = [entry["median_us"] / 1e6 for entry in entries]
    style["linewidth"] = 2.6
    axis.plot(contexts, times, "o-", color=COLOURS[0], label="ours", zorder=5, **style)
    limits = [entry["limit_us"] / 1e6 for entry in entries]
    axis.plot(contexts, limits, "--", marker="_", color="#555555", linewidth=1.2, label=LIMIT)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.margins(x=0.08)
    axis.yaxis.set_major_formatter(_seconds)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10)


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 and count else str(count)


def _seconds(value: float, _position: object) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size * 0.9999:
            return f"{value / size:g} {unit}"
    return f"{value * 1e6:g} µs"
