import importlib

import pytest
import torch
from hard_scores import deceptive_rows, hard_rows
from held_multiprocessors import hold_multiprocessors
from hypothesis import given
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels.topk_select.reference import topk_select as reference

OP = "topk_select"


@pytest.mark.parametrize(
    "width, topk", [(1, 1), (7, 3), (100, 100), (100, 128), (1000, 37), (5000, 2048)]
)
def test_equals_stable_sort(tier, width, topk):
    scores = hard_rows(width).to(tier.device)
    with tier:
        indices = dsa_kernels.topk_select(scores, topk)
    torch.testing.assert_close(indices, reference(scores, topk, None, None), rtol=0, atol=0)


@pytest.mark.parametrize("rows", ["few", "many"])
def test_long_rows(tier, rows, monkeypatch):
    """Far more columns than candidates are kept: in random order, ascending (all pass every bound), with plateaus; with
    the sizes that Triton takes for few rows and for many."""
    if tier.name == "triton":
        module = importlib.import_module("dsa_kernels.topk_select.triton")
        monkeypatch.setattr(module, "MANY_ROWS", 1 if rows == "many" else 1000)
    elif rows == "many":
        pytest.skip("one size for all")
    plateau = torch.randint(0, 3, (12_000,)).float()
    scores = torch.stack([torch.randn(12_000), torch.arange(12_000).float(), plateau])
    scores = scores.to(tier.device)
    with tier:
        indices = dsa_kernels.topk_select(scores, 700)
    torch.testing.assert_close(indices, reference(scores, 700, None, None), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 3, 8])
