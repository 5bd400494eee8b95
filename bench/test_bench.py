"""The cases of bench/<op>.py under pytest-benchmark: one benchmark for ours and one per peer, grouped by case.

    python -m pytest bench -k topk_select --benchmark-autosave
    pytest-benchmark compare

Ours is verified before it is timed; a peer that is missing here, or out of memory, is skipped and says so. Each round
is one call on the next of several input sets, timed by the host's clock (on a GPU up to the end of its work, launches
included): `python -m bench` is the finer instrument, this one keeps history and compares commits.
"""

import functools

import pytest
import torch

from .case import discover
from .clock import clock_for
from .timing import OURS, Runner, check, describe, input_sets

SECONDS = 1.0  # of rounds for one benchmark
FEWEST, MOST = 3, 50  # rounds
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_inputs = {}


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    found = [
        pytest.param(f"{op}: {case.name}", case, name, id=f"{op}-{case.name}-{name}")
        for op, cases in discover().items()
        for case in cases(DEVICE)
        if case.quick or full
        for name in (OURS, *case.peers)
    ]
    metafunc.parametrize("group, case, name", found)


@functools.cache
def clock():
    return clock_for(DEVICE)


def inputs_of(group, case):
    """The input sets of a case; those of the case before are let go."""
    if group not in _inputs:
        _inputs.clear()
        _inputs[group] = list(input_sets(case, clock()))
    return _inputs[group]


def test_speed(benchmark, group, case, name):
    function = case.ours if name == OURS else case.peers[name]
    sets = inputs_of(group, case)

    def call(*inputs):
        result = function(*inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    if name == OURS:
        problem, _ = check(case, Runner(OURS, [functools.partial(call, *sets[0])], ""), sets[0])
        assert not problem, problem
    else:
        try:
            call(*sets[0])
        except Exception as error:
            reason = describe(error)
            if reason.startswith("error"):
                raise
            pytest.skip(reason)
    estimate = clock().time(functools.partial(call, *sets[0])) / 1e6
    rounds = min(max(int(SECONDS / estimate), FEWEST), MOST)
    turns = iter(range(rounds))
    benchmark.group = group
    benchmark.pedantic(call, setup=lambda: (sets[next(turns) % len(sets)], {}), rounds=rounds)
