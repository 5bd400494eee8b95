import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels import IndexerNorms, indexer_prepare, write_index_cache
from dsa_kernels.indexer_prepare.reference import indexer_prepare as reference
from dsa_kernels.indexer_prepare.reference import quantize, transform_k, transform_q

OP = "indexer_prepare"
FP8 = torch.float8_e4m3fn


def inputs(tokens, heads, dim, dtype=torch.float32, device="cpu"):
    """The flat arguments of the op; q, gate and k are splits of one projection, each begun at a multiple of 16 bytes."""
    width, room = heads * dim, (heads + 7) // 8 * 8
    projection = torch.randn(tokens, width + room + dim, device=device).to(dtype)
    q, gate, k = projection.split([width, room, dim], 1)
    q_weight, k_weight = 0.5 + torch.rand(2, dim, device=device)
    k_bias = 0.1 * torch.randn(dim, device=device)
    angle = 6 * torch.rand(tokens, dim // 2, device=device)
    return (
        q.unflatten(1, (heads, dim)), k, gate[:, :heads], q_weight, k_weight, k_bias, angle.cos(), angle.sin(), 1e-6,
    )  # fmt: skip


def prepare(args, **cache):
    q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps = args
    norms = IndexerNorms(q_weight, k_weight, k_bias, eps)
    return indexer_prepare(q, k, gate, norms, cos, sin, **cache)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def exact(args):
    """Those of `args` that are tensors in float64."""
    return [x.double() if isinstance(x, torch.Tensor) else x for x in args]


def both_sides(args, result):
    """(codes, scale, the y they stand for in float64) of the queries, gate folded in, and of the keys."""
    q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps = exact(args)
    fold = (gate * q.shape[-1] ** -0.5)[..., None]
    yield result[0], result[1], transform_q(q, q_weight, cos, sin, eps) * fold
    yield result[2], result[3], transform_k(k, k_weight, k_bias, cos, sin, eps)


def check_against_reference(args, result):
    """Error against float64, agreement of the codes, and how rarely they differ.

    Where they differ: the sums of the norms and fused multiply-adds may differ by a few of fp32's last places, at most
    (Di / 2 + 10) 2^-23 |y|_2 after the transform, which keeps norms. In bf16 a difference of 2^-21 turns one rounding in
    2^14 the other way, by 2^-7 of the element. If every rounding of the norm and of RoPE turned, y would move by
    2^-6 |y|_2, and its own by 2^-7 |y_j|. Then both are rounded to a code, half a step each.
    With 2 Di roundings, at most about one vector in 2^7 has one that turned; one in 16 is far from both chance and a rounding
    left out, which changes most vectors.
    """
    dim, dtype = args[0].shape[-1], args[0].dtype
    expected = reference(*args)
    for (codes, scale, y), (ref_codes, ref_scale, _) in zip(
        both_sides(args, result), both_sides(args, expected), strict=True
    ):
        scale, ref_scale = scale[..., None].double(), ref_scale[..., None].double()
        value, ref_value = codes.double() * scale, ref_codes.double() * ref_scale
        norm = y.norm(dim=-1, keepdim=True)

        error, ref_error = (value - y).abs().amax(-1), (ref_value - y).abs().amax(-1)
        assert (error <= 2 * ref_error + 2**-20 * norm[..., 0]).all()

        largest = torch.maximum(value.abs(), ref_value.abs())
        step = torch.maximum(largest / 8, 2**-9 * torch.maximum(scale.abs(), ref_scale.abs()))
        moved = (dim / 2 + 10) * 2**-23 * norm
        if dtype == torch.bfloat16:
            moved = 2**-6 * norm + 2**-7 * y.abs()
        assert ((value - ref_value).abs() <= step + moved).all()

        ratio = scale / ref_scale
        assert ((ratio == 1) | (ratio == 2) | (ratio == 0.5)).all()
        differs = (codes.float() != ref_codes.float()).any(-1) | (ratio != 1)[..., 0]
        assert differs.float().mean() <= 1 / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "tokens, heads, dim",
    [(1, 16, 64), (40, 4, 64), (33, 3, 32), (17, 5, 128), (5, 64, 64), (67, 1, 128)],
)
def test_against_reference(tier, tokens, heads, dim, dtype):
    args = inputs(tokens, heads, dim, dtype, tier.device)
    with tier:
        result = prepare(args)
    assert [(x.dtype, *x.shape) for x in result] == [
        (FP8, tokens, heads, dim), (torch.float32, tokens, heads), (FP8, tokens, dim), (torch.float32, tokens),
    ]  # fmt: skip
    check_against_reference(args, result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_in_vectors_of_16_bytes(dtype, monkeypatch):
    """Triton's loads and stores as they are on a GPU; elsewhere its interpreter takes rows whole."""
    if not dsa_kernels.dispatch.interpreting():
        pytest.skip("Triton's interpreter is off")
    module = importlib.import_module("dsa_kernels.indexer_prepare.triton")
    args = inputs(3, 2, 64, dtype)
    with dsa_kernels.use("triton"):
        expected = prepare(args)
        monkeypatch.setitem(module.VECTOR_BITS, "cpu", module.VECTOR_BITS["cuda"])
        assert_same_bits(prepare(args), expected)


def test_bfloat16_norm_weights(tier):
    args = list(inputs(12, 4, 64, torch.bfloat16, tier.device))
    args[3:6] = [x.bfloat16() for x in args[3:6]]
    with tier:
        result = prepare(args)
    check_against_reference(args, result)


def hadamard(dim):
    """Sylvester's matrix, scaled to an orthogonal one."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix * dim**-0.5


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_reference_is_torch_norms_rope_and_hadamard_matrix(dim):
    q, k, _, q_weight, k_weight, k_bias, cos, sin, eps = exact(inputs(6, 3, dim))

    def rope(x, cos, sin):
        low, high = x.chunk(2, -1)
        return x * torch.cat([cos, cos], -1) + torch.cat([-high, low], -1) * torch.cat(
            [sin, sin], -1
        )

    y = rope(F.rms_norm(q, (dim,), q_weight, eps), cos[:, None], sin[:, None]) @ hadamard(dim)
    torch.testing.assert_close(transform_q(q, q_weight, cos, sin, eps), y, rtol=0, atol=1e-13)
    y = rope(F.layer_norm(k, (dim,), k_weight, k_bias, eps), cos, sin) @ hadamard(dim)
    torch.testing.assert_close(
        transform_k(k, k_weight, k_bias, cos, sin, eps), y, rtol=0, atol=1e-13
    )


def test_separate_launches_in_bfloat16(tier):
    """The published model's steps one by one, each with a bfloat16 result."""
    args = inputs(60, 4, 64, torch.bfloat16, tier.device)
    q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps = args
    normed_q = F.rms_norm(q.float(), (64,), q_weight, eps).bfloat16()
    normed_k = F.layer_norm(k.float(), (64,), k_weight, k_bias, eps).bfloat16()
    both = torch.cat([normed_q, normed_k[:, None]], 1)
    low, high = both.float().chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    both = torch.cat([low * c - high * s, high * c + low * s], -1).bfloat16()
    both = (both.double() @ hadamard(64).to(both.device)).bfloat16()
    scale = torch.exp2((both.double().abs().amax(-1).clamp(min=1e-4) / 448).log2().ceil())
    codes = (both.double() / scale[..., None]).to(FP8).view(torch.uint8)
    with tier:
        q_fp8, weights, k_fp8, k_scale = prepare(args)
    ours = torch.cat([q_fp8.view(torch.uint8), k_fp8.view(torch.uint8)[:, None]], 1)
    ours_scale = torch.cat([weights / (gate.float() / 8), k_scale[:, None]], 1)
    same = (ours == codes).all(-1) & ((ours_scale - scale).abs() <= 1e-5 * scale)
    assert same.float().mean() >= 15 / 16  # see check_against_reference


def chosen_vectors(y_q, y_k, device):
    """Arguments whose y, of queries (one head) and of keys, are the given ones [T, 64] exactly.

    x = H y is made so small that its square vanishes beside eps = 1 and the norms divide by 1; their weights bring it
    back. RoPE turns by 0. Needs rows of y whose transform has no rounding, and y[:, 0] = 0, so that x has mean 0.
    """
    q, k = ((y.double() @ hadamard(64) * 2.0**-40).float() for y in (y_q, y_k))
    assert torch.equal(q.double() @ hadamard(64) * 2.0**40, y_q.double())
    q, k, one = q.to(device), k.to(device), torch.ones(len(q), 32, device=device)
    weight = torch.full((64,), 2.0**40, device=device)
    gate = torch.full((len(q), 1), 8.0, device=device)  # times 64^-0.5 is 1: weights are scales
    return q[:, None], k, gate, weight, weight, 0 * weight, one, 0 * one, 1.0


def test_every_code_and_midpoint(tier):
    """|y| = 448 makes the scale 1; the value beside it goes through every code, every midpoint and its sides."""
    values = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = (values[1:] + values[:-1]) / 2
    values = torch.cat([values, middles, middles - 2**-14, middles + 2**-14])
    y = torch.zeros(len(values), 64)
    y[:, 1], y[:, 2] = 448, values
    with tier:
        q_fp8, q_scale, k_fp8, k_scale = prepare(chosen_vectors(y, -y, tier.device))
    assert (q_scale == 1).all() and (k_scale == 1).all()
    assert torch.equal(q_fp8[:, 0].float().cpu(), y.to(FP8).float())
    assert torch.equal(k_fp8.float().cpu(), -y.to(FP8).float())


def test_scale_is_the_smallest_power_of_two(tier):
    powers = torch.exp2(torch.cat([torch.arange(-24, 24), torch.tensor([-60])]).float())
    amax = torch.cat([powers, 1.75 * powers, torch.tensor([1e-4])])
    amax = torch.cat([amax, amax.nextafter(torch.tensor(0.0)), amax.nextafter(torch.tensor(1e30))])
    amax = torch.cat([amax, torch.tensor([0.0])])
    y = torch.zeros(len(amax), 64)
    y[:, 5] = amax
    with tier:
        q_fp8, q_scale, k_fp8, k_scale = prepare(chosen_vectors(y, -y, tier.device))
    scale = k_scale.cpu().double()
    floored = amax.clamp(min=1e-4).double()
    assert (scale.frexp().mantissa == 0.5).all()
    assert (floored <= 448 * scale).all() and (floored > 224 * scale).all()
    codes = (y / scale[:, None]).float().to(FP8).float()
    assert torch.equal(q_fp8[:, 0].float().cpu(), codes)
    assert torch.equal(k_fp8.float().cpu(), -codes)
    assert torch.equal(q_scale[:, 0], k_scale)
    assert_same_bits(quantize(y)[1:], [k_scale.cpu()])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
def test_not_finite_stays_in_its_vector(tier):
    args = inputs(6, 3, 64, device=tier.device)
    with tier:
        clean = prepare(args)
        args[0][1, 2, 7], args[0][4, 0, 0], args[1][3, 9] = torch.nan, torch.inf, -torch.inf
        result = prepare(args)
    for index in ((1, 2), (4, 0)):
        assert result[0][index].float().isnan().all() and result[1][index].isnan()
        for x, y in zip(result[:2], clean[:2]):
            x[index] = y[index]
    assert result[2][3].float().isnan().all() and result[3][3].isnan()
    result[2][3], result[3][3] = clean[2][3], clean[3][3]
    assert_same_bits(result, clean)


def random_cache(pages, dim, device="cpu"):
    return torch.randint(0, 127, (pages, 64 * (dim + 4)), dtype=torch.uint8, device=device)


@pytest.mark.parametrize(
    "dim, dtype", [(32, torch.float32), (64, torch.bfloat16), (128, torch.float32)]
)
def test_cached(tier, dim, dtype):
    args = inputs(7, 2, dim, dtype, tier.device)
    slots = torch.tensor([3, 191, -1, 192, 64, 2**40, 100], device=tier.device)
    cache = random_cache(3, dim, tier.device)
    expected = cache.clone()
    with tier:
        result = prepare(args, index_cache=cache, slots=slots)
        assert_same_bits(result, prepare(args))
        write_index_cache(result[2], result[3], expected, slots)
    assert_same_bits([cache], [expected])
    with tier:
        prepare(args, index_cache=(halves := random_cache(6, dim, tier.device))[::2], slots=slots)
    assert torch.equal(halves[::2][1, : 64 * dim], halves[2, : 64 * dim])
    written = halves[2, 36 * dim : 37 * dim].view(
        FP8
    )  # slot 100: page 1 of every second, offset 36
    assert_same_bits([written], [result[2][6]])


@settings(max_examples=10)
@given(st.data())
def test_property_slots(tier, data):
    pages = data.draw(st.integers(0, 3), "pages")
    values = st.integers(-3, 64 * pages + 3) | st.integers(-(2**63), 2**63 - 1)
    values = data.draw(st.lists(values, max_size=12, unique=True), "slots")
    heads = data.draw(st.integers(1, 3), "heads")
    slots = torch.tensor(values, dtype=torch.int64, device=tier.device)
    args = inputs(len(values), heads, 32, device=tier.device)
    cache = random_cache(pages, 32, tier.device)
    expected = cache.clone()
    with tier:
        result = prepare(args, index_cache=cache, slots=slots)
    with dsa_kernels.use("reference"):
        write_index_cache(result[2], result[3], expected, slots)
    assert_same_bits([cache], [expected])


@pytest.mark.parametrize("tokens, heads", [(0, 4), (3, 0)])
def test_empty(tier, tokens, heads):
    args = inputs(tokens, heads, 64, device=tier.device)
    with tier:
        result = prepare(args)
    assert [x.shape[0] for x in result] == [tokens] * 4 and result[0].numel() == 0
    assert_same_bits(result[2:], reference(*args)[2:])


def test_strides(tier):
    """Tokens, heads and tables at any stride: a slice of heads of every second token, one table row for all tokens."""
    q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps = inputs(20, 6, 64, device=tier.device)
    cos, sin = cos[:1].expand(10, -1), sin[:1].expand(10, -1)
    args = (q[::2, 1:4], k[::2], gate[::2, 1:4], q_weight, k_weight, k_bias, cos, sin, eps)
    with tier:
        result = prepare(args)
        packed = prepare([x.contiguous() if isinstance(x, torch.Tensor) else x for x in args])
    check_against_reference(args, result)
    assert_same_bits(result, packed)


def test_same_bits_whatever_the_batch(tier):
    args = inputs(20, 3, 64, torch.bfloat16, tier.device)
    q, k, gate, *weights, cos, sin, eps = args
    with tier:
        together, again = prepare(args), prepare(args)
        parts = [
            prepare((q[i], k[i], gate[i], *weights, cos[i], sin[i], eps))
            for i in (slice(0, 1), slice(1, 20))
        ]
    assert_same_bits(together, again)
    assert_same_bits(together, [torch.cat([x.view(torch.uint8) for x in p]).view(p[0].dtype) for p in zip(*parts)])  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "tokens, heads, dim", [(20011, 16, 64), (40009, 4, 64), (4999, 64, 32), (9001, 16, 128)]
)
def test_same_bits_in_a_large_batch(name, tokens, heads, dim, dtype):
    """Large enough for the form with more elements a lane, and for several rounds of a block."""
    args = inputs(tokens, heads, dim, dtype, "cuda")
    q, k, gate, *weights, cos, sin, eps = args
    slots = torch.randperm(2 * tokens, device="cuda")[:tokens] - 64
    cache = random_cache(tokens // 64, dim, "cuda")
    expected = cache.clone()
    with dsa_kernels.use(name):
        together = prepare(args, index_cache=cache, slots=slots)
        for i in (slice(0, 1), slice(1, 38), slice(tokens - 500, tokens)):
            part = prepare((q[i], k[i], gate[i], *weights, cos[i], sin[i], eps))
            assert_same_bits([x[i] for x in together], part)
    check_against_reference(args, together)
    with dsa_kernels.use("triton"):
        write_index_cache(together[2], together[3], expected, slots)
    assert_same_bits([cache], [expected])


def test_rows_that_are_not_aligned(tier):
    """Splits of a projection of odd width: the CUDA kernel leaves them to Triton."""
    args = list(inputs(9, 3, 64, torch.bfloat16, tier.device))
    projection = torch.randn(9, 3 * 64 + 3 + 64, device=tier.device).bfloat16()
    q, args[2], args[1] = projection.split([192, 3, 64], 1)
    args[0] = q.unflatten(1, (3, 64))
    with tier:
        check_against_reference(args, prepare(args))
    declines = dsa_kernels.registered_ops()[OP].table[0].declines
    assert declines(*args) == "needs q and its rows aligned to 16 bytes"
    args = inputs(9, 3, 64, torch.bfloat16, tier.device)
    assert declines(*args) is None
    cache, slots = random_cache(2, 64, tier.device)[:, 4:-60], torch.arange(9, device=tier.device)
    assert declines(*args, cache, slots) == "needs index_cache and its rows aligned to 16 bytes"


def test_a_perturbed_vector_is_noticed(tier):
    args = inputs(40, 4, 64, device=tier.device)
    with tier:
        codes, weights, k_codes, k_scale = prepare(args)
    check_against_reference(args, (codes, weights, k_codes, k_scale))
    bytes_ = codes.view(torch.uint8)
    bytes_[7, 2, 3] ^= 0x08  # one bit of the exponent: a factor of two
    with pytest.raises(AssertionError):
        check_against_reference(args, (codes, weights, k_codes, k_scale))
    bytes_[7, 2, 3] ^= 0x08
    k_scale[5] *= 2
    with pytest.raises(AssertionError):
        check_against_reference(args, (codes, weights, k_codes, k_scale))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cached", [False, True])
def test_opcheck(cached, device):
    args = inputs(5, 2, 64, torch.bfloat16, device)
    op = torch.ops.dsa_kernels.indexer_prepare.default
    if cached:
        args = (*args, random_cache(2, 64, device), torch.arange(5, device=device))
        op = torch.ops.dsa_kernels.indexer_prepare_cached.default
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    q, k, gate, *weights, cos, sin, eps = inputs(5, 2, 64, device=device)
    slots = torch.tensor([7, -1, 70, 3, 9], device=device)
    cache, expected = torch.zeros(2, 2, 64 * 68, dtype=torch.uint8, device=device)

    def step(q, k, cache):
        norms = IndexerNorms(*weights, eps)
        prepared = indexer_prepare(2 * q, k, gate, norms, cos, sin, index_cache=cache, slots=slots)
        return (*prepared, cache + 1)

    result = torch.compile(step, fullgraph=True)(q, k, cache)
    assert_same_bits(result, step(q, k, expected))
    assert_same_bits([cache], [expected])


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_inputs():
    args = inputs(9, 4, 64, torch.bfloat16, "cuda")
    slots = torch.arange(9, device="cuda")
    cache = torch.zeros(2, 64 * 68, dtype=torch.uint8, device="cuda")
    prepare(args, index_cache=cache, slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = prepare(args, index_cache=cache, slots=slots)
    args[0].copy_(torch.randn(9, 4, 64))
    args[1].copy_(torch.randn(9, 64))
    slots.copy_(torch.arange(9) + 100)
    graph.replay()
    assert_same_bits(result, prepare(args))
    assert torch.equal(cache[1, 36 * 64 : 45 * 64].view(9, 64), result[2].view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_offsets_past_2_31(name):
    """Rows of q, k and gate 2^30 elements apart; the last page of a cache past 2^31 bytes."""
    small = inputs(4, 2, 64, torch.bfloat16, "cuda")
    buffer = torch.empty(3 * 2**30 + 4096, dtype=torch.bfloat16, device="cuda")
    q = torch.as_strided(buffer, (4, 2, 64), (2**30, 64, 1), 0)
    k = torch.as_strided(buffer, (4, 64), (2**30, 1), 128)
    gate = torch.as_strided(buffer, (4, 2), (2**30, 1), 192)
    for view, x in zip((q, k, gate), small):
        view.copy_(x)
    page = 2**19
    cache = torch.zeros(page + 1, 64 * 68, dtype=torch.uint8, device="cuda")
    slots = torch.arange(page * 64, page * 64 + 4, device="cuda")
    with dsa_kernels.use(name):
        result = prepare((q, k, gate, *small[3:]), index_cache=cache, slots=slots)
        # Of strides as aligned as these: Triton orders the sums of a norm by what it may load at once.
        packed = (q.contiguous(), k.contiguous(), gate.contiguous(), *small[3:])
        assert_same_bits(result, prepare(packed))
    assert torch.equal(cache[page, : 4 * 64].view(4, 64), result[2].view(torch.uint8))


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    args = inputs(3, 2, 64, device="cuda")
    wrapped = [cupy.from_dlpack(x) if isinstance(x, torch.Tensor) else x for x in args]
    assert_same_bits(prepare(wrapped), prepare(args))


def test_numpy():
    args = inputs(3, 2, 64)
    wrapped = [x.numpy() if isinstance(x, torch.Tensor) else x for x in args]
    assert_same_bits(prepare(wrapped), prepare(args))


BAD = {
    "q: expected float32 or bfloat16, got float16": (0, lambda x: x.half()),
    "q: expected the last dimension contiguous": (0, lambda x: x.mT.contiguous().mT),
    "q's last dimension: expected 32 or 64 or 128, got 48": (0, lambda x: x[..., :48]),
    "k: expected float32, got bfloat16": (1, lambda x: x.bfloat16()),
    "k: expected shape": (1, lambda x: x[:, :32]),
    r"gate: expected shape \[T, H\] with H = 2": (2, lambda x: x[:, :1]),
    "q_weight: expected a torch.Tensor": (3, lambda x: None),
    "k_weight: expected shape": (4, lambda x: x[:32]),
    "k_bias: expected float32 or bfloat16": (5, lambda x: x.double()),
    r"cos: expected shape \[T, 32\]": (6, lambda x: x.repeat(1, 2)),
    "sin: expected float32, got bfloat16": (7, lambda x: x.bfloat16()),
    "eps: expected a finite positive number, got 0": (8, lambda x: 0.0),
    r"index_cache: expected shape \[P, 64 \* \(64 \+ 4\)\]": (9, lambda x: x[:, :-64]),
    "index_cache: expected a torch.Tensor, got NoneType": (9, lambda x: None),
    "index_cache: expected pages at multiples of 4 bytes": (9, lambda x: x.repeat(1, 2)[:, 2 : 2 + 64 * 68]),
    "slots: expected int64": (10, lambda x: x.int()),
    "slots: expected a torch.Tensor, got NoneType": (10, lambda x: None),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    device = "cpu" if mode == "fake" else mode
    args = [*inputs(3, 2, 64, device=device), random_cache(1, 64, device)]
    args.append(torch.arange(3, device=device))
    position, spoil = BAD[message]
    args[position] = spoil(args[position])
    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode() as fake:
                args = [fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
                prepare(args[:9], index_cache=args[9], slots=args[10])
        else:
            prepare(args[:9], index_cache=args[9], slots=args[10])
