from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

import dsa_kernels
from dsa_kernels.moe_router.reference import moe_router as reference
from dsa_kernels.moe_router.reference import moe_router_bwd as reference_bwd

OP = "moe_router"
NAMES = ("weights", "ids", "counts", "prob_sum")


def check(outputs, logits, topk, normalize):
    exact = reference(logits.double(), topk, normalize)
    same_precision = reference(logits, topk, normalize)
    for name, got, want, torch_got in zip(NAMES, outputs, exact, same_precision):
        if name in ("ids", "counts"):
            assert torch.equal(got, want), name
        else:
            assert_close(name, got, want, torch_got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "tokens, num_experts, topk",
    [(0, 128, 8), (1, 128, 8), (75, 128, 8), (33, 60, 6), (5, 1, 1), (17, 512, 10), (9, 7, 7)],
)
def test_forward(tier, tokens, num_experts, topk, normalize, dtype):
    logits = (3 * torch.randn(tokens, num_experts, device=tier.device)).to(dtype)
    with tier:
        outputs = dsa_kernels.moe_router(logits, topk, normalize=normalize)
    check(outputs, logits, topk, normalize)
    assert outputs[2].sum() == tokens * topk


def test_like_hugging_face(tier):
    """Qwen3MoeTopKRouter: float softmax, torch.topk, renormalise; no ties in these logits."""
    logits = torch.randn(50, 128, device=tier.device)
    with tier:
        weights, ids, _, _ = dsa_kernels.moe_router(logits, 8)
    values, indices = torch.topk(torch.nn.functional.softmax(logits, dim=1, dtype=torch.float), 8)
    assert torch.equal(ids, indices.int())
    torch.testing.assert_close(weights, values / values.sum(-1, keepdim=True))


def test_ties_and_special_values(tier):
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor([
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [-0.0, 0.0, -1.0, 0.0, -0.0, 1.0, 1.0],
        [nan, 2.0, -inf, 1.0, nan, -inf, 3.0],
        [nan, nan, nan, nan, nan, nan, nan],
        [-inf, -inf, -inf, -inf, -inf, -inf, -inf],
        [-inf, 5.0, -inf, -inf, -inf, nan, inf],
        [-inf, -inf, 1e30, -1e30, 88.0, -3e38, 3e38],
        [-inf, 1.0, -inf, -inf, -inf, 0.5, -inf],
    ], device=tier.device)  # fmt: skip
    with tier:
        for normalize in (True, False):
            check(dsa_kernels.moe_router(rows, 5, normalize=normalize), rows, 5, normalize)
        ids = dsa_kernels.moe_router(rows, 5)[1]
    assert ids[0].tolist() == [0, 1, 2, 3, 4]
    assert ids[1].tolist() == [5, 6, 0, 1, 3]
    assert ids[2].tolist() == [6, 1, 3, 2, 5]


@given(st.data())
def test_property(tier, data):
    tokens = data.draw(st.integers(0, 20), "tokens")
    num_experts = data.draw(st.integers(1, 70), "num_experts")
    topk = data.draw(st.integers(1, min(num_experts, 9)), "topk")
    values = data.draw(st.sampled_from([2, 5, 1000]), "distinct values")
    logits = torch.randint(-values, values, (tokens, num_experts)).to(tier.device) / 8
    with tier:
        check(dsa_kernels.moe_router(logits, topk), logits, topk, True)


def test_more_tiles_than_programs(tier, monkeypatch):
    """The forward in Triton walks over several tiles a program; on the CPU, blocks of 64 tokens."""
    monkeypatch.setattr(import_module("dsa_kernels.moe_router.triton"), "MAX_PROGRAMS", 3)
    logits = torch.randn(75 if tier.interpreted else 1000, 128, device=tier.device)
    with tier:
        check(dsa_kernels.moe_router(logits, 4), logits, 4, True)


def test_row_stride(tier):
    logits = torch.randn(30, 50, device=tier.device)[::2, 7:47]
    with tier:
        check(dsa_kernels.moe_router(logits, 4), logits, 4, True)


def test_a_perturbed_row_is_noticed(tier):
    logits = torch.randn(6, 128, device=tier.device)
    with tier:
        outputs = dsa_kernels.moe_router(logits, 8)
    outputs[0][3, 2] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="weights: row 3"):
        check(outputs, logits, 8, True)