@pytest.mark.parametrize(
    "width, topk", [(1200, 700), (8192, 2048), (9000, 2048), (20_000, 5), (131_072, 4096)]
)
def test_rows_that_defeat_a_guess(tier, width, topk, copies, dtype):
    """Few of them, which share the GPU in clusters; as many as it just holds; and so many that each has a block of
    threads of its own."""
    if copies > 1 and tier.name != "cuda":
        pytest.skip("only CUDA has a design for many rows")
    if tier.interpreted:
        width, topk = width // 10, topk // 10 + 1
    scores = torch.cat([hard_rows(width), deceptive_rows(width)] * copies).to(tier.device, dtype)
    with tier:
        indices = dsa_kernels.topk_select(scores, topk)
    torch.testing.assert_close(indices, reference(scores, topk, None, None), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize(
    "rows, width",
    [
        (1500, 32_768),
        (2000, 16_000),
        (3000, 8000),
        (3000, 4096),
        (20, 70_001),
        (3, 450_000),
        (60, 131_072),
        (66, 150_003),
    ],
)
def test_every_row_of_many(name, rows, width):
    """More rows than run at a time, or as many, of any length, again and again: all of them right, every time."""
    scores = torch.randn(rows, width, device="cuda")
    lengths = torch.randint(0, width, (rows,), dtype=torch.int32, device="cuda")
    starts = torch.randint(0, 9, (rows,), dtype=torch.int32, device="cuda")
    expected = reference(scores, 2048, starts, lengths)
    with dsa_kernels.use(name):
        for _ in range(10):
            indices = dsa_kernels.topk_select(scores, 2048, starts=starts, lengths=lengths)
            assert torch.equal(indices, expected)


MILLION = [
    (2100, 2048, 300_000), (4096, 2048, 250_000), (8192, 2048, 250_000), (16_384, 2048, 120_000),
    (5000, 7, 40_000), (16_384, 4096, 20_000), (32_768, 2048, 14_000), (131_072, 2048, 6_000),
]  # fmt: skip


@pytest.mark.parametrize(
    "device, share", [("cpu", 0.001), pytest.param("cuda", 1.0, marks=[pytest.mark.gpu, pytest.mark.slow])]
)  # fmt: skip
def test_a_million_rows(device, share):
    """Random rows, rows of few values and of bfloat16 ones, each against a full stable sort; on a CPU a thousand."""
    assert sum(rows for *_, rows in MILLION) == 1_000_000
    differing = 0
    for width, topk, rows in MILLION:
        rest = int(rows * share)
        while rest > 0:
            n = min(rest, 2**27 // width)
            scores = torch.randn(n, width, device=device)
            scores[1::3] = (scores[1::3] * 8).round() / 8
            scores[2::3] = scores[2::3].bfloat16().float()
            lengths = torch.randint(topk // 2, width + 1, (n,), dtype=torch.int32, device=device)
            indices = dsa_kernels.topk_select(scores, topk, lengths=lengths)
            visible = torch.arange(width, device=device) < lengths[:, None]
            scores.masked_fill_(~visible, -torch.inf)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk].int()
            best = torch.where(best < lengths[:, None], best, 2**31 - 1).sort(-1).values
            best[best == 2**31 - 1] = -1
            differing += (indices != best).any(1).sum().item()
            rest -= n
    assert differing == 0


def test_large_topk(tier):
    scores = torch.randn(1, 12_000, device=tier.device)
    with tier:
        indices = dsa_kernels.topk_select(scores, 9000)
    torch.testing.assert_close(indices, reference(scores, 9000, None, None), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_and_lengths(tier, dtype):
    scores = torch.randn(8, 300, device=tier.device).to(dtype)
    starts = torch.tensor([0, 10, 299, 300, -5, 400, 50, 0], dtype=torch.int32, device=tier.device)
    lengths = torch.tensor([300, 20, 1, 5, 7, 3, 10_000, -4], dtype=torch.int32, device=tier.device)
    with tier:
        indices = dsa_kernels.topk_select(scores, 16, starts=starts, lengths=lengths)
    torch.testing.assert_close(indices, reference(scores, 16, starts, lengths), rtol=0, atol=0)
    assert (indices[5] == -1).all() and (indices[7] == -1).all()


@given(st.data())
def test_property(tier, data):
    rows = data.draw(st.integers(0, 4), "rows")
    width = data.draw(st.integers(0, 400), "width")
    topk = data.draw(st.integers(1, 64), "topk")
    values = data.draw(st.sampled_from([2, 5, 1000]), "distinct values")
    extreme = st.integers(-(2**31), 2**31 - 1)
    near = st.integers(-3, width + 3)
    starts = data.draw(st.lists(near | extreme, min_size=rows, max_size=rows), "starts")
    lengths = data.draw(st.lists(near | extreme, min_size=rows, max_size=rows), "lengths")
    scores = torch.randint(0, values, (rows, width), device=tier.device).float()
    starts = torch.tensor(starts, dtype=torch.int32, device=tier.device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=tier.device)
    with tier:
        indices = dsa_kernels.topk_select(scores, topk, starts=starts, lengths=lengths)
    torch.testing.assert_close(indices, reference(scores, topk, starts, lengths), rtol=0, atol=0)


def test_row_stride(tier):
    scores = torch.randn(6, 500, device=tier.device)[::2, 100:]
    with tier:
        indices = dsa_kernels.topk_select(scores, 50)
    torch.testing.assert_close(indices, reference(scores, 50, None, None), rtol=0, atol=0)


def test_a_perturbed_row_is_noticed(tier):
    scores = torch.randn(4, 500, device=tier.device)
    expected = reference(scores, 50, None, None)
    scores[2, expected[2, 7]] = -10
    with tier:
        indices = dsa_kernels.topk_select(scores, 50)
    assert (indices != expected).any(1).tolist() == [False, False, True, False]


def test_same_bits_whatever_the_batch(tier):
    scores = hard_rows(3000).to(tier.device)
    with tier:
        together = dsa_kernels.topk_select(scores, 100)
        alone = torch.cat([dsa_kernels.topk_select(row[None], 100) for row in scores])
    assert torch.equal(together, alone)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows, width", [(1, 131_072), (64, 131_072), (60, 20_000), (300, 100_000), (2000, 8192)]
)
def test_same_bits_with_few_multiprocessors_free(rows, width):
    scores = torch.randn(rows, width, device="cuda")
    expected = reference(scores, 2048, None, None)
    with dsa_kernels.use("cuda"):
        for held in (1, 100, 131):
            hold_multiprocessors(held)
            assert torch.equal(dsa_kernels.topk_select(scores, 2048), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    lengths = torch.tensor([5, 90], dtype=torch.int32, device=device)
    args = (torch.randn(2, 100, device=device), 8, None, lengths)
    torch.library.opcheck(torch.ops.dsa_kernels.topk_select.default, args)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    scores = torch.randn(3, 200, device=device)
    compiled = torch.compile(lambda s: dsa_kernels.topk_select(s * 2, 9) + 1, fullgraph=True)
    assert torch.equal(compiled(scores), reference(scores, 9, None, None) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_cuda_graph_replay_with_other_inputs(name):
    scores = torch.randn(5, 4000, device="cuda")
    lengths = torch.full((5,), 4000, dtype=torch.int32, device="cuda")
    with dsa_kernels.use(name):
        dsa_kernels.topk_select(scores, 64, lengths=lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            indices = dsa_kernels.topk_select(scores, 64, lengths=lengths)
    scores.copy_(torch.randn(5, 4000))
    lengths.copy_(torch.tensor([0, 10, 64, 65, 3000]))
    graph.replay()
    assert torch.equal(indices, reference(scores, 64, None, lengths))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_offsets_past_2_31(name):
    scores = torch.as_strided(torch.randn(2**31 + 2**20, device="cuda"), (3, 2**19), (2**30, 1))
    with dsa_kernels.use(name):
        indices = dsa_kernels.topk_select(scores, 2048)
    assert torch.equal(indices, reference(scores, 2048, None, None))


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    scores = torch.randn(3, 100, device="cuda")
    assert torch.equal(
        dsa_kernels.topk_select(cupy.from_dlpack(scores), 7), reference(scores, 7, None, None)
    )


def test_numpy():
    scores = torch.randn(3, 100)
    assert torch.equal(dsa_kernels.topk_select(scores.numpy(), 7), reference(scores, 7, None, None))


BAD = {
    "scores: expected float32 or bfloat16, got float64": lambda s: ((s.double(), 4), {}),
    "scores: expected shape": lambda s: ((s[0], 4), {}),
    "scores: expected the last dimension contiguous": lambda s: ((s.T, 4), {}),
    "scores: expected a torch.Tensor": lambda s: (([1.0], 4), {}),
    "topk: expected an integer >= 1, got 0": lambda s: ((s, 0), {}),
    "starts: expected int32": lambda s: ((s, 4), {"starts": torch.zeros(3, device=s.device)}),
    "starts: expected shape": lambda s: ((s, 4), {"starts": torch.zeros(2, dtype=torch.int32, device=s.device)}),
    "lengths: expected shape": lambda s: ((s, 4), {"lengths": torch.zeros(1, 3, dtype=torch.int32, device=s.device)}),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        scores = torch.randn(3, 10, device="cpu" if mode == "fake" else mode)
        args, kwargs = BAD[message](scores)
        return dsa_kernels.topk_select(*args, **kwargs)

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()
