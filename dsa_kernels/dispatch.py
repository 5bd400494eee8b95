"""One op, several implementations: registration with torch, the choice among them, and `explain`.

A room's door (`dsa_kernels/<room>/__init__.py`) calls `register` once per op with a table, best first. The kernel that
torch then runs for CPU and CUDA tensors checks the arguments and calls the first implementation of the table that does
not decline. Nothing falls back in silence: where all decline, the error lists every reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import native

TIERS = ("cuda", "tilelang", "triton", "cpu", "reference")

_library = torch.library.Library("dsa_kernels", "IMPL")
_ops: dict[str, Op] = {}
_forced: list[tuple[str, ...]] = []
_records: list[list[tuple[str, str]]] = []


@dataclass(frozen=True)
class Implementation:
    """One row of a room's table.

    Attributes:
        tier: one of TIERS. It brings its own rule: device, architecture, library (see `_tier_declines`).
        module: module that holds the function, relative to the room ("reference", "triton"); None for compiled kernels.
        declines: given the op's arguments, the reason not to serve them, or None. Looks at metadata only.
        function: the function's name where it is not the op's.
    """

    tier: str
    module: str | None = None
    declines: Callable[..., str | None] | None = None
    function: str | None = None


# The rows that most tables end with.
TRITON = Implementation("triton", "triton")
CPU = Implementation("cpu")
REFERENCE = Implementation("reference", "reference")


@dataclass(frozen=True)
class Op:
    name: str
    room: str
    check: Callable[..., object]
    table: tuple[Implementation, ...]

    def __call__(self, *args: Any) -> Any:
        """Calls the torch op. Arrays of other libraries (CuPy, NumPy) come in through DLPack without a copy."""
        args = tuple(map(from_dlpack, args))
        try:
            return getattr(torch.ops.dsa_kernels, self.name).default(*args)
        except (RuntimeError, TypeError):  # an argument that the schema cannot take: say which
            self.check(*args)
            raise

    def choose(
        self, args: Sequence[Any]
    ) -> tuple[Implementation | None, list[tuple[Implementation, str]]]:
        """The implementation that serves `args`, and why each one before it declined."""
        rows = self.table
        forced = _forced_tiers()
        if forced:
            rows = tuple(row for tier in forced for row in rows if row.tier == tier)
        device = _device_of(args)
        declined: list[tuple[Implementation, str]] = []
        for row in rows:
            reason = _tier_declines(row.tier, self.name, device, "triton" in forced)
            if reason is None and row.declines is not None:
                reason = row.declines(*args)
            if reason is None:
                return row, declined
            declined.append((row, reason))
        return None, declined

    def run(self, *args: Any) -> Any:
        """The kernel torch runs for CPU and CUDA tensors."""
        self.check(*args)
        row, declined = self.choose(args)
        if row is None:
            raise ValueError(
                f"{self.name}: no implementation serves this call\n" + _reasons(self, declined)
            )
        for record in _records:
            record.append((self.name, row.tier))
        return _function(self.room, row.module, row.function or self.name, row.tier)(*args)


def register(
    name: str,
    *,
    room: str,
    check: Callable[..., object],
    fake: Callable[..., Any],
    table: Sequence[Implementation],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Registers the op `torch.ops.dsa_kernels.<name>`, whose schema stands in csrc/schemas.h.

    Args:
        room: the room's module name (`__name__` of the door).
        check: raises ValueError for bad arguments; runs before every implementation and before `fake`.
        fake: returns empty outputs of the right shape, dtype and device.
        table: the implementations, best first. All have the op's flat positional signature.
        setup_context, backward: autograd, as in `torch.library.register_autograd`.
    """
    op = Op(name, room, check, tuple(table))

    @functools.wraps(fake)
    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, op.run, key)
    torch.library.register_fake(f"dsa_kernels::{name}", checked_fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"dsa_kernels::{name}", backward, setup_context=setup_context, lib=_library
        )
    _ops[name] = op
    return op


def registered_ops() -> dict[str, Op]:
    """Every op of the package by name."""
    return dict(_ops)


