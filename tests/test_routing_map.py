import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels.moe_router.reference import routing_map as reference

OP = "routing_map"


def check(routing, ids, num_experts):
    """Against the reference, and against the words of the contract."""
    actual = (routing.offsets, routing.row_token, routing.slot_row)
    for name, got, want in zip(
        ("offsets", "row_token", "slot_row"), actual, reference(ids, num_experts)
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")  # fmt: skip
    offsets, row_token, slot_row = (x.tolist() for x in actual)
    rows = sorted(
        (expert, token, j)
        for token, slots in enumerate(ids.tolist())
        for j, expert in enumerate(slots)
        if 0 <= expert < num_experts
    )
    assert len(rows) == offsets[-1] and all(token == -1 for token in row_token[len(rows) :])
    for row, (expert, token, j) in enumerate(rows):
        assert offsets[expert] <= row < offsets[expert + 1]
        assert row_token[row] == token and slot_row[token][j] == row
    assert sum(row >= 0 for slots in slot_row for row in slots) == len(rows)


@pytest.mark.parametrize(
    "tokens, topk, num_experts",
    [(0, 8, 128), (1, 1, 1), (1, 8, 128), (7, 3, 5), (64, 8, 128), (65, 8, 128), (300, 6, 160), (1200, 2, 512)],
)  # fmt: skip
def test_equals_stable_sort(tier, tokens, topk, num_experts):
    ids = torch.rand(tokens, num_experts).argsort(-1)[:, :topk].int().to(tier.device)
    with tier:
        check(dsa_kernels.routing_map(ids, num_experts), ids, num_experts)


@pytest.mark.parametrize("tokens", [40, 200])  # one launch, two launches
def test_skewed_and_dropped(tier, tokens):
    ids = torch.randint(0, 100, (tokens, 8), dtype=torch.int32)
    ids[: tokens // 2, 0] = 7
    ids[::5] = -1
    ids[3], ids[4, 2], ids[5, 1] = 100, 2**31 - 1, -(2**31)
    ids = ids.to(tier.device)
    with tier:
        check(dsa_kernels.routing_map(ids, 100), ids, 100)
        everything_dropped = dsa_kernels.routing_map(torch.full_like(ids, -1), 100)
        one_expert = dsa_kernels.routing_map(torch.full_like(ids, 99), 100)
    assert (everything_dropped.offsets == 0).all() and (everything_dropped.row_token == -1).all()
    assert torch.equal(one_expert.slot_row.flatten(), torch.arange(tokens * 8, device=tier.device).int())  # fmt: skip


def test_many_blocks(tier):
    """More slots than fit in one block a CPU thread takes, or in the smallest Triton block."""
    tokens = 600 if tier.interpreted else 40_000
    ids = torch.randint(-1, 128, (tokens, 8), dtype=torch.int32, device=tier.device)
    with tier:
        routing = dsa_kernels.routing_map(ids, 128)
    for got, want in zip(
        (routing.offsets, routing.row_token, routing.slot_row), reference(ids, 128)
    ):
        assert torch.equal(got, want)


@given(st.data())
def test_property(tier, data):
    num_experts = data.draw(st.integers(1, 40), "num_experts")
    tokens = data.draw(st.integers(0, 90), "tokens")
    topk = data.draw(st.integers(1, 8), "topk")
    garbage = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=tokens * topk), "ids")
    ids = torch.randint(-2, num_experts + 2, (tokens * topk,), dtype=torch.int32)
    ids[: len(garbage)] = torch.tensor(garbage, dtype=torch.int32)
    ids = ids.view(tokens, topk).to(tier.device)
    with tier:
        check(dsa_kernels.routing_map(ids, num_experts), ids, num_experts)


def test_row_stride(tier):
    ids = torch.randint(0, 16, (90, 10), dtype=torch.int32, device=tier.device)[::2, 3:9]
    with tier:
        check(dsa_kernels.routing_map(ids, 16), ids, 16)


def test_a_changed_id_is_noticed(tier):
    ids = torch.arange(64, dtype=torch.int32, device=tier.device).view(8, 8)
    ids[4, 3] = 5
    with tier, pytest.raises(AssertionError, match="offsets"):
        check(dsa_kernels.routing_map(ids, 64), ids.where(ids != 5, ids.new_tensor(6)), 64)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    ids = torch.randint(-1, 9, (5, 3), dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.dsa_kernels.routing_map.default, (ids, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 1000])
def test_cuda_graph_replay_with_other_inputs(tokens):
    ids = torch.zeros(tokens, 8, dtype=torch.int32, device="cuda")
    dsa_kernels.routing_map(ids, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = dsa_kernels.routing_map(ids, 128)
    ids.copy_(torch.randint(-1, 130, (tokens, 8)))
    graph.replay()
    check(routing, ids, 128)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    """Row 2 of the ids lies 2^32 bytes after row 0, and the last block starts past 2^27 slots."""
    ids = torch.as_strided(
        torch.randint(0, 128, (2**31 + 64,), dtype=torch.int32, device="cuda"), (3, 8), (2**30, 1)
    )
    check(dsa_kernels.routing_map(ids, 128), ids, 128)
    ids = torch.randint(-1, 128, (2**24, 8), dtype=torch.int32, device="cuda")
    routing = dsa_kernels.routing_map(ids, 128)
    for got, want in zip(
        (routing.offsets, routing.row_token, routing.slot_row), reference(ids, 128)
    ):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    ids = torch.randint(0, 8, (20, 2), dtype=torch.int32, device="cuda")
    check(dsa_kernels.routing_map(cupy.from_dlpack(ids), 8), ids, 8)


BAD = {
    "ids: expected int32, got int64": lambda ids: (ids.long(), 8),
    "ids: expected shape": lambda ids: (ids[0], 8),
    "ids: expected the last dimension contiguous": lambda ids: (ids.T, 8),
    "ids: expected a torch.Tensor": lambda ids: ([[1]], 8),
    "ids: expected at most 2": lambda ids: (ids[:1, :1].expand(2**20, 2**11).as_strided((2**20, 2**11), (0, 1)), 8),
    "num_experts: expected an integer >= 1 and <= 1024, got 0": lambda ids: (ids, 0),
    "num_experts: expected an integer >= 1 and <= 1024, got 1025": lambda ids: (ids, 1025),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        ids = torch.zeros(3, 2**11, dtype=torch.int32, device="cpu" if mode == "fake" else mode)
        return dsa_kernels.routing_map(*BAD[message](ids))

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()
