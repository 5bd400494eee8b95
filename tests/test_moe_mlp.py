import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import dsa_kernels
from dsa_kernels import RoutingMap
from dsa_kernels.moe_mlp.reference import moe_mlp as reference
from dsa_kernels.moe_mlp.reference import moe_mlp_bwd as reference_bwd

OP = "moe_mlp"
NAMES = ("dx", "dw13", "dw2", "dweights")
# tokens, hidden, expert width, experts, topk, dtype: every tile of the Triton tables, odd sizes, one of everything
CASES = [
    (9, 24, 10, 5, 3, torch.float32),
    (9, 24, 10, 5, 3, torch.bfloat16),
    (20, 48, 32, 6, 4, torch.float32),
    (20, 48, 32, 6, 4, torch.bfloat16),
    (20, 48, 48, 3, 3, torch.bfloat16),
    (24, 48, 80, 2, 3, torch.bfloat16),
    (66, 80, 144, 2, 2, torch.bfloat16),
    (1, 16, 16, 1, 1, torch.bfloat16),
]


def layer(tokens, hidden, width, experts, topk, dtype, device):
    """x, w13, w2, weights"""
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    w13 = (torch.randn(experts, 2 * width, hidden, device=device) / hidden**0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, width, device=device) / width**0.5).to(dtype)
    return x, w13, w2, torch.rand(tokens, topk, device=device)


def random_ids(tokens, experts, topk, device):
    """Distinct experts a token, some dropped, the last expert without tokens if there are several."""
    ids = torch.rand(tokens, max(experts - 1, 1)).argsort(-1)[:, :topk].int()
    ids = F.pad(ids, (0, topk - ids.shape[1]), value=-1)
    return torch.where(torch.rand(tokens, topk) < 0.1, -1, ids).int().to(device)


def map_of(ids, experts):
    routing = dsa_kernels.routing_map(ids, experts)
    return routing.offsets, routing.row_token, routing.slot_row


def check_forward(out, inputs, maps):
    exact, _ = reference(*(t.double() for t in inputs), *maps, True)
    scale = exact.abs().amax(-1)
    if out.dtype == torch.bfloat16:  # act and y are rounded too: 2 * 2^-9 = 2^13 * 4 * 2^-23
        scale = scale * 2**13
    assert_close("out", out, exact, reference(*inputs, *maps, True)[0], scale)


def check_backward(grads, dout, inputs, maps):
    wide = [t.double() for t in inputs]
    exact = reference_bwd(dout.double(), wide[0], None, *wide[1:], *maps)
    same = reference_bwd(dout, inputs[0], None, *inputs[1:], *maps)
    for name, got, want, torch_got in zip(NAMES, grads, exact, same):
        # A row of a gradient hangs on few rounded numbers: torch's own error is measured over the whole tensor.
        got, want, torch_got = (t.reshape(1, -1) for t in (got, want, torch_got))
        assert_close(
            name, got, want, torch_got, want.abs().amax()[None] * inputs[0].shape[-1] ** 0.5
        )


