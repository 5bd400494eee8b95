import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from indexer_inputs import e4m3, int32, opcheck, packed, paged

import dsa_kernels
from dsa_kernels.indexer_logits.reference import indexer_logits as reference
from dsa_kernels.indexer_logits.reference import indexer_logits_paged as reference_paged

OP = "indexer_logits"
EXTREME = st.integers(-(2**31), 2**31 - 1)


def call(q, weights, k, k_scale, cu_q, cu_k, width):
    return dsa_kernels.indexer_logits(q, weights, k, k_scale, cu_q, cu_k, max_seqlen_k=width)


def assert_close(logits, args, width=None):
    """Rows within twice the error of the reference in fp32, and a few ulp of the row's largest sum of magnitudes.

    The GPU's FP8 units add 32 products at a time, aligned to the largest of them and the running sum, with 13 bits kept
    behind its leading one: D / 32 times 33 cut terms of at most 2^-13 of the largest.
    """
    ref = reference if width is not None else reference_paged
    last = [] if width is None else [width]
    q, weights, *rest = args
    exact = ref(q, weights.double(), *rest, *last)
    same_precision = ref(q, weights, *rest, *last)
    magnitudes = ref(abs_fp8(q), weights.double().abs(), *absolute(rest), *last)
    seen = exact != -torch.inf
    assert torch.equal(logits != -torch.inf, seen)
    zero = torch.zeros((), dtype=torch.float64, device=logits.device)
    error = torch.where(seen, (logits.double() - exact).abs(), zero).amax(1)
    allowed = 2 * torch.where(seen, (same_precision.double() - exact).abs(), zero).amax(1)
    row_magnitude = torch.where(seen, magnitudes, zero).amax(1)
    allowed += 4 * 2**-24 * row_magnitude
    if logits.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        allowed += q.shape[2] / 32 * 33 * 2**-13 * row_magnitude
    assert (error <= allowed).all(), (error / allowed).max()


def abs_fp8(x):
    return (x.view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)


def absolute(rest):
    """k or the keys of the cache without signs; scales are positive already."""
    first, *others = rest
    if first.dtype == torch.float8_e4m3fn:
        return [abs_fp8(first), *others]
    dim = first.shape[1] // 64 - 4
    cache = first.clone()
    cache[:, : 64 * dim] &= 0x7F
    return [cache, *others]


@pytest.mark.parametrize("heads, dim", [(1, 64), (4, 64), (5, 32), (16, 64), (32, 128), (64, 128)])
def test_packed(tier, heads, dim):
    """Sequences of all relations: decode, prefill, empty ones, more queries than keys, tokens of no sequence."""
    cu_q, cu_k = [0, 1, 1, 30, 36, 36, 70], [0, 90, 95, 124, 127, 140, 300]
    if tier.interpreted and heads > 16:  # a second a head otherwise
        cu_q, cu_k = [0, 1, 9], [0, 40, 60]
    args = packed(cu_q, cu_k, heads, dim, tier.device, tokens=73, keys=310)
    with tier:
        logits = call(*args, 190)
    assert (logits[cu_q[-1] :] == -torch.inf).all()
    assert_close(logits, args, 190)


@pytest.mark.parametrize("heads, dim", [(3, 64), (16, 64), (64, 128)])
def test_paged(tier, heads, dim):
    args = paged([0, 1, 3, 3, 7, 8], [200, 64, 30, 65, 0], 5, heads, dim, tier.device)
    with tier:
        logits = dsa_kernels.indexer_logits_paged(*args)
    assert_close(logits, args)


def test_paged_equals_packed_scores(tier):
    """The same keys through pages: an oracle that does not share the reference's gather."""
    q, weights, cache, table, lengths, cu_q = paged([0, 2], [150], 3, 4, 64, tier.device)
    pages = cache[table[0].long()]
    k = pages[:, : 64 * 64].reshape(-1, 64)[:150].contiguous().view(torch.float8_e4m3fn)
    k_scale = pages[:, 64 * 64 :].contiguous().view(torch.float32).flatten()[:150].contiguous()
    with tier:
        a = dsa_kernels.indexer_logits_paged(q, weights, cache, table, lengths, cu_q)[:, :150]
        b = call(q, weights, k, k_scale, cu_q, int32([0, 150], tier.device), 150)
    torch.testing.assert_close(a, b, rtol=1e-2 if tier.device.type == "cuda" else 1e-5, atol=1e-3)


