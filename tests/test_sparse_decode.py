import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels.sparse_decode.reference import sparse_decode as reference

OP = "sparse_decode"
CPU_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(lengths, tokens, topk, heads, kv_heads, dim, dtype, device="cpu"):
    """Shuffled pages, tokens[b] queries a request, random selections with a -1 tail; unused cache slots hold NaN."""
    pages = [-(-n // 64) for n in lengths]
    order = torch.randperm(sum(pages) + 3)
    k_cache, v_cache = torch.full((2, len(order), 64, kv_heads, dim), torch.nan)
    page_table = torch.full((len(lengths), max(pages) + 1), -1)
    used = 0
    for b, (length, count) in enumerate(zip(lengths, pages)):
        page_table[b, :count] = order[used : used + count]
        used += count
        slots = order[used - count : used].repeat_interleave(64)[:length], torch.arange(length) % 64
        k_cache[slots], v_cache[slots] = torch.randn(2, length, kv_heads, dim)
    rows = []
    for length, count in zip(lengths, tokens):
        for _ in range(count):
            chosen = torch.randperm(length)[:topk].sort().values
            rows.append(F.pad(chosen, (0, topk - len(chosen)), value=-1))
    q = torch.randn(sum(tokens), heads, dim)
    boundaries = torch.tensor([0, *tokens]).cumsum(0)
    indices = torch.stack(rows) if rows else torch.zeros(0, topk)
    floats = [x.to(device, dtype) for x in (q, k_cache, v_cache)]
    integers = (indices, page_table, torch.tensor(lengths), boundaries)
    return [*floats, *(x.to(device, torch.int32) for x in integers)]


def sdpa(q, k_cache, v_cache, indices, page_table, lengths, cu_seqlens_q):
    """The oracle: torch's own attention over the gathered rows of each token."""
    out = torch.zeros_like(q)
    for b in range(len(lengths)):
        for t in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
            position = indices[t][indices[t] >= 0].long()
            if len(position) == 0:
                continue
            page = page_table[b][position // 64].long()
            keys, values = (
                c[page, position % 64].transpose(0, 1)[None] for c in (k_cache, v_cache)
            )
            out[t] = F.scaled_dot_product_attention(
                q[t][None, :, None], keys, values, enable_gqa=True
            )[0, :, 0]
    return out


def assert_as_good(actual, expected, baseline):
    """The error of every row against float64 is at most twice the baseline's, plus four ulp of the largest value."""
    error, allowed = ((x.double() - expected).abs().amax(-1) for x in (actual, baseline))
    floor = 4 * torch.finfo(actual.dtype).eps * expected.abs().max()
    assert not actual.isnan().any()
    assert (error <= 2 * allowed + floor).all(), (error - 2 * allowed - floor).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 1, 128), (3, 1, 64), (4, 2, 64)])
def test_equals_sdpa(tier, heads, kv_heads, dim, dtype):
    args = problem([300, 0, 20], [2, 0, 1], 150, heads, kv_heads, dim, dtype, tier.device)
    with tier:
        out, lse = dsa_kernels.sparse_decode(*args)
    exact = [x.double() if x.is_floating_point() else x for x in args]
    assert_as_good(out, sdpa(*exact), sdpa(*args))
    torch.testing.assert_close(lse, reference(*args, dim**-0.5)[1], rtol=1e-5, atol=1e-5)


def check_against_reference(tier, args):
    with tier:
        out, lse = dsa_kernels.sparse_decode(*args, softmax_scale=0.2)
    expected = reference(*args, 0.2)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
    return out, lse


