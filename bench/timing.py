"""Measures one Case: is it right, how long do ours and each peer take in the same run, how much memory ours needs.

First ours runs once and `verify` judges the output: a wrong one ends the measurement, without a speed. Then the peak
memory of a second call is read, and each peer is called once, which compiles what there is to compile and shows which
peers cannot run here. What remains of the case's seconds is shared out evenly: everyone gets as many calls as its
share holds, spread evenly over the run, so that a slow minute of the machine hits all alike; one at least, which for a call
longer than all that remains is the one that told so. Calls rotate over several sets of fresh inputs. The result is the median. See clock.py for how one call is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dsa_kernels.dispatch import recording

from .case import Case, Unavailable
from .clock import Call, Clock

OURS = "ours"
INPUT_SETS = 4
MOST_CALLS = 200
GRAPH_BELOW_US = 5000
ESTIMATES = 3  # calls, of which the fastest counts; a call that is longer than this many us is one
LONG_US = 10_000.0


@dataclass
class Result:
    """One row of a table.

    Attributes:
        problem: why there is no speed (wrong output, an exception of ours); empty if there is one.
        implementation: the tiers that served ours, e.g. "cpu" or "cuda+triton".
        median_us: of ours.
        peers: name -> median in us, or why there is none: "n/a: ...", "oom", "error: ...".
        how: name -> "host clock", "events" or "graph".
        samples: how many calls of ours the median is of.
        peak_mib: memory ours needs over its inputs; None if unknown.
    """

    problem: str = ""
    implementation: str = ""
    median_us: float = 0.0
    peers: dict[str, float | str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    peak_mib: float | None = None


@dataclass
class Runner:
    """Ours or a peer, bound to each set of inputs."""

    name: str
    calls: list[Call]
    how: str
    estimate_us: float = 0.0
    samples: list[float] = field(default_factory=list)
    problem: str = ""

    def attempt(self, action: Call) -> Any:
        """The action's value; a failure becomes the runner's problem and it takes no further part."""
        try:
            return action()
        except Exception as error:
            self.problem = describe(error)
            return None


def measure(case: Case, clock: Clock, seconds: float) -> Result:
    """Measures a case in about `seconds`; first calls, compilation and verification come on top if they are long."""
    started = time.perf_counter()
    result = Result()
    sets = list(input_sets(case, clock))
    runners = [
        Runner(name, [functools.partial(function, *inputs) for inputs in sets], clock.how)
        for name, function in {OURS: case.ours, **case.peers}.items()
    ]
    ours = runners[0]
    result.problem, result.implementation = check(case, ours, sets[0])
    if result.problem:
        return result
    result.peak_mib = ours.attempt(lambda: clock.peak_mib(ours.calls[-1]))
    for runner in runners:
        prepare(runner, clock)
    left = max(seconds - (time.perf_counter() - started), seconds / 4)
    sample([runner for runner in runners if not runner.problem], clock, left * 1e6)
    if ours.problem:
        result.problem = ours.problem
        return result
    result.median_us, result.samples = statistics.median(ours.samples), len(ours.samples)
    result.peers = {r.name: r.problem or statistics.median(r.samples) for r in runners[1:]}
    result.how = {r.name: r.how for r in runners if not r.problem}
    return result


def check(case: Case, ours: Runner, inputs: tuple[Any, ...]) -> tuple[str, str]:
    """What is wrong with ours on these inputs (empty if nothing is), and the implementation that served it."""
    with recording() as taken:
        output = ours.attempt(ours.calls[0])
    implementation = "+".join(dict.fromkeys(tier for _, tier in taken)) or "-"
    if ours.problem:
        return ours.problem, implementation
    try:
        case.verify(output, inputs)
        return "", implementation
    except AssertionError as error:
        return f"wrong output: {first_line(error)}".removesuffix(": "), implementation
    except Exception as error:
        return f"verify: {describe(error)}", implementation


def prepare(runner: Runner, clock: Clock) -> None:
    """Warms a runner up, makes graphs of short calls, and estimates the time of one."""
    if runner.name != OURS:
        runner.attempt(runner.calls[0])
    if not runner.problem:
        estimate(runner, clock)
    if not runner.problem and runner.estimate_us < GRAPH_BELOW_US:
        replays = clock.capture(runner.calls)
        if replays is not None:
            runner.calls, runner.how = replays, "graph"
            estimate(runner, clock)


def estimate(runner: Runner, clock: Clock) -> None:
    """The time of one call: the fastest of a few, as a busy host makes others seem long."""
    runner.estimate_us = 0.0
    for _ in range(ESTIMATES):
        elapsed = runner.attempt(lambda: clock.time(runner.calls[0])) or 0.0
        runner.estimate_us = min(runner.estimate_us or elapsed, elapsed)
        if elapsed > LONG_US or runner.problem:
            break


def sample(runners: list[Runner], clock: Clock, left_us: float) -> None:
    """Takes the samples of all runners, interleaved."""
    turns = []
    for position, runner in enumerate(runners):
        share = left_us / len(runners) / max(runner.estimate_us, 1.0)
        count = min(max(int(share), 1), MOST_CALLS)
        if runner.estimate_us > left_us:
            runner.samples.append(runner.estimate_us)
            continue
        turns += [((k + 0.5) / count, position, k) for k in range(count)]
    for _, position, k in sorted(turns):
        runner = runners[position]
        if not runner.problem:
            call = runner.calls[(k + position) % len(runner.calls)]
            elapsed = runner.attempt(functools.partial(clock.time, call))
            if elapsed is not None:
                runner.samples.append(elapsed)


def input_sets(case: Case, clock: Clock) -> Iterator[tuple[Any, ...]]:
    """Fresh inputs, as many sets as INPUT_SETS and the clock's memory allow, one at least."""
    room, first = clock.input_bytes, case.inputs()
    size = sum(tensor.nbytes for tensor in tensors(first))
    yield first
    for _ in range(min(INPUT_SETS, int(room / max(size, 1))) - 1):
        yield case.inputs()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors inside tuples, lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from tensors(vars(value))


def describe(error: Exception) -> str:
    """ "n/a: ...", "oom" or "error: ..."."""
    if isinstance(error, Unavailable):
        return f"n/a: {error}"
    text = str(error)
    out_of_memory = ("can't allocate memory", "not enough memory", "out of memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        phrase in text for phrase in out_of_memory
    ):
        return "oom"
    return f"error: {type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
