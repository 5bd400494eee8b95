from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

import dsa_kernels
from dsa_kernels.norm_rope.reference import norm_rope as reference
from dsa_kernels.norm_rope.reference import norm_rope_bwd as reference_bwd

OP = "norm_rope"
EPS = 1e-6
NAMES = ("dq", "dk", "dq_weight", "dk_weight")


def make(tokens, heads, kv_heads, dim, dtype=torch.float32, device="cpu", norm=True):
    """q, k, q_weight, k_weight, cos, sin; q and k are views of one projection, as in the model."""
    projection = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
    q = projection[:, : heads * dim].view(tokens, heads, dim)
    k = projection[:, heads * dim : (heads + kv_heads) * dim].view(tokens, kv_heads, dim)
    weights = [(1 + 0.2 * torch.randn(dim, device=device)).to(dtype) if norm else None] * 2
    if norm:
        weights[1] = weights[1].flip(0).contiguous()
    angle = 100 * torch.rand(tokens, dim // 2, device=device)
    return q, k, *weights, angle.cos(), angle.sin()


def widened(inputs):
    return [None if x is None else x.double() for x in inputs]


def check(outputs, inputs, eps=EPS):
    exact, same_precision = reference(*widened(inputs), eps), reference(*inputs, eps)
    for name, got, want, torch_got in zip(("q", "k"), outputs, exact, same_precision):
        assert got.dtype == inputs[0].dtype and got.is_contiguous()
        assert_close(name, got, want, torch_got, scale=want.abs().amax(-1))


SHAPES = [
    (0, 4, 2, 64),
    (1, 32, 4, 128),
    (5, 16, 16, 72),
    (3, 3, 1, 64),
    (2, 40, 8, 128),
    (7, 5, 2, 6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tokens, heads, kv_heads, dim", SHAPES)
def test_forward(tier, tokens, heads, kv_heads, dim, norm, dtype):
    inputs = make(tokens, heads, kv_heads, dim, dtype, tier.device, norm)
    with tier:
        outputs = dsa_kernels.norm_rope(*inputs)
    check(outputs, inputs)


def test_like_hugging_face(tier):
    """Qwen3Attention: RMSNorm over the head, then q * cos + rotate_half(q) * sin with the tables repeated."""
    q, k, q_weight, k_weight, cos, sin = inputs = make(6, 8, 2, 128, device=tier.device)
    with tier:
        outputs = dsa_kernels.norm_rope(*inputs, eps=1e-5)

    def rotate_half(x):
        return torch.cat((-x[..., 64:], x[..., :64]), dim=-1)

    for got, x, weight in zip(outputs, (q, k), (q_weight, k_weight)):
        x = torch.nn.functional.rms_norm(x.double(), (128,), weight.double(), 1e-5)
        wide_cos, wide_sin = (torch.cat((t, t), -1)[:, None].double() for t in (cos, sin))
        expected = x * wide_cos + rotate_half(x) * wide_sin
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_norm_of_one_of_the_two(tier):
    q, k, q_weight, k_weight, cos, sin = make(3, 4, 2, 64, device=tier.device)
    for inputs in ((q, k, q_weight, None, cos, sin), (q, k, None, k_weight, cos, sin)):
        with tier:
            check(dsa_kernels.norm_rope(*inputs), inputs)


@given(st.data())
def test_property(tier, data):
    tokens = data.draw(st.integers(0, 4), "tokens")
    heads, kv_heads = data.draw(st.integers(0, 40), "heads"), data.draw(st.integers(0, 5), "kv")
    dim = 2 * data.draw(st.integers(1, 40), "half")
    eps = data.draw(st.sampled_from([1e-12, 1e-6, 0.5]), "eps")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    inputs = make(tokens, heads, kv_heads, dim, dtype, tier.device)
    with tier:
        check(dsa_kernels.norm_rope(*inputs, eps=eps), inputs, eps)


def test_strides(tier):
    """Heads before tokens, tables cut out of one [T, D] table, head strides that are no multiple of anything."""
    q = torch.randn(3, 7, 64, device=tier.device).transpose(0, 1)
    k = torch.randn(7, 2, 67, device=tier.device)[:, :, 1:65]
    *_, weight, _, cos, sin = make(7, 1, 1, 64, device=tier.device)
    table = torch.cat([cos, sin], -1)
    inputs = (q, k, weight, weight, table[:, :32], table[:, 32:])
    dq, dk = torch.randn_like(q).contiguous(), torch.randn_like(k).contiguous()
    with tier:
        check(dsa_kernels.norm_rope(*inputs), inputs)
        grads = torch.ops.dsa_kernels.norm_rope_bwd(dq, dk, *inputs, EPS, True)
    for got, want in zip(grads, reference_bwd(dq, dk, *inputs, EPS, True)):
        torch.testing.assert_close(got, want)


def test_a_nan_head_stays_alone(tier):
    inputs = make(3, 4, 2, 72, device=tier.device)
    inputs[0][1, 2, 71], inputs[1][0, 1, 3] = torch.nan, torch.inf
    with tier:
        q, k = dsa_kernels.norm_rope(*inputs)
    assert q.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert k.isnan().any(-1).nonzero().tolist() == [[0, 1]]


def test_a_perturbed_row_is_noticed(tier):
    inputs = make(3, 4, 2, 64, device=tier.device)
    with tier:
        outputs = dsa_kernels.norm_rope(*inputs)
    outputs[0][1, 3, 5] += 1e-4
    with pytest.raises(AssertionError, match="q: row 7"):
        check(outputs, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "tokens, heads, kv_heads, dim", [(1, 32, 4, 128), (70, 3, 1, 8), *SHAPES[2:5]]
)
def test_backward(tier, tokens, heads, kv_heads, dim, norm, dtype):
    if tokens > 64 and tier.interpreted:
        tokens = 3
    inputs = make(tokens, heads, kv_heads, dim, dtype, tier.device, norm)
    dq, dk = torch.randn_like(inputs[0]), torch.randn_like(inputs[1])

    def gradients(function, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:4] if x is not None]
        q, k = leaves[:2]
        weights = leaves[2:] if norm else (None, None)
        outputs = function(q, k, *weights, *tensors[4:])
        return torch.autograd.grad(outputs, leaves, [dq.to(q.dtype), dk.to(q.dtype)])

    with tier:
        actual = gradients(dsa_kernels.norm_rope, inputs)
    exact = gradients(lambda *x: reference(*x, EPS), widened(inputs))
    same_precision = reference_bwd(dq, dk, *inputs, EPS, True)
    written_out = reference_bwd(dq.double(), dk.double(), *widened(inputs), EPS, True)
    for name, got, want, torch_got, formula in zip(
        NAMES, actual, exact, same_precision, written_out
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(formula, want)
        gradient = dq if name.startswith("dq") else dk
        if name.endswith(
            "weight"
        ):  # one row: sums over tokens and heads of terms of size |dout| |x|
            scale = gradient.double().square().sum((0, 1)).max().sqrt() * 4
        else:
            inverse = torch.rsqrt(inputs[NAMES.index(name)].double().square().mean(-1) + EPS)
            scale = gradient.double().abs().amax(-1) * (inverse if norm else 1)
        assert_close(name, got, want, torch_got, scale)


def test_more_tokens_than_programs(tier, monkeypatch):
    """The backward in Triton walks over several tokens a program; on the CPU, blocks of 64 tokens."""
    monkeypatch.setattr(import_module("dsa_kernels.norm_rope.triton"), "MAX_PROGRAMS", 3)
    inputs = make(8 if tier.interpreted else 200, 3, 2, 16, device=tier.device)
    dq, dk = (torch.randn_like(x).contiguous() for x in inputs[:2])
    with tier:
        grads = torch.ops.dsa_kernels.norm_rope_bwd(dq, dk, *inputs, EPS, True)
    for got, want in zip(grads, reference_bwd(dq, dk, *inputs, EPS, True)):
        torch.testing.assert_close(got, want)


def test_backward_without_tokens_and_weights(tier):
    """No token gives zero weight gradients; no weight gives tensors of shape [0]."""
    inputs = make(0, 4, 2, 64, device=tier.device)
    with tier:
        grads = torch.ops.dsa_kernels.norm_rope_bwd(*inputs[:2], *inputs, EPS, False)
        bare = (*inputs[:2], None, None, *inputs[4:])
        without = torch.ops.dsa_kernels.norm_rope_bwd(*inputs[:2], *bare, EPS, False)
    assert [list(x.shape) for x in grads] == [[0, 4, 64], [0, 2, 64], [64], [64]]
    assert (grads[2] == 0).all() and (grads[3] == 0).all()
    assert [list(x.shape) for x in without] == [[0, 4, 64], [0, 2, 64], [0], [0]]


def test_deterministic(tier):
    """Two runs agree in every bit, and a token's bits do not depend on the tokens around it."""
    inputs = make(8 if tier.interpreted else 90, 2, 1, 64, torch.bfloat16, tier.device)
    part = (inputs[0][4:7], inputs[1][4:7], *inputs[2:4], inputs[4][4:7], inputs[5][4:7])
    dq, dk = (torch.randn_like(x).contiguous() for x in inputs[:2])
    with tier:
        q, k = dsa_kernels.norm_rope(*inputs)
        part_q, part_k = dsa_kernels.norm_rope(*part, deterministic=True)
        first, second = (
            torch.ops.dsa_kernels.norm_rope_bwd(dq, dk, *inputs, EPS, flag)
            for flag in (True, False)
        )
    assert torch.equal(q[4:7], part_q) and torch.equal(k[4:7], part_k)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("norm", [True, False])
def test_opcheck(device, norm):
    inputs = [x if x is None else x.requires_grad_(i < 4) for i, x in enumerate(make(4, 3, 2, 16, device=device, norm=norm))]  # fmt: skip
    torch.library.opcheck(torch.ops.dsa_kernels.norm_rope.default, (*inputs, EPS))
    inputs = [x if x is None else x.detach() for x in inputs]
    grads = [torch.randn(4, n, 16, device=device) for n in (3, 2)]
    args = (*grads, *inputs, EPS, True)
    torch.library.opcheck(torch.ops.dsa_kernels.norm_rope_bwd.default, args)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    inputs = make(5, 4, 2, 64, device=device)

    def loss(x):
        q, k = dsa_kernels.norm_rope(x * 2, *inputs[1:])
        return (q.sum(1) * k.sum(1)).sum()

    x = inputs[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_inputs():
    inputs = make(3000, 32, 4, 128, torch.bfloat16, "cuda")
    dq, dk = (torch.randn_like(x).contiguous() for x in inputs[:2])

    def step():
        outputs = dsa_kernels.norm_rope(*inputs)
        return *outputs, *torch.ops.dsa_kernels.norm_rope_bwd(dq, dk, *inputs, EPS, True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for old, new in zip(inputs, make(3000, 32, 4, 128, torch.bfloat16, "cuda")):
        old.copy_(new)
    graph.replay()
    check(captured[:2], inputs)
    assert all(torch.equal(x, y) for x, y in zip(captured, step()))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    """Tokens 2^30 elements apart, and outputs whose last token lies past 2^31 elements."""
    memory = torch.randn(2**31 + 2**20, device="cuda", dtype=torch.bfloat16)
    *_, weight, _, cos, sin = make(3, 1, 1, 128, torch.bfloat16, "cuda")
    q = torch.as_strided(memory, (3, 32, 128), (2**30, 128, 1))
    k = torch.as_strided(memory, (3, 4, 128), (2**30, 128, 1), 4096)
    inputs = (q, k, weight, weight, cos, sin)
    check(dsa_kernels.norm_rope(*inputs), inputs)

    tokens = 2**31 // 4096 + 3
    q, k = (
        memory[: tokens * 4096].view(tokens, 32, 128),
        memory[: tokens * 512].view(tokens, 4, 128),
    )
    cos, sin = (torch.rand(tokens, 64, device="cuda") for _ in range(2))
    outputs = dsa_kernels.norm_rope(q, k, weight, weight, cos, sin)
    last = (q[-3:], k[-3:], weight, weight, cos[-3:], sin[-3:])
    check([x[-3:] for x in outputs], last)
    grads = torch.ops.dsa_kernels.norm_rope_bwd(q, k, q, k, weight, weight, cos, sin, EPS, True)
    expected = reference_bwd(q[-3:], k[-3:], *last, EPS, True)
    torch.testing.assert_close(grads[0][-3:], expected[0])


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    inputs = make(6, 4, 2, 64, device="cuda")
    arrays = [cupy.from_dlpack(x.contiguous()) for x in inputs]
    check(dsa_kernels.norm_rope(*arrays), inputs)


BAD = {
    "q: expected float32 or bfloat16, got float64": lambda a: {"q": a["q"].double()},
    "q: expected shape": lambda a: {"q": a["q"][0]},
    "q: expected the last dimension contiguous": lambda a: {"q": a["q"].transpose(1, 2).contiguous().transpose(1, 2)},
    "q: expected an even head dim from 2 to 256, got 7": lambda a: {"q": a["q"][:, :, :7]},
    "q: expected an even head dim from 2 to 256, got 258": lambda a: {"q": a["q"].new_zeros(3, 4, 258)},
    "q: expected a torch.Tensor": lambda a: {"q": 1.0},
    "k: expected float32, got bfloat16": lambda a: {"k": a["k"].bfloat16()},
    "k: expected shape": lambda a: {"k": a["k"][:2]},
    "q_weight: expected shape": lambda a: {"q_weight": a["q_weight"][1:]},
    "k_weight: expected float32 or bfloat16": lambda a: {"k_weight": a["k_weight"].half()},
    "cos: expected float32": lambda a: {"cos": a["cos"].bfloat16()},
    "cos: expected shape": lambda a: {"cos": a["cos"][:, 1:]},
    "sin: expected shape": lambda a: {"sin": a["sin"][1:]},
    "eps: expected a finite positive number": lambda a: {"eps": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        inputs = make(3, 4, 2, 64, device="cpu" if mode == "fake" else mode)
        names = ("q", "k", "q_weight", "k_weight", "cos", "sin")
        arguments = dict(zip(names, inputs)) | {"eps": EPS}
        return dsa_kernels.norm_rope(**(arguments | BAD[message](arguments)))

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()


def test_bad_gradient():
    inputs = make(3, 4, 2, 64)
    for dq, dk, message in (
        (inputs[0][1:], inputs[1], "dq: expected shape"),
        (inputs[0], inputs[1], "dq: expected a contiguous tensor"),
        (inputs[0].contiguous(), inputs[1].bfloat16(), "dk: expected float32"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.dsa_kernels.norm_rope_bwd(dq, dk, *inputs, EPS, True)