@pytest.mark.parametrize("tokens, hidden, width, experts, topk, dtype", CASES)
def test_forward_and_backward(tier, tokens, hidden, width, experts, topk, dtype):
    inputs = layer(tokens, hidden, width, experts, topk, dtype, tier.device)
    ids = random_ids(tokens, experts, topk, tier.device)
    dout = torch.randn_like(inputs[0])
    leaves = [t.clone().requires_grad_() for t in inputs]
    with tier:
        out = dsa_kernels.moe_mlp(*leaves, ids)
        grads = torch.autograd.grad(out, leaves, dout)
        with torch.no_grad():
            inference = dsa_kernels.moe_mlp(*leaves, ids)
    maps = map_of(ids, experts)
    check_forward(out, inputs, maps)
    check_backward(grads, dout, inputs, maps)
    assert torch.equal(inference, out)
    idle = maps[0][1:] == maps[0][:-1]
    assert (grads[1][idle] == 0).all() and (grads[2][idle] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_a_loop_over_experts(tier, dtype):
    """The experts module of Hugging Face's Qwen3-MoE, which uses no map."""
    inputs = x, w13, w2, weights = layer(15, 32, 48, 4, 2, dtype, tier.device)
    ids = random_ids(15, 4, 2, tier.device)

    def loop(x, w13, w2, weights):
        out = torch.zeros_like(x)
        for e in range(len(w13)):
            token, slot = torch.where(ids == e)
            gate, up = F.linear(x[token], w13[e]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, w2[e]) * weights[token, slot, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out

    with tier:
        out = dsa_kernels.moe_mlp(x, w13, w2, weights, ids)
    assert_close("out", out, loop(*(t.double() for t in inputs)), loop(*inputs))


def test_skewed_routing(tier):
    """Every token picks the same expert, some twice."""
    inputs = layer(40, 32, 16, 5, 2, torch.bfloat16, tier.device)
    ids = torch.tensor([[3, -1], [3, 3]], dtype=torch.int32, device=tier.device).repeat(20, 1)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with tier:
        out = dsa_kernels.moe_mlp(*leaves, ids)
        grads = torch.autograd.grad(out.float().sum(), leaves)
    check_forward(out, inputs, map_of(ids, 5))
    check_backward(grads, torch.ones_like(out), inputs, map_of(ids, 5))


@pytest.mark.parametrize("tokens, topk", [(0, 2), (6, 2), (6, 0)])
def test_no_rows(tier, tokens, topk):
    leaves = [
        t.requires_grad_() for t in layer(tokens, 32, 16, 3, topk, torch.bfloat16, tier.device)
    ]
    ids = torch.full((tokens, topk), -1, dtype=torch.int32, device=tier.device)
    row = torch.full((tokens * topk,), -1, dtype=torch.int32, device=tier.device)
    offsets = torch.zeros(4, dtype=torch.int32, device=tier.device)
    with tier:
        out = dsa_kernels.moe_mlp(*leaves, RoutingMap(offsets, row, ids))
        grads = torch.autograd.grad(out.float().sum(), leaves)
    assert out.shape == (tokens, 32) and (out == 0).all()
    for leaf, grad in zip(leaves, grads):
        assert grad.shape == leaf.shape and (grad == 0).all()


def test_experts(tier):
    """The expert-parallel seam: expert-major rows in, the same rows out."""
    x, w13, w2, _ = layer(24, 48, 32, 4, 1, torch.bfloat16, tier.device)
    offsets = torch.tensor([2, 12, 12, 15, 21], dtype=torch.int32, device=tier.device)
    leaves = [t.clone().requires_grad_() for t in (x, w13, w2)]
    dout = torch.randn_like(x)
    with tier:
        out = dsa_kernels.experts(*leaves, offsets)
        grads = torch.autograd.grad(out, leaves, dout)
    row = torch.arange(24, dtype=torch.int32, device=tier.device)
    inputs = x, w13, w2, torch.ones(24, 1, device=tier.device)
    maps = offsets, row, row[:, None]
    check_forward(out, inputs, maps)
    check_backward(
        (*grads, reference_bwd(dout, x, None, *inputs[1:], *maps)[3]), dout, inputs, maps
    )
    assert (out[:2] == 0).all() and (out[21:] == 0).all()


def test_strides(tier):
    x, w13, w2, weights = layer(18, 64, 32, 8, 2, torch.bfloat16, tier.device)
    inputs = x[::2, :48], w13[::2, 16:48, :48], w2[::2, :48, :16], weights[::2].contiguous()
    ids = random_ids(9, 4, 2, tier.device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    dout = torch.randn(48, 9, device=tier.device).bfloat16().T
    with tier:
        out = dsa_kernels.moe_mlp(*leaves, ids)
        grads = torch.autograd.grad(out, leaves, dout)
    check_forward(out, inputs, map_of(ids, 4))
    check_backward(grads, dout, inputs, map_of(ids, 4))


@settings(max_examples=8)
@given(st.data())
def test_any_map(tier, data):
    """Offsets, tokens and rows of any value: what is out of range is empty, and what no one uses may be NaN."""
    tokens = data.draw(st.integers(0, 8), "tokens")
    topk = data.draw(st.integers(1, 3), "topk")
    garbage = st.integers(-2, tokens * topk + 2) | st.integers(-(2**31), 2**31 - 1)

    def int32(n, name):
        values = data.draw(st.lists(garbage, min_size=n, max_size=n), name)
        return torch.tensor(values, dtype=torch.int32, device=tier.device)

    x, w13, w2, weights = layer(tokens, 16, 8, 3, topk, torch.float32, tier.device)
    offsets, row_token = int32(4, "offsets"), int32(tokens * topk, "row_token")
    slot_row = int32(tokens * topk, "slot_row").view(tokens, topk)
    bounds = offsets.clamp(0, tokens * topk).cummax(0).values
    used = row_token[bounds[0] : bounds[-1]]
    x[~torch.isin(torch.arange(tokens, device=tier.device), used)] = torch.nan
    with tier:
        out, h = torch.ops.dsa_kernels.moe_mlp(
            x, w13, w2, weights, offsets, row_token, slot_row, True
        )
        torch.ops.dsa_kernels.moe_mlp_bwd(
            torch.ones_like(x), x, h, w13, w2, weights, offsets, row_token, slot_row
        )
    expected, _ = reference(x, w13, w2, weights, offsets, row_token, slot_row, True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_same_bits_again(tier):
    inputs = layer(20, 32, 16, 3, 2, torch.bfloat16, tier.device)
    ids = random_ids(20, 3, 2, tier.device)

    def run():
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = dsa_kernels.moe_mlp(*leaves, ids)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    with tier:
        for first, second in zip(run(), run()):
            assert torch.equal(first, second)


def test_a_perturbed_row_is_noticed(tier):
    inputs = layer(12, 32, 16, 3, 2, torch.bfloat16, tier.device)
    ids = random_ids(12, 3, 2, tier.device)
    ids[5] = torch.tensor([0, 1])
    with tier:
        check_forward(dsa_kernels.moe_mlp(*inputs, ids), inputs, map_of(ids, 3))
        ids[5, 1] = -1
        dropped = dsa_kernels.moe_mlp(*inputs, ids)
    ids[5, 1] = 1
    with pytest.raises(AssertionError, match="row 5"):
        check_forward(dropped, inputs, map_of(ids, 3))


def test_saves_x_and_h_only(tier):
    x, w13, w2, weights = layer(10, 32, 16, 3, 2, torch.bfloat16, tier.device)
    ids = random_ids(10, 3, 2, tier.device)
    saved = []
    with (
        tier,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        dsa_kernels.moe_mlp(x.requires_grad_(), w13, w2, weights, ids)
    activations = [
        t.numel() for t in saved if t.is_floating_point() and t.shape not in (w13.shape, w2.shape)
    ]
    assert sorted(activations) == sorted([x.numel(), 20 * 32, weights.numel()])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    inputs = layer(6, 16, 8, 3, 2, torch.float32, device)
    maps = map_of(random_ids(6, 3, 2, device), 3)
    ops = torch.ops.dsa_kernels
    torch.library.opcheck(ops.moe_mlp.default, (*inputs, *maps, False))
    torch.library.opcheck(ops.moe_mlp.default, (*(t.requires_grad_() for t in inputs), *maps, True))
    x, *rest = (t.detach() for t in inputs)
    h = ops.moe_mlp(x, *rest, *maps, True)[1]
    torch.library.opcheck(ops.moe_mlp_bwd.default, (torch.randn_like(x), x, h, *rest, *maps))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    x, w13, w2, weights = layer(6, 16, 8, 3, 2, torch.float32, device)
    ids = random_ids(6, 3, 2, device)
    compiled = torch.compile(
        lambda x: dsa_kernels.moe_mlp(x, w13, w2, weights, ids), fullgraph=True
    )
    leaf = x.clone().requires_grad_()
    out = compiled(leaf)
    out.sum().backward()
    maps = map_of(ids, 3)
    torch.testing.assert_close(out, reference(x, w13, w2, weights, *maps, True)[0])
    expected = reference_bwd(torch.ones_like(x), x, None, w13, w2, weights, *maps)[0]
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton"])
def test_cuda_graph_replay_with_other_inputs(name):
    inputs = layer(64, 128, 64, 8, 2, torch.bfloat16, "cuda")
    ids = random_ids(64, 8, 2, "cuda")
    leaves = [t.clone().requires_grad_() for t in inputs]
    dout = torch.randn_like(inputs[0])

    def step():
        out = dsa_kernels.moe_mlp(*leaves, ids)
        return out, *torch.autograd.grad(out, leaves, dout)

    with dsa_kernels.use(name):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, *grads = step()
    ids.copy_(random_ids(64, 3, 2, "cuda"))
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    inputs = [t.detach() for t in leaves]
    check_forward(out, inputs, map_of(ids, 8))
    check_backward(grads, dout, inputs, map_of(ids, 8))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton"])
def test_offsets_past_2_31(name):
    """N x hidden and N x 2F pass 2^31 elements; the last tokens are checked."""
    tokens, topk = 140_000, 8
    inputs = layer(tokens, 2048, 1024, 4, topk, torch.bfloat16, "cuda")
    ids = torch.randint(0, 4, (tokens, topk), device="cuda").int()
    x, w13, w2, weights = inputs
    dout = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    with dsa_kernels.use(name):
        out = dsa_kernels.moe_mlp(leaf, w13, w2, weights, ids)
        (dx,) = torch.autograd.grad(out, leaf, dout)
    last = slice(tokens - 64, tokens)
    few = x[last], w13, w2, weights[last]
    maps = map_of(ids[last], 4)
    check_forward(out[last], few, maps)
    wide = [t.double() for t in few]
    exact = reference_bwd(dout[last].double(), wide[0], None, *wide[1:], *maps)[0]
    same = reference_bwd(dout[last], few[0], None, *few[1:], *maps)[0]
    assert_close("dx", dx[last], exact, same)


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    inputs = layer(6, 16, 8, 3, 2, torch.float32, "cuda")
    ids = random_ids(6, 3, 2, "cuda")
    out = dsa_kernels.moe_mlp(*(cupy.from_dlpack(t) for t in (*inputs, ids)))
    check_forward(out, inputs, map_of(ids, 3))


BAD = {
    "x: expected float32 or bfloat16, got float64": lambda x, a, b, w, i: (x.double(), a, b, w, i),
    "x: expected shape": lambda x, a, b, w, i: (x[0], a, b, w, i),
    "x: expected the last dimension contiguous": lambda x, a, b, w, i: (x[:, ::2], a, b, w, i),
    "w13: expected float32, got bfloat16": lambda x, a, b, w, i: (x, a.bfloat16(), b, w, i),
    "w13: expected shape .* with 2F = 16": lambda x, a, b, w, i: (x, a[:, 1:], b, w, i),
    "w2: expected shape .* with H = 16": lambda x, a, b, w, i: (x, a, b[:, 1:], w, i),
    "w2: expected the last dimension contiguous": lambda x, a, b, w, i: (x, a, b.transpose(1, 2).repeat(1, 2, 1).transpose(1, 2), w, i),
    "weights: expected float32": lambda x, a, b, w, i: (x, a, b, w.bfloat16(), i),
    "weights: expected shape": lambda x, a, b, w, i: (x, a, b, w[1:], i),
    "ids: expected int32": lambda x, a, b, w, i: (x, a, b, w, i.long()),
    "slot_row: expected shape": lambda x, a, b, w, i: (x, a, b, w, i[:, :1].contiguous()),
    "row_token: expected T \\* K rows": lambda x, a, b, w, i: (x, a, b, w, RoutingMap(i.new_zeros(4), i[0], i)),
    "offsets: expected shape .* with E\\+1 = 4": lambda x, a, b, w, i: (x, a, b, w, RoutingMap(i[0], i.flatten(), i)),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        device = "cpu" if mode == "fake" else mode
        inputs = layer(6, 16, 8, 3, 2, torch.float32, device)
        ids = torch.zeros(6, 2, dtype=torch.int32, device=device)
        return dsa_kernels.moe_mlp(*BAD[message](*inputs, ids))

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()


def test_bad_input_of_the_backward():
    x, w13, w2, weights = layer(6, 16, 8, 3, 2, torch.float32, "cpu")
    maps = map_of(random_ids(6, 3, 2, "cpu"), 3)
    bwd = torch.ops.dsa_kernels.moe_mlp_bwd
    with pytest.raises(ValueError, match=r"h: expected shape .* with N = 12"):
        bwd(x, x, x.new_zeros(0, 16), w13, w2, weights, *maps)
    with pytest.raises(ValueError, match="dout: expected float32, got bfloat16"):
        bwd(x.bfloat16(), x, x.new_zeros(12, 16), w13, w2, weights, *maps)
