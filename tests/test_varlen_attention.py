import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels.varlen_attention.reference import varlen_attention as reference
from dsa_kernels.varlen_attention.reference import varlen_attention_bwd as reference_bwd

OP = "varlen_attention"
CPU_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def cumulative(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def problem(lengths_q, lengths_k, heads, kv_heads, dim, dtype, device="cpu"):
    q = torch.randn(sum(lengths_q), heads, dim)
    k, v = torch.randn(2, sum(lengths_k), kv_heads, dim)
    tensors = [x.to(device, dtype) for x in (q, k, v)]
    return [*tensors, cumulative(lengths_q, device), cumulative(lengths_k, device)]


def sdpa(q, k, v, cu_q, cu_k, causal):
    """The oracle: torch's own attention, one sequence at a time."""
    outs = []
    for s in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        queries, keys_s, values = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        mask = torch.ones(queries.shape[2], keys_s.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(keys_s.shape[2] - queries.shape[2]) if causal else mask
        out = F.scaled_dot_product_attention(
            queries, keys_s, values, attn_mask=mask, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def with_gradients(function, tensors, dout):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def assert_as_good(actual, expected, baseline):
    """The error of every row against float64 is at most twice the baseline's largest, plus four ulp of the largest value.

    Not twice that of its own row: a row of torch may be exact by luck.
    """
    error, allowed = ((x.double() - expected).abs().amax(-1) for x in (actual, baseline))
    floor = 4 * torch.finfo(actual.dtype).eps * expected.abs().max()
    assert not actual.isnan().any()
    assert (error <= 2 * allowed.max() + floor).all(), error.max() - 2 * allowed.max() - floor


def shapes(tier):
    """Lengths that cross blocks; few and short in the interpreter, which takes seconds a program."""
    return ([70, 1], [90, 5]) if tier.interpreted else ([130, 1, 300, 64], [130, 40, 333, 64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, causal", [(2, 1, 128, True), (1, 1, 72, False), (3, 1, 64, True)]
)
def test_equals_sdpa(tier, heads, kv_heads, dim, causal, dtype):
    if tier.interpreted and (dtype is torch.float32) == (dim == 128):
        pytest.skip("the interpreter takes seconds a program: one dtype a shape")
    *tensors, cu_q, cu_k = problem(*shapes(tier), heads, kv_heads, dim, dtype, tier.device)
    dout = torch.randn_like(tensors[0])

    def ours(q, k, v):
        return dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k, causal=causal)[0]

    def oracle(q, k, v):
        return sdpa(q, k, v, cu_q.tolist(), cu_k.tolist(), causal)

    with tier:
        actual = with_gradients(ours, tensors, dout)
    baseline = with_gradients(oracle, tensors, dout)
    expected = with_gradients(oracle, [x.double() for x in tensors], dout)
    for a, e, b in zip(actual, expected, baseline):
        assert_as_good(a, e, b)


def test_gradient_through_both_outputs(tier):
    *tensors, cu_q, cu_k = problem([5, 20], [9, 18], 2, 1, 64, torch.float32, tier.device)
    dout, dlse = torch.randn(25, 2, 64).to(tier.device), torch.randn(25, 2).to(tier.device)

    def definition(q, k, v):
        return reference(q, k, v, cu_q, cu_k, True, 0.3, False)

    def ours(q, k, v):
        return dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k, softmax_scale=0.3)

    def gradients(function, leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out, lse = function(*leaves)
        lse = torch.where(lse.isinf(), 0, lse)  # rows without a key
        return torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), leaves)

    with tier:
        actual = gradients(ours, tensors)
    expected = gradients(definition, [x.double() for x in tensors])
    lengths = (cu_q, cu_k, True, 0.3, False)
    baseline = reference_bwd(dout, dlse, *tensors, *definition(*tensors), *lengths)
    for a, e, b in zip(actual, expected, baseline):
        assert_as_good(a, e, b)


def test_reference_backward_is_the_gradient_of_the_reference():
    *tensors, cu_q, cu_k = problem([5, 20, 3], [9, 18, 3], 4, 2, 64, torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    out, lse = reference(*leaves, cu_q, cu_k, True, 0.3, False)
    dout, dlse = torch.randn_like(out), torch.where(lse.isinf(), 0, torch.randn_like(lse))
    expected = torch.autograd.grad(
        (out * dout).sum() + (lse.nan_to_num(neginf=0) * dlse).sum(), leaves
    )
    actual = reference_bwd(dout, dlse, *tensors, out, lse, cu_q, cu_k, True, 0.3, False)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    "boundaries_q, boundaries_k",
    [
        ([3, 3, 9], [0, 4, 20]),  # empty sequence, tokens and keys outside all sequences, more keys
        ([0, 7, 12], [0, 2, 2]),  # fewer keys than queries, no keys
        ([-5, 8, 4, 99], [9, 2, 30, -(2**31)]),  # garbage
        ([0], [0]),  # no sequence
    ],
)
def test_edges(tier, boundaries_q, boundaries_k):
    q, k, v, _, _ = problem([12], [20], 2, 1, 64, torch.float32, tier.device)
    cu_q, cu_k = (torch.tensor(x).int().to(tier.device) for x in (boundaries_q, boundaries_k))
    check_against_reference(tier, q, k, v, cu_q, cu_k)


def check_against_reference(tier, q, k, v, cu_q, cu_k):
    dout, dlse = torch.randn_like(q), torch.randn(q.shape[:2], device=q.device)
    scale = q.shape[-1] ** -0.5
    with tier:
        out, lse = dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k)
        grads = torch.ops.dsa_kernels.varlen_attention_bwd(
            dout, dlse, q, k, v, out, lse, cu_q, cu_k, True, scale, True
        )
    expected_out, expected_lse = reference(q, k, v, cu_q, cu_k, True, scale, False)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    expected = reference_bwd(dout, dlse, q, k, v, out, lse, cu_q, cu_k, True, scale, False)
    for a, e in zip(grads, expected):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tokens, keys", [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_attend(tier, tokens, keys):
    q, k, v, cu_q, cu_k = problem([tokens], [keys], 2, 1, 64, torch.bfloat16, tier.device)
    check_against_reference(tier, q, k, v, cu_q, cu_k)


