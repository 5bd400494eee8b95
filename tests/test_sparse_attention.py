import importlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels.sparse_attention.reference import sparse_attention as reference
from dsa_kernels.sparse_attention.reference import sparse_attention_bwd as reference_bwd

OP = "sparse_attention"
forward = importlib.import_module("dsa_kernels.sparse_attention.triton")
union = importlib.import_module("dsa_kernels.sparse_attention.triton_union")


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def cu_seqlens(lengths, device):
    return F.pad(int32(lengths, device).cumsum(0), (1, 0)).int()


def random_sets(lengths_q, lengths_k, topk, device):
    """Per token min(topk, visible) random visible positions, ascending, -1 in the tail."""
    rows = []
    for n_q, n_k in zip(lengths_q, lengths_k):
        for u in range(n_q):
            visible = max(n_k - n_q + u + 1, 0)
            chosen = torch.randperm(visible)[:topk].sort().values
            rows.append(F.pad(chosen, (0, topk - len(chosen)), value=-1))
    return torch.stack(rows).int().to(device) if rows else int32([], device).view(0, topk)


def problem(lengths_q, lengths_k, heads, groups, dim, topk, device, dtype=torch.float32):
    tokens, keys = sum(lengths_q), sum(lengths_k)
    q = torch.randn(tokens, heads, dim, device=device).to(dtype)
    k, v = torch.randn(2, keys, groups, dim, device=device).to(dtype)
    indices = random_sets(lengths_q, lengths_k, topk, device)
    return q, k, v, indices, cu_seqlens(lengths_q, device), cu_seqlens(lengths_k, device)


def double(args):
    return [a.double() if a.is_floating_point() else a for a in args]


def allowed(eager, exact, floor):
    """Per row, 2x the error of the same computation in torch at the inputs' precision, and a floor of a few ulp."""
    error = (eager.double() - exact).abs().flatten(1).amax(1)
    return 2 * error + floor


def row_size(x):
    return x.abs().flatten(1).amax(1)


def assert_rows(actual, exact, eager, floor):
    error = (actual.double() - exact).abs().flatten(1).amax(1)
    excess = (error - allowed(eager, exact, floor)).amax().item()
    assert excess <= 0, f"{excess} above the tolerance"


def eager_attention(q, k, v, indices, cu_q, cu_k, scale):
    """scaled_dot_product_attention with a dense mask in the inputs' dtype: an oracle and the measure of the tolerance."""
    outs = []
    for s in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        length = keys.stop - keys.start
        mask = torch.zeros(rows.stop - rows.start, length + 1, dtype=torch.bool, device=q.device)
        ids = torch.where(indices[rows] < 0, length, indices[rows]).long()
        mask = mask.scatter(1, ids, True)[:, :length]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                *(x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys))),
                attn_mask=mask, scale=scale, enable_gqa=True,
            )  # fmt: skip
        outs.append(out[0].transpose(0, 1).masked_fill(~mask.any(-1)[:, None, None], 0))
    return torch.cat(outs)


SHAPES = [  # heads, groups, dim, topk
    (8, 1, 128, 24), (4, 4, 64, 5), (6, 1, 64, 16), (32, 2, 128, 7),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, groups, dim, topk", SHAPES)
def test_forward_and_backward(tier, heads, groups, dim, topk, dtype):
    args = problem([5, 0, 21], [5, 3, 50], heads, groups, dim, topk, tier.device, dtype)
    scale = dim**-0.5
    ulp = 1e-6 if dtype == torch.float32 else 2**-8
    leaves = [x.requires_grad_() for x in args[:3]]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    eager_leaves = [x.detach().clone().requires_grad_() for x in leaves]
    exact, exact_lse = reference(*exact_leaves, *args[3:], scale, False)
    eager = eager_attention(*eager_leaves, *args[3:], scale)
    with tier:
        out, lse = dsa_kernels.sparse_attention(*args)
        assert_rows(out.detach(), exact.detach(), eager.detach(), ulp * row_size(exact.detach()))
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=5e-6)

        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    exact_gradients = torch.autograd.grad(
        (exact, exact_lse), exact_leaves, (dout.double(), dlse.double())
    )
    eager_gradients = torch.autograd.grad(eager, eager_leaves, dout)
    plain_gradients = torch.autograd.grad(
        reference(*exact_leaves, *args[3:], scale, False)[0], exact_leaves, dout.double()
    )
    for got, want, eager_grad, plain in zip(
        gradients, exact_gradients, eager_gradients, plain_gradients
    ):
        # Rows of a gradient may be small differences of large terms: the floor is that of the whole tensor.
        assert_rows(got, want, want + (eager_grad - plain), ulp * row_size(want).amax())


