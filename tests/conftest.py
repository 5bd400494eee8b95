"""Test settings shared by every room: Triton's interpreter without a GPU, poisoned memory, devices and tiers."""

import contextlib
import os
import zlib

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import numpy
import pytest
from hypothesis import HealthCheck, settings
from interpreter import round_to_nearest_even

import dsa_kernels
from dsa_kernels.dispatch import recording

round_to_nearest_even()
settings.register_profile(
    "dsa", deadline=None, max_examples=25, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("dsa")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_generate_tests(metafunc):
    """A test with the argument `tier` runs once per implementation that can run on this machine.

    `@pytest.mark.parametrize` is not needed: the room's ops and their tables are the source. The module names its op
    in OP. The tier "reference" is left out: it is what the others are compared with.
    """
    if "tier" not in metafunc.fixturenames:
        return
    op = dsa_kernels.registered_ops()[metafunc.module.OP]
    cases = []
    for row in op.table:
        if row.tier == "reference":
            continue
        device = (
            "cpu"
            if row.tier == "cpu" or (row.tier == "triton" and "cuda" not in DEVICES)
            else "cuda"
        )
        marks = [pytest.mark.gpu] if device == "cuda" else []
        cases.append(pytest.param((row.tier, device), id=f"{row.tier}-{device}", marks=marks))
    metafunc.parametrize("tier", cases, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test whose every call the tier under test declined is a skip, with the reason, not a pass of another tier."""
    result = yield
    tier = pyfuncitem.funcargs.get("tier")
    if tier is not None and tier.helpers and not tier.served:
        pytest.skip(f"{tier.name} serves no call of this test")
    return result


class Tier:
    """An implementation under test: `with tier: ...` forces it, `tier.device` is where its tensors live.

    TileLang has no backward and calls Triton helpers, and CUDA kernels decline some shapes, so these two may hand over to
    Triton; the ops of the room that they served themselves are in `served`.
    """

    def __init__(self, name, device, op):
        self.name, self.device = name, torch.device(device)
        self.interpreted = name == "triton" and device == "cpu"
        self.helpers = ("triton",) if name in ("cuda", "tilelang") else ()
        self.room, self.served = dsa_kernels.registered_ops()[op].room, set()

    def __enter__(self):
        self._contexts = contextlib.ExitStack()
        self._contexts.enter_context(dsa_kernels.use(self.name, *self.helpers))
        self._record = self._contexts.enter_context(recording())
        return self

    def __exit__(self, *error):
        ops = dsa_kernels.registered_ops()
        self.served |= {
            op for op, by in self._record if by == self.name and ops[op].room == self.room
        }
        return self._contexts.__exit__(*error)


@pytest.fixture
def tier(request):
    return Tier(*request.param, request.module.OP)


@pytest.fixture(autouse=True)
def fresh_random_numbers(request):
    """A seed per test, printed on failure, so that a red test can be repeated."""
    seed = int(os.environ.get("DSA_TEST_SEED", 0)) or zlib.crc32(request.node.nodeid.encode())
    print(f"DSA_TEST_SEED={seed}")
    torch.manual_seed(seed)
    numpy.random.seed(seed)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills `torch.empty` with NaN (floats) or the largest value (integers): unwritten outputs show."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
