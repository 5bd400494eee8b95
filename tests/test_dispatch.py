"""The foundation: which implementation serves a call and why, what an install holds, argument checks."""

import importlib
import re
from pathlib import Path

import numpy
import pytest
import torch

import dsa_kernels
from dsa_kernels import native
from dsa_kernels.checks import FLOATS, INT32, Arguments
from dsa_kernels.dispatch import TIERS, Implementation, from_dlpack, signature_of

SCHEMAS = dict(
    re.findall(
        r'^    "(\w+)\((.*?)\) ->',
        (Path(__file__).parent.parent / "csrc/schemas.h").read_text(),
        re.MULTILINE,
    )
)
OPS = sorted(dsa_kernels.registered_ops())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def no_forced_tier(monkeypatch):
    monkeypatch.delenv("DSA_IMPL", raising=False)


def scores(device="cpu"):
    return torch.randn(3, 50, device=device)


# ---- every registered op ---------------------------------------------------------------------------


def parameters(schema):
    """Names of a schema's parameters: `Tensor(a!) k_cache, float eps` -> [k_cache, eps]."""
    return [p.split()[-1] for p in schema.split(", ")]


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_schema_a_fake_and_kernels(name):
    assert name in SCHEMAS
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has(f"dsa_kernels::{name}", key) for key in ("CPU", "CUDA"))
    entry = torch._library.simple_registry.singleton.find(f"dsa_kernels::{name}")
    assert entry.fake_impl.kernel is not None


@pytest.mark.parametrize("name", OPS)
def test_every_table_serves_every_machine(name):
    tiers = [row.tier for row in dsa_kernels.registered_ops()[name].table]
    assert set(tiers) <= set(TIERS) and tiers[-1] == "reference" and "triton" in tiers
    if hasattr(
        dsa_kernels, name.removesuffix("_bwd")
    ):  # else a step that only the GPU kernels take
        assert "cpu" in tiers


@pytest.mark.parametrize("name", OPS)
def test_python_implementations_have_the_schemas_parameters(name):
    op = dsa_kernels.registered_ops()[name]
    for row in op.table:
        if row.module is None or row.tier == "tilelang":  # TileLang need not be installed
            continue
        module = importlib.import_module(f"{op.room}.{row.module}")
        function = getattr(module, row.function or name)
        assert signature_of(function) == parameters(SCHEMAS[name]), row.tier
    assert signature_of(op.check) == parameters(SCHEMAS[name])


@pytest.mark.parametrize("name", OPS)
def test_every_cpu_row_is_compiled(name):
    rows = [row.tier for row in dsa_kernels.registered_ops()[name].table]
    assert native.has_kernel("cpu", name) == ("cpu" in rows)


# ---- explain, use, DSA_IMPL ------------------------------------------------------------------------


def test_explain_names_the_choice_and_the_reasons():
    assert dsa_kernels.explain("topk_select") == "topk_select: cuda, triton, cpu, reference (best first)"  # fmt: skip
    lines = dsa_kernels.explain("topk_select", scores(), 4, None, None).splitlines()
    assert lines[0] == "topk_select: cpu"
    assert lines[1] == "  cuda declines: serves CUDA tensors"
    assert lines[2].startswith("  triton declines: serves CUDA tensors") and len(lines) == 3


@pytest.mark.gpu
def test_explain_on_a_gpu_takes_no_cpu_row():
    with dsa_kernels.use("cpu", "triton"):
        text = dsa_kernels.explain("topk_select", scores("cuda"), 4, None, None)
    assert text.splitlines()[:2] == ["topk_select: triton", "  cpu declines: serves CPU tensors"]


def test_explain_checks_its_arguments():
    with pytest.raises(ValueError, match=r"op: expected one of .*topk_select.*, got 'topk'"):
        dsa_kernels.explain("topk")
    with pytest.raises(ValueError, match="topk: expected an integer >= 1, got 0"):
        dsa_kernels.explain("topk_select", scores(), 0, None, None)


def chosen():
    return dsa_kernels.explain("topk_select", scores(), 4, None, None).splitlines()[0].split()[-1]