@settings(max_examples=6)
@given(st.data())
def test_property(tier, data):
    extreme = st.sampled_from([-(2**31), 2**31 - 1])
    sequences = data.draw(st.integers(0, 3), "sequences")
    boundaries = st.lists(
        st.integers(-3, 40) | extreme, min_size=sequences + 1, max_size=sequences + 1
    )
    cu_q, cu_k = data.draw(boundaries, "q"), data.draw(boundaries, "k")
    if data.draw(st.booleans(), "ascending"):
        cu_q, cu_k = sorted(cu_q), sorted(cu_k)
    tokens, keys = data.draw(st.integers(0, 30), "T"), data.draw(st.integers(0, 40), "L")
    q, k, v, _, _ = problem([tokens], [keys], 1, 1, 64, torch.float32, tier.device)
    cu_q, cu_k = (torch.tensor(x).int().to(tier.device) for x in (cu_q, cu_k))
    check_against_reference(tier, q, k, v, cu_q, cu_k)


def test_garbage_outside_the_sequences_does_not_matter(tier):
    q, k, v, _, _ = problem([30], [40], 2, 1, 64, torch.float32, tier.device)
    cu_q, cu_k = torch.tensor([[4, 25], [7, 33]]).int().to(tier.device)
    clean = [q.clone(), k.clone(), v.clone()]
    for x, begin, end in ((q, 4, 25), (k, 7, 33), (v, 7, 33)):
        x[:begin], x[end:] = torch.nan, torch.inf
    with tier:
        out, lse = dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k)
        expected = dsa_kernels.varlen_attention(*clean, cu_q, cu_k)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_nan_in_a_visible_key_reaches_the_rows_that_see_it(tier):
    q, k, v, cu_q, cu_k = problem([6], [6], 1, 1, 64, torch.float32, tier.device)
    k[3] = torch.nan
    with tier:
        out, _ = dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k)
    assert out.isnan().flatten(1).any(1).tolist() == [False, False, False, True, True, True]


def test_slices_of_a_fused_projection(tier):
    fused = torch.randn(20, 4, 64, device=tier.device)
    q, k, v = fused[:, :2], fused[:, 2:3], fused[:, 3:]
    cu = cumulative([20], tier.device)
    with tier:
        actual = dsa_kernels.varlen_attention(q, k, v, cu, cu)
        expected = dsa_kernels.varlen_attention(*(x.contiguous() for x in (q, k, v)), cu, cu)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_same_bits_on_every_run_and_whatever_the_batch(tier):
    *tensors, cu_q, cu_k = problem([20, 33], [20, 40], 2, 1, 64, torch.bfloat16, tier.device)
    dout = torch.randn_like(tensors[0])

    def run(q, k, v):
        return dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k, deterministic=True)[0]

    with tier:
        first, second = (with_gradients(run, tensors, dout) for _ in range(2))
        alone = dsa_kernels.varlen_attention(
            tensors[0][20:], *(x[20:] for x in tensors[1:]), cu_q[1:] - 20, cu_k[1:] - 20
        )[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(first[0][20:], alone)


def test_a_perturbed_row_is_noticed(tier):
    q, k, v, cu_q, cu_k = problem([10], [10], 1, 1, 64, torch.float32, tier.device)
    with tier:
        before, _ = dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k)
        v[6] += 1e-2
        after, _ = dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k)
    assert (before != after).flatten(1).any(1).tolist() == [False] * 6 + [True] * 4


