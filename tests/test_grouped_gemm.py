import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import dsa_kernels
from dsa_kernels.grouped_gemm import reference

OP = "grouped_gemm"
DTYPES = [torch.float32, torch.bfloat16]
# rows, N, K, offsets, dtype: every tile of the Triton table, empty experts, rows of no expert, odd sizes
CASES = [
    (5, 7, 9, [0, 2, 2, 5], torch.float32),
    (5, 7, 9, [0, 2, 2, 5], torch.bfloat16),
    (40, 80, 48, [3, 10, 10, 33, 36], torch.float32),
    (40, 80, 48, [3, 10, 10, 33, 36], torch.bfloat16),
    (60, 64, 160, [0, 1, 41, 60], torch.bfloat16),
    (150, 96, 272, [0, 20, 150, 150], torch.bfloat16),
    (300, 272, 80, [0, 290, 300], torch.bfloat16),
    (1, 16, 16, [0, 1], torch.bfloat16),
    (4, 3, 1, [0, 4], torch.float32),
]


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def operands(rows, n, k, experts, dtype, device):
    a = torch.randn(rows, k, device=device).to(dtype)
    return a, torch.randn(experts, n, k, device=device).to(dtype)


def check(name, got, a, b, offsets):
    scale = reference.grouped_gemm(a.double().abs(), b.double().abs(), offsets).amax(-1)
    exact = reference.grouped_gemm(a.double(), b.double(), offsets)
    assert_close(name, got, exact, reference.grouped_gemm(a, b, offsets), scale)