def run_both(tier, args, scale, deterministic=False):
    with tier:
        out, lse = torch.ops.dsa_kernels.sparse_attention(*args, scale, deterministic)
        dout = torch.ones_like(out)
        gradients = torch.ops.dsa_kernels.sparse_attention_bwd(
            dout, None, *args[:3], out, lse, *args[3:], scale, deterministic
        )
    return out, lse, *gradients


def assert_same_as_reference(tier, args, scale=0.1, deterministic=False):
    out, lse, *gradients = run_both(tier, args, scale, deterministic)
    exact, exact_lse = reference(*double(args), scale, False)
    exact_gradients = reference_bwd(
        torch.ones_like(exact), None, *double(args[:3]), exact, exact_lse, *args[3:], scale, False
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, exact_gradients):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * max(1, want.abs().max().item()) if want.numel() else 0)  # fmt: skip


def test_reference_backward_is_the_autograd_of_its_forward():
    args = double(problem([5, 9], [5, 30], 4, 2, 64, 6, "cpu"))
    leaves = [x.requires_grad_() for x in args[:3]]
    out, lse = reference(*args, 0.2, False)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    with torch.no_grad():
        got = reference_bwd(dout, dlse, *args[:3], out, lse, *args[3:], 0.2, False)
    torch.testing.assert_close(got, wanted)


def test_deterministic_form(tier):
    args = problem([20, 3], [60, 3], 4, 2, 64, 9, tier.device)
    assert_same_as_reference(tier, args, deterministic=True)


