"""The room rule: one op, one name, the same files everywhere; files of a readable size; links that resolve."""

import re
import subprocess
from pathlib import Path

import pytest

import dsa_kernels

ROOT = Path(__file__).parent.parent
ROOMS = sorted(p.parent.name for p in (ROOT / "dsa_kernels").glob("*/__init__.py"))
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
FILES = [path for path in TRACKED if (ROOT / path).is_file()]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_files(room):
    needed = [
        f"dsa_kernels/{room}/__init__.py",
        f"dsa_kernels/{room}/reference.py",
        f"dsa_kernels/{room}/triton.py",
        f"csrc/{room}/cpu.cpp",
        f"tests/test_{room}.py",
        f"bench/{room}.py",
    ]
    assert [path for path in needed if path not in FILES] == []


def test_no_stray_rooms():
    assert {path.split("/")[1] for path in FILES if re.match(r"csrc/\w+/", path)} == {
        *ROOMS,
        "common",
    }


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_public_and_registered(room):
    ops = dsa_kernels.registered_ops().values()
    assert any(op.room == f"dsa_kernels.{room}" for op in ops)
    exported = [getattr(dsa_kernels, name) for name in dsa_kernels.__all__]
    assert any(getattr(f, "__module__", "").startswith(f"dsa_kernels.{room}") for f in exported)


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_hold_only_what_the_rule_names(room):
    allowed = re.compile(
        rf"dsa_kernels/{room}/(__init__|autograd|reference|union|tilelang\w*|triton\w*)\.py"
        rf"|dsa_kernels/{room}/README\.md"
        rf"|csrc/{room}/(cpu\w*\.cpp|sm90\w*\.cu|\w+\.cuh|\w+\.h)"
    )
    inside = [p for p in FILES if p.startswith((f"dsa_kernels/{room}/", f"csrc/{room}/"))]
    assert [path for path in inside if not allowed.fullmatch(path)] == []


def test_every_schema_is_registered():
    text = (ROOT / "csrc/schemas.h").read_text()
    schemas = set(re.findall(r'^    "(\w+)\(', text, re.MULTILINE))
    assert schemas == set(dsa_kernels.registered_ops())


def test_file_sizes():
    limits = {".py": 500, ".cpp": 500, ".h": 500, ".cu": 500, ".cuh": 600}
    sizes = {
        path: len((ROOT / path).read_text().splitlines())
        for path in FILES
        if Path(path).suffix in limits
    }
    assert {p: n for p, n in sizes.items() if n > limits[Path(p).suffix]} == {}


def test_a_reference_is_forty_lines_an_op():
    for room in ROOMS:
        lines = (ROOT / f"dsa_kernels/{room}/reference.py").read_text().splitlines()
        code = [
            line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))
        ]
        ops = sum(op.room == f"dsa_kernels.{room}" for op in dsa_kernels.registered_ops().values())
        assert len(code) <= 40 * ops + 10, f"{room}: {len(code)} lines for {ops} ops"


def test_a_reference_imports_nothing_of_ours():
    for room in ROOMS:
        text = (ROOT / f"dsa_kernels/{room}/reference.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE))
        assert imported <= {"torch", "math", "torch.nn.functional", "__future__"}, room


@pytest.mark.parametrize("page", [p for p in FILES if p.endswith(".md")])
def test_links_resolve(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_ptx_is_in_common_only():
    sources = [p for p in FILES if p.startswith("csrc/") and not p.startswith("csrc/common/")]
    assert [p for p in sources if re.search(r"\basm\b", (ROOT / p).read_text())] == []


def test_no_torch_below_the_launch_file():
    device_code = [p for p in FILES if re.fullmatch(r"csrc/.+(\.cuh|params\.h)", p)]
    assert [p for p in device_code if "torch" in (ROOT / p).read_text()] == []