def test_use_nests_and_ends_with_its_block():
    with dsa_kernels.use("reference"):
        assert chosen() == "reference"
        with dsa_kernels.use("cpu", "reference"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with pytest.raises(RuntimeError, match="inside"), dsa_kernels.use("cpu"):
            raise RuntimeError("inside")
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_use_follows_the_callers_order():
    with dsa_kernels.use("reference", "cpu"):
        assert chosen() == "reference"


def test_use_rejects_unknown_names():
    with (
        pytest.raises(ValueError, match=r"tiers: expected names from cuda, .*, got 'gpu'"),
        dsa_kernels.use("gpu"),
    ):
        pass
    assert chosen() == "cpu"


def test_dsa_impl(monkeypatch):
    monkeypatch.setenv("DSA_IMPL", "reference")
    assert chosen() == "reference"
    with dsa_kernels.use("cpu"):  # use() overrides it
        assert chosen() == "cpu"
    monkeypatch.setenv("DSA_IMPL", "cuda,cpu")
    assert chosen() == "cpu"
    monkeypatch.setenv("DSA_IMPL", "cpu,fast")
    with pytest.raises(ValueError, match=r"DSA_IMPL: expected names from cuda, .*, got 'fast'"):
        dsa_kernels.topk_select(scores(), 4)


def test_a_forced_tier_that_cannot_serve_lists_the_reasons():
    with dsa_kernels.use("cuda"), pytest.raises(ValueError) as error:
        dsa_kernels.topk_select(scores(), 4)
    assert str(error.value).splitlines() == [
        "topk_select: no implementation serves this call",
        "  cuda declines: serves CUDA tensors",
        "  only cuda allowed (DSA_IMPL or use()); the op has cuda, triton, cpu, reference",
    ]


def test_a_forced_tier_that_is_not_in_the_table():
    op = dsa_kernels.registered_ops()["topk_select"]
    missing = next(tier for tier in TIERS if tier not in [row.tier for row in op.table])
    with dsa_kernels.use(missing), pytest.raises(ValueError) as error:
        dsa_kernels.topk_select(scores(), 4)
    assert f"only {missing} allowed" in str(error.value)


def test_forced_tiers_agree():
    x = scores()
    with dsa_kernels.use("reference"):
        expected = dsa_kernels.topk_select(x, 4)
    assert torch.equal(dsa_kernels.topk_select(x, 4), expected)


def test_a_row_can_decline_by_metadata():
    op = dsa_kernels.registered_ops()["topk_select"]
    small = Implementation("cpu", declines=lambda x, *rest: "rows too wide" if x.shape[1] > 10 else None)  # fmt: skip
    entry = type(op)(op.name, op.room, op.check, (small, op.table[-1]))
    row, declined = entry.choose((scores(), 4, None, None))
    assert row.tier == "reference" and declined == [(small, "rows too wide")]
    row, declined = entry.choose((scores()[:, :10], 4, None, None))
    assert row.tier == "cpu" and declined == []


# ---- arrays of other libraries ---------------------------------------------------------------------


def test_from_dlpack_shares_memory():
    array = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    tensor = from_dlpack(array)
    tensor[1, 2] = 50
    assert array[1, 2] == 50
    x = torch.randn(3)
    assert from_dlpack(x) is x
    assert from_dlpack(None) is None and from_dlpack(3) == 3 and from_dlpack("a") == "a"


def test_arrays_are_checked_like_tensors():
    with pytest.raises(ValueError, match="scores: expected float32 or bfloat16, got float64"):
        dsa_kernels.topk_select(numpy.zeros((2, 3)), 1)


# ---- what the install holds ------------------------------------------------------------------------


def test_build_info():
    info = dsa_kernels.build_info()
    assert {"compiler", "nvcc", "cuda_archs", "cpu_isas", "cpu_isa", "torch", "cuda_library", "kernels"} <= set(info)  # fmt: skip
    assert info["cpu_isa"] in info["cpu_isas"].split(",")
    assert info["torch"] == torch.__version__
    assert bool(info["nvcc"]) == bool(info["cuda_archs"]) == bool(info["kernels"])
    assert bool(info["nvcc"]) == native.CUDA_LIBRARY.exists()


def test_no_cuda_kernel_spills():
    info = dsa_kernels.build_info()
    if not info["nvcc"]:
        pytest.skip("built without nvcc")
    for kernel in info["kernels"]:
        assert kernel["arch"].startswith("sm_") and 0 < kernel["registers"] <= 255, kernel
        assert kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0, kernel


def test_a_missing_cuda_library_is_explained():
    reason = native.cuda_library_absent()
    if torch.version.cuda is None:
        assert reason is not None and ("CPU build" in reason or "was not built" in reason)
    elif native.CUDA_LIBRARY.exists():
        assert reason is None


# ---- checks ----------------------------------------------------------------------------------------

BAD_TENSORS = {
    "x: expected a torch.Tensor, got list": lambda a: a.tensor("x", [1.0], "T", FLOATS),
    "x: expected float32 or bfloat16, got int32": lambda a: a.tensor("x", torch.zeros(2, dtype=torch.int32), "T", FLOATS),
    r"x: expected shape \[T, H\], got \[3\]": lambda a: a.tensor("x", torch.zeros(3), "T H", FLOATS),
    r"x: expected shape \[T, 4\] with 4 = 4, got \[2, 3\]": lambda a: a.tensor("x", torch.zeros(2, 3), "T 4", FLOATS),
    r"x: expected the last dimension contiguous, got strides \(1, 3\)": lambda a: a.tensor("x", torch.zeros(4, 3).T, "T H", FLOATS),
    r"x: expected the last 2 dimensions contiguous": lambda a: a.tensor("x", torch.zeros(2, 6)[:, ::2].unflatten(1, (3, 1)), "T H D", FLOATS, inner=2),
    "x: expected a contiguous tensor": lambda a: a.tensor("x", torch.zeros(4, 3)[:, :2], "T H", FLOATS, contiguous=True),
    "x: expected a CPU or CUDA tensor, got meta": lambda a: a.tensor("x", torch.zeros(2, device="meta"), "T", FLOATS),
    "n: expected an integer >= 1, got 0": lambda a: a.integer("n", 0, 1),
    "n: expected an integer >= 1 and <= 4, got 5": lambda a: a.integer("n", 5, 1, 4),
    "n: expected an integer >= 1, got True": lambda a: a.integer("n", True, 1),
    "n: expected an integer >= 1, got 2.0": lambda a: a.integer("n", 2.0, 1),
    "s: expected a finite positive number, got inf": lambda a: a.number("s", float("inf")),
    "s: expected a finite positive number, got -1": lambda a: a.number("s", -1),
    "s: expected a finite number, got nan": lambda a: a.number("s", float("nan"), positive=False),
    "m: expected 64 or 128, got 96": lambda a: a.one_of("m", 96, (64, 128)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_failed_checks_name_the_argument(message):
    with pytest.raises(ValueError, match="^my_op: " + message):
        BAD_TENSORS[message](Arguments("my_op"))


def test_letters_keep_their_meaning_over_a_call():
    a = Arguments("my_op")
    a.tensor("q", torch.zeros(5, 8, 64), "T H D", FLOATS)
    a.tensor("cu", torch.zeros(6, dtype=torch.int32), "T+1", INT32)
    a.tensor("w", torch.zeros(16, 64), "2H D", FLOATS)
    a.optional("lse", None, "T H", FLOATS)
    assert (a["T"], a["H"], a["D"]) == (5, 8, 64)
    with pytest.raises(ValueError, match=r"k: expected shape \[T, D\] with D = 64 \(from q\), got \[5, 32\]"):  # fmt: skip
        a.tensor("k", torch.zeros(5, 32), "T D", FLOATS)
    with pytest.raises(ValueError, match=r"w: expected shape \[2H, D\] with 2H = 16, got \[8, 64\]"):  # fmt: skip
        a.tensor("w", torch.zeros(8, 64), "2H D", FLOATS)
    with pytest.raises(ValueError, match=r"lse: expected shape \[T, H\] with H = 8 \(from q\)"):
        a.optional("lse", torch.zeros(5, 7), "T H", FLOATS)


@pytest.mark.gpu
def test_tensors_of_one_call_share_a_device():
    a = Arguments("my_op")
    a.tensor("q", torch.zeros(5, device="cuda"), "T", FLOATS)
    with pytest.raises(ValueError, match=r"k: expected device cuda:0 \(that of q\), got cpu"):
        a.tensor("k", torch.zeros(5), "T", FLOATS)


@pytest.mark.parametrize("device", DEVICES)
def test_checks_read_no_data(device):
    """Fake tensors have none; a check that looked at values would raise."""
    with torch._subclasses.FakeTensorMode():
        a = Arguments("my_op")
        a.tensor("q", torch.zeros(5, 8, device=device), "T H", FLOATS, contiguous=True)
        assert a["H"] == 8