def explain(op: str, *args: Any) -> str:
    """Tells which implementation a call takes, and why those before it decline.

    Args:
        op: the op's name, as in `torch.ops.dsa_kernels`.
        *args: the flat positional arguments of its schema; without arguments, the table alone.
    """
    if op not in _ops:
        raise ValueError(f"op: expected one of {', '.join(sorted(_ops))}, got {op!r}")
    entry = _ops[op]
    if not args:
        return f"{op}: " + ", ".join(row.tier for row in entry.table) + " (best first)"
    args = tuple(map(from_dlpack, args))
    entry.check(*args)
    row, declined = entry.choose(args)
    chosen = f"{op}: {row.tier}" if row else f"{op}: no implementation serves this call"
    return "\n".join([chosen, *([_reasons(entry, declined)] if declined else [])])


@contextlib.contextmanager
def use(*tiers: str) -> Iterator[None]:
    """Restricts every op called inside to the given tiers, in order of preference; overrides DSA_IMPL."""
    for tier in tiers:
        if tier not in TIERS:
            raise ValueError(f"tiers: expected names from {', '.join(TIERS)}, got {tier!r}")
    _forced.append(tiers)
    try:
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Yields a list that gains (op, tier) for every call inside; the benchmarks say with it what they measured."""
    record: list[tuple[str, str]] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


def from_dlpack(value: Any) -> Any:
    """A tensor that shares memory with `value` if that is another library's array, else `value`."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    return torch.from_dlpack(value)


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors (TRITON_INTERPRET=1 before the first import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


@functools.cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether a device converts and multiplies e4m3 in hardware (compute capability 8.9 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _forced_tiers() -> tuple[str, ...]:
    if _forced:
        return _forced[-1]
    names = tuple(filter(None, os.environ.get("DSA_IMPL", "").split(",")))
    for name in names:
        if name not in TIERS:
            raise ValueError(f"DSA_IMPL: expected names from {', '.join(TIERS)}, got {name!r}")
    return names


def _device_of(args: Sequence[Any]) -> torch.device:
    return next(a.device for a in args if isinstance(a, torch.Tensor))


@functools.cache
def _tier_declines(tier: str, op: str, device: torch.device, triton_forced: bool) -> str | None:
    """The rule that comes with a tier."""
    on_gpu = device.type == "cuda"
    if tier == "reference":
        return None
    if tier == "cpu":
        if on_gpu:
            return "serves CPU tensors"
        return None if native.has_kernel("cpu", op) else "not compiled in this build"
    if tier == "triton":
        interpreted = interpreting() and triton_forced
        return (
            None
            if on_gpu or interpreted
            else "serves CUDA tensors (CPU ones: TRITON_INTERPRET=1 and forced)"
        )
    if not on_gpu:
        return "serves CUDA tensors"
    if tier == "cuda":
        absent = native.cuda_library_absent()
        if absent is None and not native.has_kernel("cuda", op):
            absent = "not compiled in this build"
        if absent:
            return absent
    if tier == "tilelang" and importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed"
    if not is_hopper(device.index or 0):
        return "written for compute capability 9.0 (Hopper)"
    return None


@functools.cache
def _function(room: str, module: str | None, name: str, tier: str) -> Callable[..., Any]:
    if module is None:
        return getattr(getattr(torch.ops, f"dsa_kernels_{tier}"), name).default
    return getattr(importlib.import_module(f"{room}.{module}"), name)


def _reasons(op: Op, declined: list[tuple[Implementation, str]]) -> str:
    lines = [f"  {row.tier} declines: {reason}" for row, reason in declined]
    forced = _forced_tiers()
    if forced:
        tiers = ", ".join(row.tier for row in op.table)
        lines.append(f"  only {', '.join(forced)} allowed (DSA_IMPL or use()); the op has {tiers}")
    return "\n".join(lines)


def signature_of(function: Callable[..., Any]) -> list[str]:
    """Parameter names, for the test that every implementation has the reference's signature."""
    return list(inspect.signature(function).parameters)