def test_every_e4m3_value_and_nan(tier):
    """Every code against 1: subnormals, the largest, both NaN."""
    codes = torch.arange(256, dtype=torch.uint8, device=tier.device)
    k = torch.zeros(256, 64, dtype=torch.uint8, device=tier.device)
    k[:, 17] = codes
    q = torch.zeros(2, 1, 64, device=tier.device)
    q[:, 0, 17] = torch.tensor([1.0, -1.0], device=tier.device)
    one = torch.ones(2, 1, device=tier.device)
    scale = torch.ones(256, device=tier.device)
    cu_q, cu_k = int32([0, 1, 2], tier.device), int32([0, 256, 256], tier.device)
    for sign in (0, 1):
        with tier:
            logits = call(q[[sign, sign]].to(torch.float8_e4m3fn), one, k.view(torch.float8_e4m3fn), scale, cu_q, cu_k, 256)  # fmt: skip
        expected = (codes.view(torch.float8_e4m3fn).float() * (1 - 2 * sign)).relu()
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=0, equal_nan=True)


def test_sequences_of_many_lengths(tier):
    """Long and short ones in turn, some empty, in CUDA more tokens than one launch takes: as each of them alone.

    Alone, the scales of a sequence begin at an address of any alignment.
    """
    count, longest = (12, 40) if tier.interpreted else (60, 400)
    lengths = torch.randint(0, 30, (count,))
    lengths[::3] = torch.randint(longest // 2, longest, (len(lengths[::3]),))
    cu = [0, *lengths.cumsum(0).tolist()]
    if tier.name == "cuda":
        cu = [*cu, cu[-1] + 33_000]
    q, weights, k, k_scale, cu_q, cu_k = packed(cu, cu, 4, 64, tier.device)
    with tier:
        logits = call(q, weights, k, k_scale, cu_q, cu_k, longest)
        for begin, end in itertools.pairwise(cu):
            own = slice(begin, end)
            alone = int32([0, end - begin], tier.device)
            expected = call(q[own], weights[own], k[own], k_scale[own], alone, alone, longest)
            assert torch.equal(logits[own], expected)


def test_keys_beyond_max_seqlen_are_not_visible(tier):
    args = packed([0, 5], [0, 40], 4, 64, tier.device)
    with tier:
        narrow, wide = call(*args, 33), call(*args, 64)
    assert torch.equal(narrow, wide[:, :33])
    assert (wide[:, 40:] == -torch.inf).all()


def test_strided_inputs(tier):
    q, weights, k, k_scale, cu_q, cu_k = packed([0, 6], [0, 100], 4, 64, tier.device)
    apart = (
        torch.stack([q.view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)[:, 0],
        torch.cat([weights, weights], 1)[:, 4:],
        torch.cat([k.view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)[:, 64:],
    )
    with tier:
        expected = call(q, weights, k, k_scale, cu_q, cu_k, 100)
        logits = call(*apart, k_scale, cu_q, cu_k, 100)
    assert torch.equal(logits, expected)


def test_empty(tier):
    with tier:
        assert call(*packed([0, 0], [0, 5], 4, 64, tier.device), 5).shape == (0, 5)
        assert call(*packed([0, 2], [0, 5], 4, 64, tier.device), 0).shape == (2, 0)
        for cu in ([0, 2], [0]):  # no key, no sequence
            args = packed([0, 2], [0, 0], 4, 64, tier.device)
            cu = int32(cu, tier.device)
            logits = call(*args[:4], cu, torch.zeros_like(cu), 3)
            assert (logits == -torch.inf).all()


def test_same_bits_whatever_the_batch(tier):
    """A row alone, in a batch, and on other pages."""
    q, weights, k, k_scale, *_ = args = packed([0, 37, 66], [0, 150, 190], 6, 64, tier.device)
    with tier:
        together = call(*args, 150)
        for t in (0, 20, 36):
            keys = 150 - 36 + t
            cu = int32([0, 1], tier.device), int32([0, keys], tier.device)
            alone = call(q[t : t + 1], weights[t : t + 1], k[:keys], k_scale[:keys], *cu, keys)
            assert torch.equal(alone[0], together[t, :keys])


def test_a_perturbed_row_is_noticed(tier):
    args = packed([0, 9], [0, 60], 4, 64, tier.device)
    with tier:
        args[1][4] *= 1.25
        logits = call(*args, 60)
    args[1][4] /= 1.25
    with pytest.raises(AssertionError):
        assert_close(logits, args, 60)


@settings(max_examples=15)
@given(st.data())
def test_property_packed(tier, data):
    """Any lengths: equal to the reference. Any garbage offsets: no crash, and no visible key outside of the bounds."""
    sizes = st.lists(st.integers(0, 12), min_size=1, max_size=3)
    queries, keys = data.draw(sizes, "queries"), data.draw(sizes, "keys")
    sequences = min(len(queries), len(keys))
    cu_q = [sum(queries[:i]) for i in range(sequences + 1)]
    cu_k = [sum(keys[:i]) for i in range(sequences + 1)]
    width = data.draw(st.integers(0, 15), "max_seqlen_k")
    args = packed(cu_q, cu_k, 2, 32, tier.device)
    with tier:
        assert_close(call(*args, width), args, width) if width and cu_q[-1] else call(*args, width)
        garbage = [data.draw(st.lists(EXTREME | st.integers(-2, 30), min_size=3, max_size=3)) for _ in "qk"]  # fmt: skip
        logits = call(*args[:4], *(int32(g, tier.device) for g in garbage), width)
    assert (logits[:, min(width, len(args[2])) :] == -torch.inf).all()


@settings(max_examples=15)
@given(st.data())
def test_property_paged(tier, data):
    requests = data.draw(st.integers(1, 3), "requests")
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=requests, max_size=requests), "lengths")  # fmt: skip
    tokens = data.draw(st.lists(st.integers(0, 2), min_size=requests, max_size=requests), "tokens")
    cu_q = [sum(tokens[:i]) for i in range(requests + 1)]
    args = paged(cu_q, lengths, 3, 2, 32, tier.device)
    with tier:
        logits = dsa_kernels.indexer_logits_paged(*args)
        if cu_q[-1]:
            assert_close(logits, args)
        q, weights, cache, table, lengths, cu_q = args
        for argument in (table, lengths, cu_q):
            at = data.draw(st.integers(0, argument.numel() - 1))
            argument.view(-1)[at] = data.draw(EXTREME | st.integers(-2, 200))
        logits = dsa_kernels.indexer_logits_paged(q, weights, cache, table, lengths, cu_q)
    gone = ((table < 0) | (table >= len(cache))).repeat_interleave(64, 1).all(0)
    assert (logits[:, gone] == -torch.inf).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    args = packed([0, 3, 5], [0, 20, 27], 4, 64, device)
    opcheck(torch.ops.dsa_kernels.indexer_logits.default, (*args, 20))
    args = paged([0, 1, 3], [70, 20], 2, 4, 64, device)
    opcheck(torch.ops.dsa_kernels.indexer_logits_paged.default, args)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    args = packed([0, 3], [0, 20], 4, 64, device)
    compiled = torch.compile(lambda w: call(args[0], w * 2, *args[2:], 20) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(args[1]), call(args[0], args[1] * 2, *args[2:], 20) + 1)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    """Keys, queries and logits whose offsets pass 2^31."""
    keys = torch.zeros(2**25 + 1000, 64, dtype=torch.uint8, device="cuda")
    keys[-1000:] = e4m3(1000, 64, device="cuda").view(torch.uint8)
    k = keys.view(torch.float8_e4m3fn)
    q, weights, _, _, cu_q, _ = packed([0, 0, 3], [0, 1, 2], 16, 64, "cuda")
    scale = torch.ones(len(k), device="cuda")
    cu_k = int32([0, len(k) - 1000, len(k)], "cuda")
    logits = call(q, weights, k, scale, cu_q, cu_k, 1000)
    alone = int32([0, 3], "cuda"), int32([0, 1000], "cuda")
    assert torch.equal(logits, call(q, weights, k[-1000:], scale[-1000:], *alone, 1000))
    wide = call(q, weights, k[-1000:], scale[-1000:], *alone, 2**30)
    assert torch.equal(wide[:, :1000], logits) and (wide[:, 1000:] == -torch.inf).all()


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_inputs():
    args = packed([0, 3, 8], [0, 90, 200], 16, 64, "cuda")
    call(*args, 120)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call(*args, 120)
    for old, new in zip(args, packed([0, 5, 8], [0, 100, 200], 16, 64, "cuda")):
        old.copy_(new)
    graph.replay()
    assert torch.equal(logits, call(*args, 120))


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    args = packed([0, 3], [0, 90], 4, 64, "cuda")
    weights = cupy.from_dlpack(args[1])
    assert torch.equal(call(args[0], weights, *args[2:], 90), call(*args, 90))


BAD = {
    "q: expected float8_e4m3fn, got float32": lambda a: {"q": a["q"].float()},
    "q: expected shape": lambda a: {"q": a["q"][0]},
    "q: expected a head dimension of 32, 64 or 128, got 48": lambda a: {"q": a["q"].new_empty(4, 4, 48)},
    "q: expected at least one head": lambda a: {"q": a["q"][:, :0]},
    "q: expected the last 2 dimensions contiguous": lambda a: {"q": a["q"].transpose(0, 1)},
    "weights: expected float32": lambda a: {"weights": a["weights"].bfloat16()},
    "weights: expected shape .* with H = 4": lambda a: {"weights": a["weights"][:, :3]},
    "k: expected shape .* with D = 64": lambda a: {"k": a["k"][:, :32]},
    "k_scale: expected shape .* with L": lambda a: {"k_scale": a["k_scale"][1:]},
    "cu_seqlens_q: expected int32": lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()},
    "cu_seqlens_q: expected shape": lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][:0]},
    "cu_seqlens_k: expected shape": lambda a: {"cu_seqlens_k": a["cu_seqlens_k"][1:]},
    "max_seqlen_k: expected an integer >= 0": lambda a: {"max_seqlen_k": -1},
}  # fmt: skip
BAD_PAGED = {
    "index_cache: expected uint8": lambda a: {"index_cache": a["index_cache"].int()},
    "index_cache: expected shape": lambda a: {"index_cache": a["index_cache"][:, 4:]},
    "index_cache: expected a contiguous tensor": lambda a: {"index_cache": a["index_cache"][::2]},
    "index_cache: expected a storage offset divisible by 4": lambda a: {
        "index_cache": a["index_cache"].view(-1)[2:][: 64 * 68].view(1, -1)
    },
    "page_table: expected int32": lambda a: {"page_table": a["page_table"].long()},
    "lengths: expected shape .* with B = 2": lambda a: {"lengths": a["lengths"][1:]},
    "cu_seqlens_q: expected shape": lambda a: {"cu_seqlens_q": a["cu_seqlens_q"][1:]},
}


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", [*BAD, *BAD_PAGED])
def test_bad_input(message, mode):
    def call_bad():
        device = "cpu" if mode == "fake" else mode
        if message in BAD:
            names = ["q", "weights", "k", "k_scale", "cu_seqlens_q", "cu_seqlens_k"]
            args = dict(zip(names, packed([0, 4], [0, 9], 4, 64, device)), max_seqlen_k=9)
            return dsa_kernels.indexer_logits(**{**args, **BAD[message](args)})
        args = {
            "q": e4m3(4, 4, 64, device=device),
            "weights": torch.ones(4, 4, device=device),
            "index_cache": torch.zeros(3, 64 * 68, dtype=torch.uint8, device=device),
            "page_table": torch.zeros(2, 3, dtype=torch.int32, device=device),
            "lengths": int32([3, 3], device),
            "cu_seqlens_q": int32([0, 2, 4], device),
        }
        return dsa_kernels.indexer_logits_paged(**{**args, **BAD_PAGED[message](args)})

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call_bad()
        else:
            call_bad()