def test_entries_that_count_as_empty(tier):
    args = problem([100, 70], [3, 1], 8, 2, 1, 64, torch.float32, tier.device)
    indices, page_table, lengths = args[3], args[4], args[5]
    indices[0] = torch.tensor([3, 3, 3, 7, 99, 99, 100, 2**31 - 1])  # duplicates, beyond the length
    indices[1] = torch.tensor([-(2**31), -64, -1, 5, 5, 6, 127, 128])  # below 0, garbage of a page
    indices[2] = -1
    page_table[1, 1] = 10_000  # page 1 of request 1 lies outside the cache
    indices[3] = torch.tensor([0, 1, 2, 3, 64, 65, 66, 69])
    lengths[0] = 2**31 - 1  # longer than the page table holds
    indices[0, 6:] = torch.tensor([64 * page_table.shape[1], 2**31 - 1])
    indices[1, 6:] = -1
    out, lse = check_against_reference(tier, args)
    assert not out.isnan().any()
    assert not out[2].any() and lse[2].isneginf().all() and not lse[[0, 1, 3]].isinf().any()


def test_tokens_outside_all_requests(tier):
    args = problem([40, 30], [2, 3], 8, 2, 1, 64, torch.float32, tier.device)
    args[6].copy_(torch.tensor([1, 1, 3]))
    out, lse = check_against_reference(tier, args)
    dead = torch.tensor([True, False, False, True, True], device=lse.device)
    assert torch.equal(lse.isneginf().all(1), dead)
    assert not out[dead].any()


@pytest.mark.parametrize("requests, tokens, topk", [(0, 0, 4), (1, 0, 4), (1, 2, 0), (0, 2, 4)])
def test_nothing_to_attend(tier, requests, tokens, topk):
    args = problem([10], [tokens], topk, 2, 1, 64, torch.bfloat16, tier.device)
    if requests == 0:
        args[4:] = args[4][:0], args[5][:0], args[6][:1]
    out, lse = check_against_reference(tier, args)
    assert not out.any() and lse.isneginf().all()


@settings(max_examples=10)
@given(st.data())
def test_property(tier, data):
    anything = st.integers(-3, 140) | st.sampled_from([-(2**31), 2**31 - 1])
    args = problem([130, 64], [1, 2], 6, 1, 1, 64, torch.float32, tier.device)
    for x in args[1:3]:
        x.nan_to_num_(0)  # what a garbage length lets in must be a number
    for x in args[3:]:
        if data.draw(st.booleans(), "garbage"):
            values = data.draw(st.lists(anything, min_size=x.numel(), max_size=x.numel()))
            x.copy_(torch.tensor(values, dtype=torch.int32).view(x.shape))
    check_against_reference(tier, args)


def test_same_bits_alone_and_batched_and_on_every_run(tier):
    args = problem([200, 90, 300], [1, 2, 1], 140, 2, 1, 64, torch.bfloat16, tier.device)
    q, k_cache, v_cache, indices, page_table, lengths, _ = args
    request = [0, 1, 1, 2]
    with tier:
        out, lse = dsa_kernels.sparse_decode(*args)
        again = dsa_kernels.sparse_decode(*args)
        for t, b in enumerate(request):
            one = torch.tensor([0, 1], dtype=torch.int32, device=tier.device)
            alone = dsa_kernels.sparse_decode(
                q[t : t + 1], k_cache, v_cache, indices[t : t + 1], page_table[b : b + 1], lengths[b : b + 1], one
            )  # fmt: skip
            assert torch.equal(alone[0][0], out[t]) and torch.equal(alone[1][0], lse[t])
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_strides(tier):
    args = problem([100], [4], 20, 2, 1, 64, torch.float32, tier.device)
    q, k_cache, v_cache, indices, *rest = args
    wide = torch.stack([k_cache, v_cache], dim=2)  # K and V interleaved by slot
    doubled = indices.repeat_interleave(2, 0)
    with tier:
        expected = dsa_kernels.sparse_decode(*args)
        actual = dsa_kernels.sparse_decode(
            q.repeat_interleave(2, 0)[::2], wide[:, :, 0], wide[:, :, 1], doubled[::2], *rest
        )
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_a_perturbed_row_is_noticed(tier):
    args = problem([100], [3], 20, 2, 1, 64, torch.float32, tier.device)
    with tier:
        before, _ = dsa_kernels.sparse_decode(*args)
        args[3][1, 4:] = -1
        after, _ = dsa_kernels.sparse_decode(*args)
    assert (before != after).flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("device", CPU_GPU)