def test_deterministic_form_over_several_chunks_of_tokens(tier, monkeypatch):
    if tier.name != "triton":
        pytest.skip("the chunks are Triton's")
    backward = importlib.import_module("dsa_kernels.sparse_attention.triton_bwd")
    monkeypatch.setattr(backward, "BITMAP_BYTES", 7 * 2 * 4 * 2)  # 7 tokens of 2 x 64 keys
    args = problem([5, 12], [65, 20], 2, 1, 64, 4, tier.device)
    assert_same_as_reference(tier, args, deterministic=True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gather_where_the_union_overflows(tier, monkeypatch, deterministic):
    """The first tile's 16 tokens share their keys, the second one's are random: one by each kernel."""
    if tier.name != "triton":
        pytest.skip("the union is Triton's")
    monkeypatch.setattr(union, "UNION_CAPACITY", 128)
    args = problem([32], [300], 2, 1, 64, 40, tier.device)
    args[3][:16] = args[3][0]
    assert_same_as_reference(tier, args, deterministic=deterministic)


def test_chunks_of_tiles(tier, monkeypatch):
    if tier.name != "triton":
        pytest.skip("the chunks are Triton's")
    monkeypatch.setattr(union, "LIST_BYTES", 3000)
    assert_same_as_reference(tier, problem([40, 7], [50, 20], 2, 1, 64, 6, tier.device))


def test_union_is_the_set_of_selected_keys(tier):
    if tier.name != "triton":
        pytest.skip("the union is Triton's")
    _, k, _, indices, cu_q, cu_k = problem([35, 3], [700, 40], 1, 1, 64, 30, tier.device)
    with tier:
        (tiles, keys, masks, counts), *rest = union.union_chunks(indices, cu_q, cu_k, k.shape[0])
    assert not rest
    for (first, tokens, *_), listed, bits, count in zip(tiles.tolist(), keys, masks, counts):
        selected = indices[first : first + tokens]
        wanted = selected[selected >= 0].unique()
        assert listed[:count].tolist() == wanted.tolist()
        member = (selected[:, :, None] == wanted).any(1)  # [tokens, keys]
        weights = 1 << torch.arange(tokens, device=tier.device)
        assert bits[:count].tolist() == (member * weights[:, None]).sum(0).tolist()


def test_empty(tier):
    for lengths_q, lengths_k, topk in (([], [], 3), ([0], [4], 3), ([3], [0], 3), ([3], [3], 0)):
        args = problem(lengths_q, lengths_k, 2, 1, 64, topk, tier.device)
        out, lse, dq, dk, dv = run_both(tier, args, 0.1)
        assert not out.any() and (lse == -torch.inf).all()
        assert not dq.any() and not dk.any() and not dv.any()
        assert dk.shape == args[1].shape


def test_one_token(tier):
    assert_same_as_reference(tier, problem([1], [1], 8, 1, 128, 1, tier.device))


def test_all_visible_keys_equal_causal_attention(tier):
    """A sequence no longer than K attends to everything visible: F.scaled_dot_product_attention, causal."""
    args = problem([20], [20], 4, 2, 64, 33, tier.device)
    with tier:
        out, _ = dsa_kernels.sparse_attention(*args)
    want = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in args[:3]), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, want[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_strides(tier):
    q, k, v, indices, cu_q, cu_k = problem([20], [40], 4, 2, 64, 9, tier.device)
    wide = torch.randn(20, 8, 80, device=tier.device)
    q = wide[:, ::2, 16:]
    k, v = torch.randn(80, 2, 2, 64, device=tier.device)[::2].unbind(1)
    padded = F.pad(indices, (0, 3))[:, :9]
    assert not k.is_contiguous() and not padded.is_contiguous()
    assert_same_as_reference(tier, (q, k, v, padded, cu_q, cu_k))


def test_keys_that_no_token_selects_do_not_matter(tier):
    args = problem([9, 4], [9, 30], 2, 1, 64, 4, tier.device)
    clean = run_both(tier, args, 0.1)
    used = torch.zeros(39, dtype=torch.bool, device=tier.device)
    used[args[3][:9][args[3][:9] >= 0].long()] = True
    used[9 + args[3][9:][args[3][9:] >= 0].long()] = True
    assert not used.all()
    for x in args[1:3]:
        x[~used] = torch.nan
        x[torch.nonzero(~used)[::2, 0]] = torch.inf
    torch.testing.assert_close(run_both(tier, args, 0.1), clean)


def test_a_nan_is_not_lost(tier):
    q, k, v, indices, cu_q, cu_k = problem([3], [9], 2, 1, 64, 4, tier.device)
    k[indices[1, 0]] = torch.nan
    with tier:
        out, _ = dsa_kernels.sparse_attention(q, k, v, indices, cu_q, cu_k)
    assert out[1].isnan().all()


def test_duplicates_and_ids_outside_the_sequence(tier):
    args = problem([4, 18], [10, 30], 2, 1, 64, 8, tier.device)
    clean = run_both(tier, args, 0.1)
    repeated = args[3].repeat_interleave(2, 1)
    far = repeated.clone()
    far[repeated < 0] = int32([2**31 - 1, -(2**31), 30, -7], tier.device).repeat(200)[: (repeated < 0).sum()]  # fmt: skip
    got = run_both(tier, (*args[:3], far, *args[4:]), 0.1)
    torch.testing.assert_close(got, clean)


@settings(max_examples=8)
@given(st.data())
def test_property_lengths(tier, data):
    """cu_seqlens and indices of any value: in bounds, and equal to the reference."""
    tokens, keys = data.draw(st.integers(0, 24), "tokens"), data.draw(st.integers(0, 40), "keys")
    sequences = data.draw(st.integers(0, 3), "sequences")
    extreme = st.integers(-(2**31), 2**31 - 1)
    bounds = [
        data.draw(st.lists(st.integers(-3, n + 3) | extreme, min_size=sequences + 1, max_size=sequences + 1))
        for n in (tokens, keys)
    ]  # fmt: skip
    if data.draw(st.booleans(), "ordered"):
        bounds = [sorted(b) for b in bounds]
    indices = torch.randint(-2, keys + 3, (tokens, 5)).sort(-1).values.int().to(tier.device)
    q = torch.randn(tokens, 2, 64, device=tier.device)
    k, v = torch.randn(2, keys, 1, 64, device=tier.device)
    args = (q, k, v, indices, *(int32(b, tier.device) for b in bounds))
    assert_same_as_reference(tier, args)


def test_a_perturbed_row_is_noticed(tier):
    args = problem([6], [30], 2, 1, 64, 5, tier.device)
    exact, _ = reference(*double(args), 0.125, False)
    eager = eager_attention(*args, 0.125)
    args[3][4, 2] = (set(range(30)) - set(args[3][4].tolist())).pop()
    args[3][4] = args[3][4].sort().values
    with tier:
        out, _ = dsa_kernels.sparse_attention(*args)
    wrong = (out.double() - exact).abs().flatten(1).amax(1) > allowed(
        eager, exact, 1e-6 * row_size(exact)
    )
    assert wrong.tolist() == [False, False, False, False, True, False]


def test_same_bits_on_every_run(tier):
    args = problem([20], [50], 4, 1, 64, 9, tier.device)
    first, second = (run_both(tier, args, 0.1, deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_tilelang_compiles_to_wgmma():
    """At the model's sizes, without a GPU: both products on the tensor cores, K and V rows by asynchronous copies."""
    pytest.importorskip("tilelang")
    if shutil.which("nvcc") is None:
        pytest.skip("TileLang compiles with nvcc, which is not on PATH")
    module = importlib.import_module("dsa_kernels.sparse_attention.tilelang")
    source = module.compiled(32, 4, 128, 12288).get_kernel_source()
    assert "wgmma_ss" in source and "wgmma_rs" in source
    assert "cp_async_gs" in source and "k_shared" in source and "v_shared" in source


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    args = problem([3, 2], [3, 9], 2, 1, 64, 4, device)
    leaves = [x.requires_grad_() for x in args[:3]]
    torch.library.opcheck(
        torch.ops.dsa_kernels.sparse_attention.default, (*leaves, *args[3:], 0.1, True)
    )
    with torch.no_grad():
        out, lse = dsa_kernels.sparse_attention(*args)
    bwd = (torch.randn_like(out), torch.randn_like(lse), *args[:3], out, lse, *args[3:], 0.1, True)
    torch.library.opcheck(
        torch.ops.dsa_kernels.sparse_attention_bwd.default,
        tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in bwd),
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    q, *rest = problem([6], [12], 2, 1, 64, 4, device)
    compiled = torch.compile(
        lambda q: dsa_kernels.sparse_attention(q * 2, *rest)[0] + 1, fullgraph=True
    )
    torch.testing.assert_close(compiled(q), dsa_kernels.sparse_attention(q * 2, *rest)[0] + 1)


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_inputs():
    args = problem([100, 60], [100, 300], 32, 4, 128, 64, "cuda", torch.bfloat16)
    other = problem([30, 130], [260, 140], 32, 4, 128, 64, "cuda", torch.bfloat16)
    other = [a[: b.shape[0]] if a.shape[0] > b.shape[0] else a for a, b in zip(other, args)]

    def step():
        out, lse = torch.ops.dsa_kernels.sparse_attention(*args, 0.1, True)
        return out, *torch.ops.dsa_kernels.sparse_attention_bwd(
            out, lse, *args[:3], out, lse, *args[3:], 0.1, True
        )

    with dsa_kernels.use("triton"):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for a, b in zip(args, other):
            a.copy_(b)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step()))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("gather", [False, True])
def test_offsets_past_2_31(monkeypatch, gather):
    """The last keys of k and v lie past 2^31 elements."""
    monkeypatch.setattr(forward, "FORCE_GATHER", gather)
    stride, keys = 2**20, 2200
    storage = torch.zeros(2, keys * stride, dtype=torch.bfloat16, device="cuda")
    k, v = storage.view(2, keys, 1, stride)[..., :128]
    k.normal_(), v.normal_()
    q = torch.randn(40, 8, 128, device="cuda").bfloat16()
    indices = random_sets([40], [keys], 64, "cuda")
    args = (q, k, v, indices, int32([0, 40], "cuda"), int32([0, keys], "cuda"))
    with dsa_kernels.use("triton"):
        out, lse = torch.ops.dsa_kernels.sparse_attention(*args, 0.1, False)
        got = torch.ops.dsa_kernels.sparse_attention_bwd(
            q, None, *args[:3], out, lse, *args[3:], 0.1, True
        )
    exact = reference(*double(args), 0.1, False)
    want = reference_bwd(q.double(), None, *double(args[:3]), *exact, *args[3:], 0.1, False)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-2, atol=1e-2)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    q, k, v, *rest = problem([6], [12], 2, 1, 64, 4, "cuda")
    out, _ = dsa_kernels.sparse_attention(*map(cupy.from_dlpack, (q, k, v)), *rest)
    torch.testing.assert_close(out, dsa_kernels.sparse_attention(q, k, v, *rest)[0])


