"""The benchmark machinery on invented ops: what it times, refuses to time, prints and keeps."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dsa_kernels
from bench import __main__ as program
from bench import report, roofline, timing
from bench.case import Case, Unavailable, discover
from bench.clock import CpuClock, CudaClock
from bench.plot import plot

CEILINGS = roofline.Ceilings(copy=1e12, flops={"bf16": 1e14, "fp8": 2e14, "fp32": 1e13})
CPU = torch.device("cpu")


def equal_to_double(output, inputs):
    assert torch.equal(output, 2 * inputs[0]), "not twice the input"


def missing(x):
    raise Unavailable("no_such_library is not installed")


def hungry(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1000 GiB")


def broken(x):
    raise RuntimeError("unsupported head dim\nsecond line")


def invented(name="8 numbers", ours=lambda x: x * 2, **fields):
    peers = {"eager": lambda x: x + x, "absent": missing, "hungry": hungry, "broken": broken}
    defaults = {"peers": peers, "bytes": 64e6, "quick": True, "context": 8, "series": "numbers"}
    return Case(name, lambda: (torch.rand(8),), ours, equal_to_double, **(defaults | fields))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs `python -m bench --device cpu` over invented ops; returns the exit code and the kept lines."""
    monkeypatch.setattr(roofline, "measure", lambda device, full=False: CEILINGS)
    file = tmp_path / "results" / "cpu.jsonl"

    def call(ops, *arguments):
        monkeypatch.setattr(
            program, "discover", lambda: {op: lambda d, c=c: c for op, c in ops.items()}
        )
        code = program.main(
            ["--device", "cpu", "--seconds", "0.05", "--json", str(file), *arguments]
        )
        return code, report.load(file) if file.exists() else []

    return call


@pytest.mark.parametrize(
    "flops, bytes, dtype, expected",
    [
        (2e8, 1e6, "bf16", (2.0, "flops")),
        (2e8, 1e6, "fp8", (1.0, "bytes")),
        (2e8, 4e6, "fp32", (20.0, "flops")),
        (2e8, 4e6, "bf16", (4.0, "bytes")),
        (0, 0, "bf16", (0.0, "bytes")),
    ],
)
def test_limit(flops, bytes, dtype, expected):
    limit, bound = CEILINGS.limit_us(flops, bytes, dtype)
    assert (round(limit, 9), bound) == expected


def test_table_and_line(bench, capsys):
    code, lines = bench({"double": [invented()]})
    printed = capsys.readouterr().out
    assert code == 0 and len(lines) == 1
    entry = lines[0]
    assert entry["op"] == "double" and entry["implementation"] == "-"
    assert entry["limit_us"] == 64.0 and entry["bound"] == "bytes"
    assert entry["fraction"] == pytest.approx(64.0 / entry["median_us"], rel=1e-2)
    assert entry["median_us"] > 0 and entry["peers"]["eager"] > 0
    assert entry["peers"]["absent"] == "n/a: no_such_library is not installed"
    assert entry["peers"]["hungry"] == "oom"
    assert entry["peers"]["broken"] == "error: RuntimeError: unsupported head dim"
    assert set(entry["timing"]) == {"ours", "eager"}
    row = next(text for text in printed.splitlines() if "8 numbers" in text)
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[-4:-1] == ["n/a", "oom", "error"] and cells[-5].endswith("x")
    assert "broken (8 numbers): error: RuntimeError: unsupported head dim" in printed


@pytest.mark.parametrize(
    "ours, reason",
    [(lambda x: x * 2 + 1e-6, "wrong output: not twice the input"), (broken, "unsupported head")],
)
def test_wrong_output_prints_no_speed(bench, capsys, ours, reason):
    code, lines = bench({"double": [invented("good"), invented("bad", ours)]})
    printed = capsys.readouterr().out
    assert code == 1
    assert [entry["case"] for entry in lines] == ["good"]
    rows = [text for text in printed.splitlines() if "bad" in text]
    assert len(rows) == 1 and rows[0].startswith("no speed: double bad") and reason in rows[0]


def test_case_argument(bench):
    ops = {"one": [invented("a 1"), invented("a 2")], "two": [invented("b 1")]}
    assert [entry["case"] for entry in bench(ops, "--case", " 1")[1]] == ["a 1", "b 1"]