@pytest.mark.parametrize("device", CPU_GPU)
def test_opcheck(device):
    *tensors, cu_q, cu_k = problem([5, 3], [5, 4], 2, 1, 64, torch.float32, device)
    tensors = [x.requires_grad_() for x in tensors]
    args = (*tensors, cu_q, cu_k, True, 0.125, False)
    torch.library.opcheck(torch.ops.dsa_kernels.varlen_attention.default, args)


@pytest.mark.parametrize("device", CPU_GPU)
def test_compiles_without_a_graph_break(device):
    q, k, v, cu_q, cu_k = problem([5, 3], [5, 4], 2, 1, 64, torch.float32, device)
    q.requires_grad_()

    def loss(q):
        out, lse = dsa_kernels.varlen_attention(q * 2, k, v, cu_q, cu_k)
        return out.square().sum() + lse.sum()

    (expected,) = torch.autograd.grad(loss(q), q)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q), q)
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_inputs():
    q, k, v, cu_q, cu_k = problem([100, 200], [100, 200], 4, 2, 64, torch.float32, "cuda")
    scale = 0.125
    dout = torch.randn_like(q)

    def step():
        out, lse = dsa_kernels.varlen_attention(q, k, v, cu_q, cu_k, softmax_scale=scale)
        return torch.ops.dsa_kernels.varlen_attention_bwd(
            dout, None, q, k, v, out, lse, cu_q, cu_k, True, scale, False
        ), out  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads, out = step()
    q.copy_(torch.randn_like(q))
    cu_q.copy_(torch.tensor([0, 17, 300]))
    cu_k.copy_(torch.tensor([0, 60, 290]))
    graph.replay()
    expected, lse = reference(q, k, v, cu_q, cu_k, True, scale, False)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    expected = reference_bwd(dout, None, q, k, v, expected, lse, cu_q, cu_k, True, scale, False)
    for a, e in zip(grads, expected):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    tokens, heads, dim = 2**19, 33, 128  # T * H * D = 2^31 + 2^26
    q = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
    q[-64:] = torch.randn(64, heads, dim)
    cu = torch.tensor([0, tokens - 64, tokens], dtype=torch.int32, device="cuda")
    cu_empty = torch.tensor([0, 0, 64], dtype=torch.int32, device="cuda")
    k, v = torch.randn(2, 64, 1, dim, dtype=torch.bfloat16, device="cuda")
    out, _ = dsa_kernels.varlen_attention(q, k, v, cu, cu_empty)
    tail = cu[1:] - cu[1]
    expected, _ = dsa_kernels.varlen_attention(q[-64:], k, v, tail, tail)
    assert torch.equal(out[-64:], expected) and not out[:-64].any()


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    args = problem([5], [5], 2, 1, 64, torch.float32, "cuda")
    out, _ = dsa_kernels.varlen_attention(*map(cupy.from_dlpack, args))
    assert torch.equal(out, dsa_kernels.varlen_attention(*args)[0])


BAD = {
    "q: expected float32 or bfloat16, got float64": lambda a: {**a, "q": a["q"].double()},
    "q: expected shape": lambda a: {**a, "q": a["q"][0]},
    "q: expected a head dim in": lambda a: {**a, "q": a["q"][..., :32].contiguous()},
    "q: expected the last 2 dimensions contiguous": lambda a: {**a, "q": a["q"][:, ::2]},
    "k: expected float32, got bfloat16": lambda a: {**a, "k": a["k"].bfloat16()},
    "k: expected a number of heads that divides": lambda a: {**a, "k": a["k"].repeat(1, 3, 1), "v": a["v"].repeat(1, 3, 1)},
    "v: expected shape": lambda a: {**a, "v": a["v"][1:]},
    "cu_seqlens_q: expected int32": lambda a: {**a, "cu_seqlens_q": a["cu_seqlens_q"].long()},
    "cu_seqlens_q: expected shape": lambda a: {**a, "cu_seqlens_q": a["cu_seqlens_q"][:0]},
    "cu_seqlens_k: expected shape": lambda a: {**a, "cu_seqlens_k": a["cu_seqlens_k"][1:]},
    "softmax_scale: expected a finite positive number": lambda a: {**a, "softmax_scale": -1.0},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
        device = "cpu" if mode == "fake" else mode
        lengths = torch.zeros(3, dtype=torch.int32, device=device)
        q, k = torch.randn(6, 4, 64, device=device), torch.randn(6, 1, 64, device=device)
        args = BAD[message](dict(zip(names, (q, k, k, lengths, lengths))))
        positional = [args.pop(name) for name in names]
        return dsa_kernels.varlen_attention(*positional, **args)

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()
