"""What a benchmark is: inputs, our op, its peers, the work it cannot avoid.

bench/<op>.py holds `cases(device)`, a list of `Case`; bench/__main__.py times them for the tables and JSON lines, and
pytest times the same ones under pytest-benchmark.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class Unavailable(Exception):
    """Raised by a peer that cannot run here (not installed, unsupported shape or device); prints as n/a."""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark table.

    Attributes:
        name: the shape in the field's terms, e.g. "2048 x 131072, 16 x 64".
        inputs: makes fresh random inputs on the device; called several times, so that timed calls rotate over them.
        ours: the op, called as ours(*inputs()).
        peers: name -> function of the same inputs. A peer may raise Unavailable.
        verify: verify(output of ours, inputs) raises AssertionError if the output is wrong. No speed is printed then.
        flops: multiply-adds x 2 the contract needs (useful work, not what a kernel issues); 0 if it is all bytes.
        bytes: the fewest bytes to move through memory (each input read once, each output written once).
        dtype: which matrix ceiling `flops` is held against ("bf16", "fp8", "fp32").
        quick: part of `--quick`, which is what `make bench` runs on a CPU.
        context: the x of the plots (context length, tokens), None if the case is in no plot.
        series: cases of one op with the same series form one line of a plot.
    """

    name: str
    inputs: Callable[[], tuple[Any, ...]]
    ours: Callable[..., Any]
    verify: Callable[[Any, tuple[Any, ...]], None]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "bf16"
    quick: bool = False
    context: int | None = None
    series: str = ""


Cases = Callable[[torch.device], list[Case]]


def discover() -> dict[str, Cases]:
    """`cases` of every module of this folder that defines them, by the module's name, sorted."""
    found: dict[str, Cases] = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name.startswith(("_", "conftest", "test_")):
            continue
        module = importlib.import_module(f"{__package__}.{info.name}")
        if hasattr(module, "cases"):
            found[info.name] = module.cases
    return dict(sorted(found.items()))