def test_same_bits_whatever_the_batch(tier):
    """A row's outputs do not depend on the rows around it, and two runs agree in every bit."""
    logits = torch.randn(30 if tier.interpreted else 90, 128, device=tier.device)
    with tier:
        first, second = (dsa_kernels.moe_router(logits, 8) for _ in range(2))
        part = dsa_kernels.moe_router(logits[10:27], 8)
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert torch.equal(first[0][10:27], part[0]) and torch.equal(first[1][10:27], part[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "tokens, num_experts, topk", [(0, 16, 2), (40, 128, 8), (13, 60, 6), (3, 5, 5)]
)
def test_backward(tier, tokens, num_experts, topk, normalize, dtype):
    logits = (2 * torch.randn(tokens, num_experts, device=tier.device)).to(dtype)
    dweights = torch.randn(tokens, topk, device=tier.device)
    dprob_sum = torch.randn(num_experts, device=tier.device)

    def gradient(function, x, scale):
        x = x.detach().requires_grad_()
        weights, _, _, prob_sum = function(x)
        loss = (weights * dweights.to(scale)).sum() + (prob_sum * dprob_sum.to(scale)).sum()
        return torch.autograd.grad(loss, x)[0]

    with tier:
        actual = gradient(
            lambda x: dsa_kernels.moe_router(x, topk, normalize=normalize), logits, torch.float32
        )
    exact = gradient(lambda x: reference(x, topk, normalize), logits.double(), torch.float64)
    same_precision = gradient(lambda x: reference(x, topk, normalize), logits, torch.float32)
    assert actual.dtype == dtype
    weights, ids, _, _ = reference(logits.double(), topk, normalize)
    if tokens:
        prob = logits.double().softmax(-1).amax(-1)
        scale = dweights.abs().amax(-1) * weights.amax(-1) + dprob_sum.abs().max() * prob
        assert_close("dlogits", actual, exact, same_precision, scale)
    written_out = reference_bwd(
        dweights.double(), dprob_sum.double(), logits.double(), ids, normalize
    )
    torch.testing.assert_close(written_out, exact)


def test_backward_of_one_output(tier):
    """Gradients that autograd leaves out count as zero; a NaN row stays alone."""
    logits = torch.randn(20, 30, device=tier.device)
    logits[4, 7] = torch.nan
    dweights = torch.randn(20, 3, device=tier.device)
    dprob_sum = torch.randn(30, device=tier.device)
    for output, gradient in ((0, dweights), (3, dprob_sum)):
        x = logits.clone().requires_grad_()
        with tier:
            dsa_kernels.moe_router(x, 3)[output].backward(gradient)
        y = logits.double().requires_grad_()
        reference(y, 3, True)[output].backward(gradient.double())
        z = logits.clone().requires_grad_()
        reference(z, 3, True)[output].backward(gradient)
        scale = gradient.abs().max() * reference(y, 3, True)[0].amax(-1).nan_to_num(0)
        assert_close("dlogits", x.grad, y.grad, z.grad, scale)
        assert x.grad.isnan().any(1).nonzero().tolist() == [[4]]


def test_backward_never_trusts_ids(tier):
    logits = torch.randn(6, 10, device=tier.device)
    ids = torch.tensor([[0, 2**31 - 1], [-1, 9], [10, 3], [-(2**31), -7], [4, 5], [8, -1]])
    ids = ids.int().to(tier.device)
    dweights = torch.randn(6, 2, device=tier.device)
    for normalize in (True, False):
        with tier:
            actual = torch.ops.dsa_kernels.moe_router_bwd(dweights, None, logits, ids, normalize)
        rows = [0, 1, 2, 4, 5]  # row 3 chose nothing: 0 / 0 where normalised
        expected = reference_bwd(dweights, None, logits, ids, normalize)
        torch.testing.assert_close(actual[rows], expected[rows])


def test_load_balancing_loss():
    """1 x coefficient ("switch") and topk x coefficient ("hf") at balance; "hf" is Hugging Face's formula."""
    logits = torch.randn(64, 16, dtype=torch.float32, requires_grad=True)
    _, ids, counts, prob_sum = dsa_kernels.moe_router(logits, 4)
    sizes = dict(num_tokens=64, topk=4)
    mask = torch.nn.functional.one_hot(ids.long(), 16).float()  # load_balancing_loss_func
    expected = 16 * (mask.mean(0) * logits.softmax(-1).mean(0)).sum()
    actual = dsa_kernels.load_balancing_loss(counts, prob_sum, scaling="hf", **sizes)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, logits, retain_graph=True)[0],
        torch.autograd.grad(expected, logits)[0],
        atol=1e-7,
        rtol=1e-5,
    )
    switch = dsa_kernels.load_balancing_loss(counts, prob_sum, coefficient=0.01, **sizes)
    torch.testing.assert_close(switch, 0.01 * expected / 4)

    balanced = (torch.full((16,), 16), torch.full((16,), 4.0))
    assert dsa_kernels.load_balancing_loss(*balanced, **sizes) == 1
    assert dsa_kernels.load_balancing_loss(*balanced, scaling="hf", **sizes) == 4
    nothing = (torch.zeros(16).int(), torch.zeros(16))
    assert dsa_kernels.load_balancing_loss(*nothing, num_tokens=0, topk=4) == 0
    with pytest.raises(ValueError, match="scaling: expected switch or hf, got mean"):
        dsa_kernels.load_balancing_loss(*balanced, scaling="mean", **sizes)
    with pytest.raises(ValueError, match="prob_sum: expected shape"):
        dsa_kernels.load_balancing_loss(balanced[0], balanced[1][1:], **sizes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    logits = torch.randn(9, 20, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.dsa_kernels.moe_router.default, (logits, 3, True))
    ids = reference(logits, 3, True)[1]
    grads = torch.randn(9, 3, device=device), torch.randn(20, device=device)
    args = (*grads, logits.detach(), ids, True)
    torch.library.opcheck(torch.ops.dsa_kernels.moe_router_bwd.default, args)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    def train(x):
        weights, ids, counts, prob_sum = dsa_kernels.moe_router(x, 4)
        routing = dsa_kernels.routing_map(ids, 32)
        loss = dsa_kernels.load_balancing_loss(counts, prob_sum, num_tokens=10, topk=4)
        return (weights * routing.slot_row).sum() + loss

    logits = torch.randn(10, 32, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(train(logits), logits)
    (actual,) = torch.autograd.grad(torch.compile(train, fullgraph=True)(logits), logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 3000])
def test_cuda_graph_replay_with_other_inputs(tokens):
    logits = torch.randn(tokens, 128, device="cuda")
    dweights = torch.randn(tokens, 8, device="cuda")

    def step():
        outputs = dsa_kernels.moe_router(logits, 8)
        args = (dweights, None, logits, outputs[1], True)
        return *outputs, torch.ops.dsa_kernels.moe_router_bwd(*args)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    logits.copy_(torch.randn(tokens, 128))
    graph.replay()
    check(captured[:4], logits, 8, True)
    assert all(torch.equal(x, y) for x, y in zip(captured, step()))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    logits = torch.as_strided(torch.randn(2**31 + 2**20, device="cuda"), (3, 128), (2**30, 1))
    check(dsa_kernels.moe_router(logits, 8), logits, 8, True)
    logits = torch.randn(2**24 + 5, 128, device="cuda", dtype=torch.bfloat16)
    _, ids, _, _ = dsa_kernels.moe_router(logits, 8)
    assert torch.equal(ids[-64:], reference(logits[-64:], 8, True)[1])


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    logits = torch.randn(20, 16, device="cuda")
    check(dsa_kernels.moe_router(cupy.from_dlpack(logits), 2), logits, 2, True)


BAD = {
    "logits: expected float32 or bfloat16, got float64": lambda x: ((x.double(), 4), {}),
    "logits: expected shape": lambda x: ((x[0], 4), {}),
    "logits: expected the last dimension contiguous": lambda x: ((x.T, 2), {}),
    "logits: expected 1 to 1024 experts, got 1025": lambda x: ((x.new_empty(2, 1025), 4), {}),
    "logits: expected 1 to 1024 experts, got 0": lambda x: ((x[:, :0], 1), {}),
    "logits: expected a torch.Tensor": lambda x: (([1.0], 4), {}),
    "topk: expected an integer >= 1 and <= 10, got 0": lambda x: ((x, 0), {}),
    "topk: expected an integer >= 1 and <= 10, got 11": lambda x: ((x, 11), {}),
    "normalize: expected True or False, got yes": lambda x: ((x, 4), {"normalize": "yes"}),
}


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        args, kwargs = BAD[message](torch.randn(3, 10, device="cpu" if mode == "fake" else mode))
        return dsa_kernels.moe_router(*args, **kwargs)

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()


BAD_GRADIENT = {
    "ids: expected int32": lambda dw, dp, x, ids: (dw, dp, x, ids.long(), True),
    "ids: expected shape": lambda dw, dp, x, ids: (dw, dp, x, ids[1:], True),
    "dweights: expected float32": lambda dw, dp, x, ids: (dw.double(), dp, x, ids, True),
    "dweights: expected a contiguous": lambda dw, dp, x, ids: (dw.T.contiguous().T, dp, x, ids, True),
    "dprob_sum: expected shape": lambda dw, dp, x, ids: (dw, dp[1:], x, ids, True),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_GRADIENT)
def test_bad_gradient(message):
    ids = torch.zeros(3, 2, dtype=torch.int32)
    args = BAD_GRADIENT[message](torch.randn(3, 2), torch.randn(10), torch.randn(3, 10), ids)
    with pytest.raises(ValueError, match=message):
        torch.ops.dsa_kernels.moe_router_bwd(*args)