def test_quick_and_op_arguments(bench, capsys):
    ops = {"one": [invented("a"), invented("b", quick=False)], "two": [invented("c")]}
    assert [entry["case"] for entry in bench(ops, "--quick", "one")[1]] == ["a"]
    assert [entry["case"] for entry in bench(ops)[1]] == ["a", "b", "c"]
    with pytest.raises(SystemExit):
        bench(ops, "three")
    assert "unknown op three; there are roofline, one, two" in capsys.readouterr().err


def test_calls_interleave_and_rotate():
    turns = []

    def runner(name, estimate_us):
        calls = [lambda k=k: turns.append((name, k)) for k in range(4)]
        return timing.Runner(name, calls, "", estimate_us)

    timing.sample([runner("a", 10.0), runner("b", 20.0)], CpuClock(), 400.0)
    assert "".join(name for name, _ in turns) == "aba" * 10
    assert [k for name, k in turns if name == "a"] == [0, 1, 2, 3] * 5
    assert [k for name, k in turns if name == "b"] == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


def test_inputs_are_fresh_and_all_used():
    seen = []
    case = invented(ours=lambda x: (seen.append(x), x * 2)[-1])
    timing.measure(case, CpuClock(), 0.05)
    assert len({x.data_ptr() for x in seen}) == timing.INPUT_SETS
    assert len({tuple(x.tolist()) for x in seen}) == timing.INPUT_SETS


def test_slow_peer_keeps_to_its_share():
    calls = []
    slow = {"slow": lambda x: (calls.append(1), time.sleep(0.05))}
    result = timing.measure(invented(peers=slow), CpuClock(), 0.1)
    assert len(calls) == 2  # warm-up, and the estimate, which is longer than the time left
    assert result.samples > 3 and result.peers["slow"] >= 50_000


def test_inputs_larger_than_the_memory_come_in_one_set():
    clock = CpuClock()
    clock.input_bytes = 40
    assert len(list(timing.input_sets(invented(), clock))) == 1
    clock.input_bytes = 64
    assert len(list(timing.input_sets(invented(), clock))) == 2


def test_peak_memory_of_a_cpu_call():
    peak = CpuClock().peak_mib(lambda: torch.ones(2**24) + 1)  # two tensors of 64 MiB
    if peak is None:
        pytest.skip("this system does not tell the high-water mark of resident memory")
    assert 120 < peak < 140


def test_the_implementation_is_recorded(bench):
    case = Case(
        "[2, 64] k=8",
        lambda: (torch.randn(2, 64), 8),
        dsa_kernels.topk_select,
        lambda output, inputs: None,
        bytes=1.0,
    )
    with dsa_kernels.use("reference"):
        assert bench({"topk_select": [case]})[1][0]["implementation"] == "reference"
    assert bench({"topk_select": [case]})[1][0]["implementation"] == "cpu"


def test_every_room_has_benchmarks():
    rooms = {op.room.rpartition(".")[2] for op in dsa_kernels.registered_ops().values()}
    found = discover()
    assert rooms <= set(found)
    for op, make in found.items():
        cases = make(CPU)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), op
        assert any(case.quick for case in cases), f"{op}: no quick case"
        for case in cases:
            assert op not in rooms or "eager" in case.peers, f"{op} {case.name}: no eager peer"
            assert case.flops or case.bytes, f"{op} {case.name}: no limit"
            assert case.dtype in CEILINGS.flops, f"{op} {case.name}: {case.dtype}"


def test_pytest_collects_ours_and_peers():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-k", "topk_select"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = next(case for case in discover()["topk_select"](device) if case.quick)
    for name in ("ours", "eager", "torch.topk"):
        assert f"test_speed[topk_select-{case.name}-{name}]" in listed


def kept(op="double", case="a|b", median=10.0, **fields):
    defaults = {
        "commit": "0123abcd", "date": "2026-01-02T03:04:05+00:00", "device": "NVIDIA H200", "driver": "580.1",
        "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3", "op": op, "case": case,
        "implementation": "triton", "median_us": median, "samples": 9, "flops": 4e9, "bytes": 8.0, "dtype": "bf16",
        "timing": {"ours": "graph", "eager": "events"}, "bound": "flops", "limit_us": 4.0,
        "fraction": 4.0 / median, "peak_mib": 0.5, "peers": {"eager": 25.0, "absent": "n/a: not installed"},
        "context": 4096, "series": "s",
    }  # fmt: skip
    return defaults | fields