def replaced(position, change):
    return lambda args: ([*args[:position], change(args[position]), *args[position + 1 :]], {})


BAD = {
    "q: expected a torch.Tensor": replaced(0, lambda q: [1.0]),
    "q: expected float32 or bfloat16, got float64": replaced(0, lambda q: q.double()),
    "q: expected shape": replaced(0, lambda q: q[0]),
    "q: expected the last dimension contiguous": replaced(0, lambda q: q.mT.contiguous().mT),
    "q: expected head dim D = 64 or 128": lambda a: ([x[..., :32] for x in a[:3]] + a[3:], {}),
    "q: expected H a multiple of G": replaced(0, lambda q: q[:, :3]),
    "k: expected float32": replaced(1, lambda k: k.bfloat16()),
    "k: expected shape": replaced(1, lambda k: k[..., :5]),
    "v: expected shape": replaced(2, lambda v: v[1:]),
    "indices: expected int32": replaced(3, lambda i: i.long()),
    "indices: expected shape": replaced(3, lambda i: i[1:]),
    "cu_seqlens_q: expected int32": replaced(4, lambda c: c.long()),
    "cu_seqlens_q: expected shape": replaced(4, lambda c: c[None]),
    "cu_seqlens_k: expected shape": replaced(5, lambda c: c[1:]),
    "softmax_scale: expected a finite positive number": lambda a: (a, {"softmax_scale": -1.0}),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        device = "cpu" if mode == "fake" else mode
        q, k, v = (torch.zeros(n, h, 64, device=device) for n, h in ((3, 4), (9, 2), (9, 2)))
        lengths = torch.zeros(2, dtype=torch.int32, device=device)
        indices = torch.zeros(3, 4, dtype=torch.int32, device=device)
        args, kwargs = BAD[message]([q, k, v, indices, lengths, lengths])
        return dsa_kernels.sparse_attention(*args, **kwargs)

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()