@pytest.mark.parametrize("rows, n, k, offsets, dtype", CASES)
def test_forward(tier, rows, n, k, offsets, dtype):
    a, b = operands(rows, n, k, len(offsets) - 1, dtype, tier.device)
    offsets = int32(offsets, tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
    check("out", out, a, b, offsets)
    assert (out[: offsets[0]] == 0).all() and (out[offsets[-1] :] == 0).all()


@pytest.mark.parametrize("rows, n, k, offsets, dtype", CASES)
def test_transposed_experts(tier, rows, n, k, offsets, dtype):
    """What the data gradient passes: N contiguous."""
    a, b = operands(rows, n, k, len(offsets) - 1, dtype, tier.device)
    b = b.transpose(1, 2).contiguous().transpose(1, 2)
    offsets = int32(offsets, tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
    check("out", out, a, b, offsets)


@pytest.mark.parametrize("rows, n, k, offsets, dtype", CASES)
def test_weight_gradient(tier, rows, n, k, offsets, dtype):
    a, _ = operands(rows, n, k, 1, dtype, tier.device)
    dc = torch.randn(rows, n, device=tier.device).to(dtype)
    offsets = int32(offsets, tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm_wgrad(dc, a, offsets)
    exact = reference.grouped_gemm_wgrad(dc.double(), a.double(), offsets)
    scale = reference.grouped_gemm_wgrad(dc.double().abs(), a.double().abs(), offsets).amax(-1)
    assert_close("out", out, exact, reference.grouped_gemm_wgrad(dc, a, offsets), scale)
    assert (out[(offsets[1:] == offsets[:-1]).tolist()] == 0).all()


def test_row_and_expert_strides(tier):
    a, b = operands(50, 64, 96, 6, torch.bfloat16, tier.device)
    a, b = a[::2, 16:64], b[::2, :32, 16:64]
    dc = torch.randn(50, 48, device=tier.device).bfloat16()[::2, 16:]
    offsets = int32([0, 9, 20, 25], tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
        db = dsa_kernels.grouped_gemm_wgrad(dc, a, offsets)
    check("out", out, a, b, offsets)
    exact = reference.grouped_gemm_wgrad(dc.double(), a.double(), offsets)
    assert_close("db", db, exact, reference.grouped_gemm_wgrad(dc, a, offsets))


@pytest.mark.parametrize("rows, experts", [(0, 3), (6, 0), (0, 0)])
def test_empty(tier, rows, experts):
    a, b = operands(rows, 16, 32, experts, torch.bfloat16, tier.device)
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
        db = dsa_kernels.grouped_gemm_wgrad(out, a, offsets)
    assert out.shape == (rows, 16) and (out == 0).all()
    assert db.shape == (experts, 16, 32) and (db == 0).all()


@settings(max_examples=15)
@given(st.data())
def test_any_offsets(tier, data):
    """Decreasing and out-of-range offsets are clamped; garbage rows stay out of every result."""
    rows = data.draw(st.integers(0, 40), "rows")
    experts = data.draw(st.integers(1, 5), "experts")
    value = st.integers(-3, rows + 3) | st.integers(-(2**31), 2**31 - 1)
    offsets = data.draw(st.lists(value, min_size=experts + 1, max_size=experts + 1), "offsets")
    n, k = data.draw(st.sampled_from([(16, 32), (5, 3)]), "n, k")
    a, b = operands(rows, n, k, experts, torch.float32, tier.device)
    offsets = int32(offsets, tier.device)
    bounds = offsets.clamp(0, rows).cummax(0).values
    a[: bounds[0]] = torch.nan
    a[bounds[-1] :] = torch.inf
    dc = torch.where(a[:, :1].isfinite(), torch.randn(rows, n, device=tier.device), torch.nan)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
        db = dsa_kernels.grouped_gemm_wgrad(dc, a, offsets)
    torch.testing.assert_close(out, reference.grouped_gemm(a, b, offsets), rtol=1e-4, atol=1e-4)
    expected = reference.grouped_gemm_wgrad(dc, a, offsets)
    torch.testing.assert_close(db, expected, rtol=1e-4, atol=1e-4)


def quantized(rows, n, k, experts, device):
    a, b = operands(rows, n, k, experts, torch.float32, device)
    a = a * torch.logspace(-4, 3, rows, device=device)[:, None]
    return *dsa_kernels.quantize_rows(a), *dsa_kernels.quantize_blocks(b)


@pytest.mark.parametrize(
    "rows, n, k, offsets",
    [(20, 128, 256, [1, 9, 9, 19]), (90, 128, 128, [0, 80, 90]), (150, 256, 128, [0, 150])],
)
def test_fp8(tier, rows, n, k, offsets):
    a, a_scale, b, b_scale = quantized(rows, n, k, len(offsets) - 1, tier.device)
    offsets = int32(offsets, tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm_fp8(a, a_scale, b, b_scale, offsets)
    wide_a = a.double() * a_scale.double().repeat_interleave(128, 1)
    wide_b = b.double() * b_scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    exact = reference.grouped_gemm(wide_a, wide_b, offsets)
    scale = reference.grouped_gemm(wide_a.abs(), wide_b.abs(), offsets).amax(-1)
    if tier.device.type == "cuda":  # FP8 units keep 14 bits of a sum of 128 products, not 24
        scale = scale * 2**10
    same = reference.grouped_gemm_fp8(a, a_scale, b, b_scale, offsets)
    assert_close("out", out, exact, same, scale)


def test_every_e4m3_value(tier):
    """NaN, subnormals and both zeros: one expert that is the identity."""
    a = torch.arange(256, dtype=torch.uint8, device=tier.device).view(torch.float8_e4m3fn)
    a = torch.where(torch.arange(128, device=tier.device) == 0, a.float()[:, None], 0)
    a = a.to(torch.float8_e4m3fn)
    b = torch.eye(128, device=tier.device).to(torch.float8_e4m3fn)[None]
    ones = torch.ones(256, 1, device=tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm_fp8(
            a, ones, b, ones[:1, :, None], int32([0, 256], tier.device)
        )
    expected = a.float()[:, 0].bfloat16()
    torch.testing.assert_close(out[:, 0], expected, rtol=0, atol=0, equal_nan=True)


def test_quantize():
    x = torch.randn(3, 256)
    x[0, :128], x[1, 128] = 0, 448.0
    values, scale = dsa_kernels.quantize_rows(x)
    amax = x.double().unflatten(1, (2, 128)).abs().amax(-1)
    expected = torch.exp2(torch.ceil(torch.log2(amax.clamp(min=1e-4) / 448)))
    assert torch.equal(scale.double(), expected)
    assert scale[1, 1] == 1 and values[1, 128].float() == 448
    wide = values.float() * scale.repeat_interleave(128, 1)
    assert ((wide - x).abs() <= x.abs() / 16 + scale.repeat_interleave(128, 1) * 2**-10).all()
    w = torch.randn(2, 128, 256).bfloat16()
    w_values, w_scale = dsa_kernels.quantize_blocks(w)
    assert w_values.shape == w.shape and w_scale.shape == (2, 1, 2)
    wide = w_values.float() * w_scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert ((wide - w).abs() <= w.abs() / 16 + 2.0**-16).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(tier, dtype):
    a, b = operands(40, 48, 32, 3, dtype, tier.device)
    offsets = int32([2, 20, 20, 37], tier.device)
    dout = torch.randn(40, 48, device=tier.device).to(dtype)

    def gradients(function, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*inputs, offsets), inputs, dout.to(inputs[0].dtype))

    with tier:
        got = gradients(dsa_kernels.grouped_gemm, a, b)
    exact = gradients(reference.grouped_gemm, a.double(), b.double())
    same = gradients(reference.grouped_gemm, a, b)
    sizes = gradients(reference.grouped_gemm, a.double().abs(), b.double().abs())
    for name, *values, size in zip(("da", "db"), got, exact, same, sizes):
        assert_close(name, *values, size.abs().amax(-1) + size.abs().mean())


def test_equals_torch_grouped_mm(tier):
    if tier.device.type == "cpu" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no F.grouped_mm")
    a, b = operands(64, 32, 48, 4, torch.bfloat16, tier.device)
    offsets = int32([0, 16, 16, 40, 64], tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
    theirs = torch.nn.functional.grouped_mm(a, b.transpose(1, 2), offs=offsets[1:])
    exact = reference.grouped_gemm(a.double(), b.double(), offsets)
    assert_close("out", out, exact, theirs)


def test_same_bits_again_and_in_any_batch(tier):
    a, b = operands(120, 96, 544, 3, torch.bfloat16, tier.device)
    offsets = int32([0, 110, 114, 120], tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
        again = dsa_kernels.grouped_gemm(a, b, offsets)
        alone = dsa_kernels.grouped_gemm(a[7:8], b, int32([0, 1, 1, 1], tier.device))
    assert torch.equal(out, again)
    if tier.name == "cpu":
        assert torch.equal(out[7:8], alone)
    check("alone", alone, a[7:8], b, int32([0, 1, 1, 1], tier.device))


def test_a_perturbed_row_is_noticed(tier):
    a, b = operands(20, 32, 48, 2, torch.bfloat16, tier.device)
    offsets = int32([0, 9, 20], tier.device)
    with tier:
        out = dsa_kernels.grouped_gemm(a, b, offsets)
        swapped = dsa_kernels.grouped_gemm(a, b, int32([0, 8, 20], tier.device))
    check("out", out, a, b, offsets)
    with pytest.raises(AssertionError, match="row 8"):
        check("out", swapped, a, b, offsets)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    a, b = operands(10, 16, 32, 3, torch.float32, device)
    offsets = int32([0, 4, 4, 9], device)
    ops = torch.ops.dsa_kernels
    torch.library.opcheck(
        ops.grouped_gemm.default, (a.requires_grad_(), b.requires_grad_(), offsets)
    )
    torch.library.opcheck(ops.grouped_gemm_wgrad.default, (a.detach(), a.detach(), offsets))
    checks = [
        "test_autograd_registration",
        "test_faketensor",
    ]  # others compare e4m3, which torch cannot
    args = (*quantized(10, 128, 128, 3, device), offsets)
    torch.library.opcheck(ops.grouped_gemm_fp8.default, args, test_utils=checks)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    a, b = operands(10, 16, 32, 3, torch.float32, device)
    offsets = int32([0, 4, 4, 9], device)
    compiled = torch.compile(
        lambda x: dsa_kernels.grouped_gemm(x * 2, b, offsets) + 1, fullgraph=True
    )
    x = a.clone().requires_grad_()
    out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(out, reference.grouped_gemm(a * 2, b, offsets) + 1)
    expected = reference.grouped_gemm(torch.ones_like(out), b.transpose(1, 2), offsets) * 2
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton"])
def test_cuda_graph_replay_with_other_inputs(name):
    a, b = operands(100, 64, 128, 4, torch.bfloat16, "cuda")
    offsets = int32([0, 25, 50, 75, 100], "cuda")
    with dsa_kernels.use(name):
        dsa_kernels.grouped_gemm(a, b, offsets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dsa_kernels.grouped_gemm(a, b, offsets)
    a.copy_(torch.randn(100, 128))
    offsets.copy_(torch.tensor([3, 3, 90, 90, 95]))
    graph.replay()
    check("out", out, a, b, offsets)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton"])
def test_offsets_past_2_31(name):
    """Rows, and an expert, that begin past 2^31 elements."""
    rows, k = 2**20 + 300, 2112
    a = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.as_strided(
        torch.randn(2**31 + 2**20, device="cuda").bfloat16(), (2, 64, k), (2**31, k, 1)
    )
    offsets = int32([0, 2**20, rows], "cuda")
    last = slice(2**20, rows)
    with dsa_kernels.use(name):
        out = dsa_kernels.grouped_gemm(a, b, offsets)
        db = dsa_kernels.grouped_gemm_wgrad(out, a, offsets)
    check("out", out[last], a[last], b[1:], int32([0, 300], "cuda"))
    exact = reference.grouped_gemm_wgrad(
        out[last].double(), a[last].double(), int32([0, 300], "cuda")
    )
    same = reference.grouped_gemm_wgrad(out[last], a[last], int32([0, 300], "cuda"))
    assert_close("db", db[1:], exact, same)


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    a, b = operands(10, 16, 32, 2, torch.float32, "cuda")
    offsets = int32([0, 4, 10], "cuda")
    out = dsa_kernels.grouped_gemm(
        cupy.from_dlpack(a), cupy.from_dlpack(b), cupy.from_dlpack(offsets)
    )
    check("out", out, a, b, offsets)


BAD = {
    "a: expected float32 or bfloat16, got float16": lambda a, b, o: (a.half(), b, o),
    "a: expected shape": lambda a, b, o: (a[0], b, o),
    "a: expected the last dimension contiguous": lambda a, b, o: (a[:, ::2], b[:, :, ::2], o),
    "b: expected float32, got bfloat16": lambda a, b, o: (a, b.bfloat16(), o),
    "b: expected shape .* with K = 32": lambda a, b, o: (a, b[:, :, 1:], o),
    "b: expected one of the last two": lambda a, b, o: (a[:, :16].contiguous(), b[:, ::2, ::2], o),
    "offsets: expected int32": lambda a, b, o: (a, b, o.long()),
    "offsets: expected shape": lambda a, b, o: (a, b, o[1:]),
    "offsets: expected a contiguous": lambda a, b, o: (a, b, o.repeat(2)[::2]),
}  # fmt: skip
BAD_WGRAD = {
    "dc: expected float32 or bfloat16": lambda a, o: (a.double(), a, o),
    "a: expected shape .* with M = 10": lambda a, o: (a, a[1:], o),
    "a: expected float32, got bfloat16": lambda a, o: (a, a.bfloat16(), o),
    "offsets: expected shape": lambda a, o: (a, a, o[:0]),
}  # fmt: skip
BAD_FP8 = {
    "a: expected float8_e4m3fn": lambda a, s, b, t, o: (a.float(), s, b, t, o),
    "a: expected a multiple of 128 columns, got 64": lambda a, s, b, t, o: (a[:, :64].clone(), s, b, t, o),
    "a_scale: expected shape": lambda a, s, b, t, o: (a, s[:, :0], b, t, o),
    "b: expected a multiple of 128 rows": lambda a, s, b, t, o: (a, s, b[:, :64].clone(), t, o),
    "b_scale: expected float32": lambda a, s, b, t, o: (a, s, b, t.half(), o),
    "b_scale: expected shape": lambda a, s, b, t, o: (a, s, b, t[1:], o),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "message", [*BAD, *("wgrad/" + m for m in BAD_WGRAD), *("fp8/" + m for m in BAD_FP8)]
)
def test_bad_input(message, mode):
    def call():
        device = "cpu" if mode == "fake" else mode
        a, b = operands(10, 32, 32, 3, torch.float32, device)
        offsets = torch.zeros(4, dtype=torch.int32, device=device)
        if message in BAD:
            return dsa_kernels.grouped_gemm(*BAD[message](a, b, offsets))
        if message.startswith("wgrad/"):
            return dsa_kernels.grouped_gemm_wgrad(*BAD_WGRAD[text](a, offsets))
        fp8 = torch.zeros(10, 128, device=device).to(torch.float8_e4m3fn)
        weights = torch.zeros(3, 128, 128, device=device).to(torch.float8_e4m3fn)
        scales = torch.ones(10, 1, device=device), torch.ones(3, 1, 1, device=device)
        return dsa_kernels.grouped_gemm_fp8(
            *BAD_FP8[text](fp8, scales[0], weights, scales[1], offsets)
        )

    text = message.split("/", 1)[-1] if message not in BAD else message
    with pytest.raises(ValueError, match=text):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()


@pytest.mark.parametrize(
    "function, shape, message",
    [
        (dsa_kernels.quantize_rows, (3, 100), "x: expected a multiple of 128 columns, got 100"),
        (dsa_kernels.quantize_blocks, (2, 100, 128), "w: expected a multiple of 128 rows, got 100"),
        (dsa_kernels.quantize_blocks, (2, 128), "w: expected shape"),
    ],
)
def test_quantize_bad_input(function, shape, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape))