def test_json_to_markdown(tmp_path):
    file = tmp_path / "h200.jsonl"
    lines = [kept(median=99.0), kept(case="other"), kept(op="next"), kept()]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    text = report.markdown(report.load(file)).splitlines()
    start = text.index("**`double`**")
    assert text[start + 2 : start + 6] == [
        "| case | by | median us | rate | % of limit | peak MiB | vs eager | vs absent |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a\\|b | triton | 10.0 | 400 TFLOPS | 40.0 | 0.50 | 2.50x | n/a |",
        "| other | triton | 10.0 | 400 TFLOPS | 40.0 | 0.50 | 2.50x | n/a |",
    ]
    assert "absent: n/a: not installed" in text
    assert "eager: plain events, no CUDA graph (2 cases)" in text
    assert text[-1] == (
        "Measured on NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, Python 3.12.3; "
        "2026-01-02; at 0123abcd."
    )


def test_write_replaces_the_marked_section_only(tmp_path):
    file, readme = tmp_path / "h200.jsonl", tmp_path / "README.md"
    file.write_text(json.dumps(kept()) + "\n")
    around = (
        "# T\n<!-- bench:cpu -->\nC\n<!-- /bench -->\n<!-- bench:h200 -->{}<!-- /bench -->\nend\n"
    )
    readme.write_text(around.format("\nold\n"))
    assert report.main([str(file), "--write", str(readme)]) == 0
    expected = around.format(f"\n\n{report.markdown([kept()])}\n")
    assert readme.read_text() == expected
    assert report.main([str(file), "--write", str(readme)]) == 0
    assert readme.read_text() == expected
    with pytest.raises(ValueError, match="bench:h100"):
        report.replace_between_markers(expected, "h100", [])


def test_a_marker_can_name_its_ops():
    text = "a <!-- bench:h200 next -->old<!-- /bench --> b"
    text = report.replace_between_markers(text, "h200", [kept(), kept(op="next")])
    assert text.startswith("a <!-- bench:h200 next -->\n\n**`next`**") and "`double`" not in text
    assert text.endswith("<!-- /bench --> b")


def test_plot_holds_every_series_and_timed_peer(tmp_path):
    lines = [
        kept(case=f"{series} {context}", context=context, series=series)
        for series in ("rho = 2", "rho = 4")
        for context in (2048, 8192)
    ]
    paths = plot([*lines, kept(op="no_context", context=None)], tmp_path)
    assert [path.name for path in paths] == ["double.png"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG" and paths[0].stat().st_size > 20_000


@pytest.mark.gpu
def test_graphs_on_a_gpu():
    """A capturable call becomes a graph that reads its own inputs; one that syncs stays, and leaves torch usable."""
    clock = CudaClock(torch.device("cuda"))
    x, out = torch.rand(1000, device="cuda"), torch.zeros(1000, device="cuda")
    replays = clock.capture([lambda: torch.mul(x, 2, out=out)])
    assert clock.capture([lambda: x.sum().item()]) is None
    stream = torch.cuda.current_stream()
    assert clock.capture([lambda: torch.cuda.synchronize()]) is None
    assert torch.cuda.current_stream() == stream
    reserved = torch.empty(2**28, device="cuda").nbytes
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert before - torch.cuda.memory_reserved() >= reserved
    x.fill_(3)
    assert 0 < clock.time(replays[0]) < 100
    assert (out == 6).all()
    assert 3 < clock.peak_mib(lambda: torch.empty(2**20, device="cuda")) < 5


@pytest.mark.gpu
def test_ceilings_of_a_gpu():
    ceilings = roofline.measure(torch.device("cuda"), full=True)
    assert ceilings.copy > 1e11 and ceilings.flops["fp8"] >= ceilings.flops["bf16"] > 1e13
    assert len(ceilings.details) >= 1 + len(roofline.FOOTPRINTS) * len(roofline.ROW_BYTES)
    assert all(rate > 1e11 for rate in ceilings.details.values())