def test_opcheck(device):
    args = problem([70, 10], [1, 1], 5, 2, 1, 64, torch.float32, device)
    torch.library.opcheck(torch.ops.dsa_kernels.sparse_decode.default, (*args, 0.125))


@pytest.mark.parametrize("device", CPU_GPU)
def test_compiles_without_a_graph_break(device):
    args = problem([70, 10], [1, 1], 5, 2, 1, 64, torch.float32, device)

    def double(q):
        return dsa_kernels.sparse_decode(q * 2, *args[1:])[0] + 1

    torch.testing.assert_close(torch.compile(double, fullgraph=True)(args[0]), double(args[0]))


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_lengths():
    args = problem([300, 200], [1, 1], 150, 4, 2, 64, torch.float32, "cuda")
    dsa_kernels.sparse_decode(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = dsa_kernels.sparse_decode(*args)
    args[0].copy_(torch.randn_like(args[0]))
    args[5].copy_(torch.tensor([0, 77]))
    args[6].copy_(torch.tensor([0, 0, 2]))
    graph.replay()
    torch.testing.assert_close(out, reference(*args, 0.125)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    pages = 2**31 // (64 * 4 * 128) + 64
    cache = torch.zeros(2, pages, 64, 4, 128, dtype=torch.bfloat16, device="cuda")
    cache[:, -2:] = torch.randn(2, 2, 64, 4, 128)
    q = torch.randn(1, 32, 128, device="cuda").bfloat16()
    indices = torch.arange(128, device="cuda", dtype=torch.int32)[None]
    lengths, one = torch.tensor([[128], [0]], dtype=torch.int32, device="cuda")
    boundaries = torch.cat([one, one + 1])
    table = torch.tensor([[pages - 2, pages - 1]], dtype=torch.int32, device="cuda")
    far = dsa_kernels.sparse_decode(q, *cache, indices, table, lengths, boundaries)[0]
    near = dsa_kernels.sparse_decode(
        q, *cache[:, -2:].contiguous(), indices, table - (pages - 2), lengths, boundaries
    )[0]
    assert torch.equal(far, near)


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    args = problem([70], [1], 5, 2, 1, 64, torch.float32, "cuda")
    out, _ = dsa_kernels.sparse_decode(*map(cupy.from_dlpack, args))
    assert torch.equal(out, dsa_kernels.sparse_decode(*args)[0])


NAMES = ("q", "k_cache", "v_cache", "indices", "page_table", "lengths", "cu_seqlens_q")
BAD = {
    "q: expected float32 or bfloat16": ("q", lambda x: x.double()),
    "q: expected a head dim in": ("q", lambda x: x[..., :32].contiguous()),
    "k_cache: expected float32, got bfloat16": ("k_cache", lambda x: x.bfloat16()),
    "k_cache: expected shape": ("k_cache", lambda x: x[:, :32]),
    "k_cache: expected a number of heads": ("k_cache", lambda x: x.repeat(1, 1, 3, 1)),
    "v_cache: expected shape": ("v_cache", lambda x: x[1:]),
    "indices: expected int32": ("indices", lambda x: x.long()),
    "indices: expected shape": ("indices", lambda x: x[1:]),
    "page_table: expected shape": ("page_table", lambda x: x[0]),
    "lengths: expected shape": ("lengths", lambda x: x[1:]),
    "cu_seqlens_q: expected shape": ("cu_seqlens_q", lambda x: x[1:]),
    "softmax_scale: expected a finite positive number": ("softmax_scale", lambda _: float("nan")),
}


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        device = "cpu" if mode == "fake" else mode
        integers = [torch.zeros(*n, dtype=torch.int32, device=device) for n in ((2, 5), (2, 3), (2,), (3,))]  # fmt: skip
        q, cache = torch.randn(2, 4, 64, device=device), torch.randn(4, 64, 2, 64, device=device)
        args = dict(zip(NAMES, (q, cache, cache, *integers)))
        name, spoil = BAD[message]
        args[name] = spoil(args.get(name))
        positional = [args.pop(n) for n in NAMES]
        return dsa_kernels.sparse_decode(*positional, **args)

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call()
        else:
            call()
