import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels import (
    read_index_cache,
    read_kv_cache,
    token_slots,
    write_index_cache,
    write_kv_cache,
)
from dsa_kernels.paged_cache import reference

OP = "write_kv_cache"  # all four ops have the same table
FP8 = torch.float8_e4m3fn


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def slot_tensor(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int64, device=device)


def kv_caches(pages, heads, dim, dtype, device="cpu"):
    return [torch.randn(pages, 64, heads, dim, device=device).to(dtype) for _ in range(2)]


def index_cache(pages, dim, device="cpu"):
    """Random codes and scales, none of them NaN."""
    cache = torch.randint(0, 127, (pages, 64 * (dim + 4)), dtype=torch.uint8, device=device)
    cache[:, 64 * dim :].view(torch.float32).normal_()
    return cache


def index_keys(tokens, dim, device="cpu"):
    return torch.randn(tokens, dim, device=device).to(FP8), torch.rand(tokens, device=device)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


SLOTS = [0, 63, 64, 191, -1, 192, 100, 2**40, -(2**40), 2**63 - 1, -(2**63), 130, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, dim", [(4, 128), (1, 64), (3, 40), (9, 128)])
def test_write_kv(tier, dtype, heads, dim):
    k, v = (torch.randn(len(SLOTS), heads, dim, device=tier.device).to(dtype) for _ in range(2))
    slots = slot_tensor(SLOTS, tier.device)
    caches = kv_caches(3, heads, dim, dtype, tier.device)
    expected = [cache.clone() for cache in caches]
    with tier:
        write_kv_cache(k, v, *caches, slots)
    reference.write_kv_cache(k, v, *expected, slots)
    assert_same_bits(caches, expected)
    assert torch.equal(caches[0][2, 63], k[3]) and torch.equal(caches[1][1, 36], v[6])


@pytest.mark.parametrize("dim", [32, 64, 128, 80])
def test_write_index(tier, dim):
    k, k_scale = index_keys(len(SLOTS), dim, tier.device)
    slots = slot_tensor(SLOTS, tier.device)
    cache = index_cache(3, dim, tier.device)
    expected = cache.clone()
    with tier:
        write_index_cache(k, k_scale, cache, slots)
    reference.write_index_cache(k, k_scale, expected, slots)
    assert_same_bits([cache], [expected])
    page = cache[2].cpu()  # the layout, spelled out: slot 191 holds token 3
    assert torch.equal(page[63 * dim : 64 * dim], k[3].view(torch.uint8).cpu())
    assert page[64 * dim :].view(torch.float32)[63] == k_scale[3].cpu()


TABLE = [[5, 2, 0], [1, 3, -1], [7, 4, 6], [-9, 2**31 - 1, 6]]
CU_SEQLENS = [0, 70, 70, 262, 400]  # an empty request; the last is longer than its pages that exist


def test_read(tier):
    table, cu_seqlens = int32(TABLE, tier.device), int32(CU_SEQLENS, tier.device)
    caches = kv_caches(7, 2, 64, torch.bfloat16, tier.device)
    cache = index_cache(7, 64, tier.device)
    with tier:
        k, v = read_kv_cache(*caches, table, cu_seqlens, 410)
        index_k, index_scale = read_index_cache(cache, table, cu_seqlens, 410)
    assert_same_bits((k, v), reference.read_kv_cache(*caches, table, cu_seqlens, 410))
    assert_same_bits(
        (index_k, index_scale), reference.read_index_cache(cache, table, cu_seqlens, 410)
    )
    assert torch.equal(k[69], caches[0][2, 5]) and torch.equal(v[70 + 64], caches[1][4, 0])
    zero = [
        *range(70, 134),
        *range(262, 390),
        *range(400, 410),
    ]  # pages 7, -9, 2^31-1; past the end
    assert not k[zero].any() and not v[zero].any() and not index_scale[zero].any()
    assert not index_k[zero].view(torch.uint8).any() and k[390:400].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_is_read(tier, dtype):
    lengths = [130, 0, 64, 1]
    table = int32([[8, 1, 5], [0, 0, 0], [3, 2, 2], [4, -1, -1]], tier.device)
    cu_seqlens = int32([0, 130, 130, 194, 195], tier.device)
    k, v = (torch.randn(195, 2, 64, device=tier.device).to(dtype) for _ in range(2))
    index_k, index_scale = index_keys(195, 64, tier.device)
    caches = kv_caches(9, 2, 64, dtype, tier.device)
    cache = index_cache(9, 64, tier.device)
    slots = token_slots(table, cu_seqlens, int32(lengths, tier.device), 195)
    with tier:
        write_kv_cache(k, v, *caches, slots)
        write_index_cache(index_k, index_scale, cache, slots)
        assert_same_bits(read_kv_cache(*caches, table, cu_seqlens, 195), (k, v))
        read = read_index_cache(cache, table, cu_seqlens, 195)
    assert_same_bits(read, (index_k, index_scale))


def test_strided_inputs(tier):
    """Splits of a projection, one layer of a cache of layers, K and V interleaved page by page."""
    qkv = torch.randn(70, 6 * 64, device=tier.device)
    k, v = qkv[:, 128:256].view(70, 2, 64), qkv[:, 256:].view(70, 2, 64)
    both = torch.randn(4, 2, 64, 2, 64, device=tier.device)
    caches, expected = both.unbind(1), both.clone().unbind(1)
    wide = torch.randn(70, 100, device=tier.device).to(FP8)
    scales = torch.rand(70, device=tier.device)
    layers = index_cache(8, 64, tier.device)
    expected_layers = layers.clone()
    slots = torch.randperm(256, device=tier.device)[:70]
    table = int32([[3, 0, 0, 1], [2, 1, 0, 0]], tier.device)[:, 1:]
    cu_seqlens = int32([0, 150, 160], tier.device)
    with tier:
        write_kv_cache(k, v, *caches, slots)
        write_index_cache(wide[:, :64], scales, layers[::2], slots)
        read = read_kv_cache(*caches, table, cu_seqlens, 160)
        read_index = read_index_cache(layers[::2], table, cu_seqlens, 160)
    reference.write_kv_cache(k, v, *expected, slots)
    reference.write_index_cache(wide[:, :64], scales, expected_layers[::2], slots)
    assert_same_bits([*caches, layers], [*expected, expected_layers])
    assert_same_bits(read, reference.read_kv_cache(*expected, table, cu_seqlens, 160))
    assert_same_bits(
        read_index, reference.read_index_cache(expected_layers[::2], table, cu_seqlens, 160)
    )


@pytest.mark.parametrize("tokens, pages, batch", [(0, 3, 2), (5, 0, 2), (0, 0, 0), (5, 3, 0)])
def test_empty(tier, tokens, pages, batch):
    k = torch.randn(tokens, 2, 64, device=tier.device)
    caches = kv_caches(pages, 2, 64, torch.float32, tier.device)
    slots = torch.arange(tokens, device=tier.device) + 64 * pages
    cache = index_cache(pages, 32, tier.device)
    before = [x.clone() for x in (*caches, cache)]
    table = torch.zeros(batch, 0, dtype=torch.int32, device=tier.device)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=tier.device)
    with tier:
        write_kv_cache(k, k, *caches, slots)
        write_index_cache(*index_keys(tokens, 32, tier.device), cache, slots)
        read = read_kv_cache(*caches, table, cu_seqlens, tokens)
        read_index = read_index_cache(cache, table, cu_seqlens, tokens)
    assert_same_bits((*caches, cache), before)
    assert [x.shape[0] for x in (*read, *read_index)] == [tokens] * 4
    assert not any(x.contiguous().view(torch.uint8).any() for x in (*read, *read_index))


extreme32 = st.integers(-(2**31), 2**31 - 1)
extreme64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=10)
@given(st.data())
def test_property_write(tier, data):
    pages = data.draw(st.integers(0, 3), "pages")
    values = st.integers(-3, 64 * pages + 3) | extreme64
    values = data.draw(st.lists(values, max_size=20, unique=True), "slots")
    slots = slot_tensor(values, tier.device)
    k = torch.randn(len(values), 1, 32, device=tier.device)
    caches = kv_caches(pages, 1, 32, torch.float32, tier.device)
    cache = index_cache(pages, 32, tier.device)
    expected = [x.clone() for x in (*caches, cache)]
    index = index_keys(len(values), 32, tier.device)
    with tier:
        write_kv_cache(k, -k, *caches, slots)
        write_index_cache(*index, cache, slots)
    reference.write_kv_cache(k, -k, *expected[:2], slots)
    reference.write_index_cache(*index, expected[2], slots)
    assert_same_bits((*caches, cache), expected)


@settings(max_examples=10)
@given(st.data())
def test_property_read(tier, data):
    """Any page table; cu_seqlens that ascend, though not from 0, read exactly as the reference."""
    batch = data.draw(st.integers(0, 5), "batch")
    max_pages = data.draw(st.integers(0, 3), "max_pages")
    entries = st.lists(st.integers(-1, 5) | extreme32, min_size=max_pages, max_size=max_pages)
    table = data.draw(st.lists(entries, min_size=batch, max_size=batch), "page_table")
    table = int32(table, tier.device).view(batch, max_pages)
    lengths = st.integers(-20, 250) | extreme32
    values = data.draw(st.lists(lengths, min_size=batch + 1, max_size=batch + 1), "cu_seqlens")
    cu_seqlens = int32(sorted(values), tier.device)
    total = data.draw(st.integers(0, 260), "total")
    caches = kv_caches(5, 1, 32, torch.bfloat16, tier.device)
    cache = index_cache(5, 32, tier.device)
    with tier:
        kv = read_kv_cache(*caches, table, cu_seqlens, total)
        index = read_index_cache(cache, table, cu_seqlens, total)
    assert_same_bits(kv, reference.read_kv_cache(*caches, table, cu_seqlens, total))
    assert_same_bits(index, reference.read_index_cache(cache, table, cu_seqlens, total))


@settings(max_examples=10)
@given(st.data())
def test_property_malformed_cu_seqlens(tier, data):
    """A row reads as 0 or as that of a request whose range holds it."""
    batch, total = 4, 100
    values = st.lists(st.integers(-5, 105) | extreme32, min_size=batch + 1, max_size=batch + 1)
    cu_seqlens = data.draw(values, "cu_seqlens")
    table = torch.arange(2 * batch, dtype=torch.int32, device=tier.device).view(batch, 2)
    scale = torch.arange(1, 64 * 2 * batch + 1, device=tier.device).view(2 * batch, 64)
    cache = index_cache(2 * batch, 32, tier.device)
    cache[:, 64 * 32 :] = scale.float().view(torch.uint8)  # each token's scale is its slot + 1
    with tier:
        slots = read_index_cache(cache, table, int32(cu_seqlens, tier.device), total)[1].int() - 1
    for row, slot in enumerate(slots.tolist()):
        claims = {
            b * 128 + row - cu_seqlens[b]
            for b in range(batch)
            if cu_seqlens[b] <= row < cu_seqlens[b + 1]
        }
        assert slot in {-1, *claims}


@settings(max_examples=40)
@given(st.data())
def test_token_slots(data):
    batch = data.draw(st.integers(0, 4), "batch")
    max_pages = data.draw(st.integers(0, 3), "max_pages")
    new = data.draw(st.lists(st.integers(0, 70), min_size=batch, max_size=batch), "new tokens")
    length = st.integers(-5, 200) | extreme32
    lengths = data.draw(st.lists(length, min_size=batch, max_size=batch), "lengths")
    entries = st.lists(st.integers(-2, 9) | extreme32, min_size=max_pages, max_size=max_pages)
    table = data.draw(st.lists(entries, min_size=batch, max_size=batch), "page_table")
    padding = data.draw(st.integers(0, 3), "padding")
    cu_seqlens = [sum(new[:b]) for b in range(batch + 1)]
    expected = []
    for b in range(batch):
        for i in range(new[b]):
            p = lengths[b] - new[b] + i
            page = table[b][p // 64] if 0 <= p < 64 * max_pages else -1
            expected.append(page * 64 + p % 64 if page >= 0 else -1)
    slots = token_slots(
        int32(table).view(batch, max_pages), int32(cu_seqlens), int32(lengths), sum(new) + padding
    )
    assert slots.dtype == torch.int64 and slots.tolist() == expected + [-1] * padding


def test_a_misplaced_token_is_noticed(tier):
    k = torch.randn(4, 1, 64, device=tier.device)
    caches = [torch.zeros(2, 64, 1, 64, device=tier.device) for _ in range(2)]
    with tier:
        write_kv_cache(k, k, *caches, slot_tensor([3, 70, 9, 11], tier.device))
    expected = [torch.zeros_like(cache) for cache in caches]
    reference.write_kv_cache(k, k, *expected, slot_tensor([3, 70, 10, 11], tier.device))
    wrong = (caches[0] != expected[0]).any(-1).any(-1)
    assert wrong.nonzero().tolist() == [[0, 9], [0, 10]]


def op_arguments(device):
    table, cu_seqlens = int32([[1, 0], [2, 2]], device), int32([0, 70, 75], device)
    slots = slot_tensor([5, -1, 100], device)
    k, caches = torch.randn(3, 2, 64, device=device), kv_caches(3, 2, 64, torch.float32, device)
    cache = index_cache(3, 64, device)
    return {
        "write_kv_cache": (k, k.clone(), *caches, slots),
        "write_index_cache": (*index_keys(3, 64, device), cache, slots),
        "read_kv_cache": (*caches, table, cu_seqlens, 75),
        "read_index_cache": (cache, table, cu_seqlens, 75),
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", list(op_arguments("cpu")))
def test_opcheck(op, device):
    utils = ["test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
    if op != "write_index_cache":  # torch's schema test cannot compare float8 inputs
        utils.append("test_schema")
    args = op_arguments(device)[op]
    torch.library.opcheck(getattr(torch.ops.dsa_kernels, op).default, args, test_utils=utils)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    def step(k, v, k_cache, v_cache, table, cu_seqlens_q, lengths):
        slots = token_slots(table, cu_seqlens_q, lengths, k.shape[0])
        write_kv_cache(k * 2, v, k_cache, v_cache, slots)
        return read_kv_cache(k_cache, v_cache, table, cu_seqlens_q, 5)

    table, cu_seqlens_q = int32([[1, 0], [2, 2]], device), int32([0, 2, 5], device)
    k, v = torch.randn(2, 5, 2, 64, device=device)
    caches = [torch.zeros(3, 64, 2, 64, device=device) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    rest = (table, cu_seqlens_q, int32([65, 4], device))
    read = torch.compile(step, fullgraph=True)(k, v, *caches, *rest)
    assert_same_bits(read, step(k, v, *expected, *rest))
    assert_same_bits(caches, expected)
    assert torch.equal(caches[0][1, 63], 2 * k[0]) and torch.equal(caches[1][0, 0], v[1])


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_inputs():
    table, cu_seqlens = int32([[1, 0], [2, 2]], "cuda"), int32([0, 70, 75], "cuda")
    lengths = int32([70, 5], "cuda")
    k, v = torch.randn(2, 75, 2, 64, device="cuda")
    caches = kv_caches(4, 2, 64, torch.float32, "cuda")

    def step():
        write_kv_cache(k, v, *caches, token_slots(table, cu_seqlens, lengths, 75))
        return read_kv_cache(*caches, table, cu_seqlens, 75)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read = step()
    k.normal_()
    table.copy_(int32([[3, 1], [0, 2]]))
    cu_seqlens.copy_(int32([0, 60, 75]))
    lengths.copy_(int32([60, 15]))
    graph.replay()
    assert_same_bits(read, (k, v))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    """The last page of caches of 2^32 elements, and of an index cache past 2^31 bytes."""
    page, row = 2**18, 4 * 64
    caches = [torch.zeros(page + 1, 64, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
    k, v = torch.randn(2, 64, 4, 64, device="cuda").bfloat16()
    slots = torch.arange(page * 64, page * 64 + 64, device="cuda")
    table, cu_seqlens = int32([[page]], "cuda"), int32([0, 64], "cuda")
    write_kv_cache(k, v, *caches, slots)
    assert caches[0].numel() > 2**32 and not caches[0].view(-1, row)[: page * 64 : 4097].any()
    assert_same_bits(read_kv_cache(*caches, table, cu_seqlens, 64), (k, v))
    del caches
    page = 2**19
    cache = torch.zeros(page + 1, 64 * 68, dtype=torch.uint8, device="cuda")
    index = index_keys(64, 64, "cuda")
    write_index_cache(*index, cache, torch.arange(page * 64, page * 64 + 64, device="cuda"))
    assert_same_bits(read_index_cache(cache, int32([[page]], "cuda"), cu_seqlens, 64), index)


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    k, v = torch.randn(2, 3, 2, 64, device="cuda")
    caches = [torch.zeros(1, 64, 2, 64, device="cuda") for _ in range(2)]
    slots = slot_tensor([2, 0, 1], "cuda")
    write_kv_cache(*(cupy.from_dlpack(x) for x in (k, v, *caches, slots)))
    assert torch.equal(caches[0][0, slots], k) and torch.equal(caches[1][0, slots], v)


BAD = {
    "write_kv_cache": {
        "k: expected float32 or bfloat16, got float64": lambda k, v, kc, vc, s: (k.double(), v, kc, vc, s),
        "k: expected the last 2 dimensions contiguous": lambda k, v, kc, vc, s: (k.mT.contiguous().mT, v, kc, vc, s),
        "v: expected shape": lambda k, v, kc, vc, s: (k, v[1:], kc, vc, s),
        "k_cache: expected shape": lambda k, v, kc, vc, s: (k, v, kc[:, 1:], vc, s),
        "k_cache: expected torch.float32": lambda k, v, kc, vc, s: (k, v, kc.bfloat16(), vc.bfloat16(), s),
        "v_cache: expected float32, got bfloat16": lambda k, v, kc, vc, s: (k, v, kc, vc.bfloat16(), s),
        "v_cache: expected the last 3 dimensions contiguous": lambda k, v, kc, vc, s: (k, v, kc, vc.transpose(1, 2).contiguous().transpose(1, 2), s),
        "slots: expected int64, got int32": lambda k, v, kc, vc, s: (k, v, kc, vc, s.int()),
        "slots: expected shape": lambda k, v, kc, vc, s: (k, v, kc, vc, s[1:]),
    },
    "write_index_cache": {
        "k: expected float8_e4m3fn": lambda k, x, c, s: (k.view(torch.uint8), x, c, s),
        "k_scale: expected shape": lambda k, x, c, s: (k, x[1:], c, s),
        r"index_cache: expected shape \[P, 64 \* \(64 \+ 4\)\]": lambda k, x, c, s: (k, x, c[:, :-4], s),
        "index_cache: expected pages at multiples of 4 bytes": lambda k, x, c, s: (k, x, c.repeat(1, 2)[:, 1:4353], s),
        "slots: expected a contiguous tensor": lambda k, x, c, s: (k, x, c, s.repeat(2)[::2]),
    },
    "read_kv_cache": {
        "k_cache: expected shape": lambda kc, vc, p, c, n: (kc[0], vc, p, c, n),
        "page_table: expected int32, got int64": lambda kc, vc, p, c, n: (kc, vc, p.long(), c, n),
        "cu_seqlens: expected shape": lambda kc, vc, p, c, n: (kc, vc, p, c[1:], n),
        "total: expected an integer >= 0": lambda kc, vc, p, c, n: (kc, vc, p, c, -1),
    },
    "read_index_cache": {
        "index_cache: expected uint8": lambda x, p, c, n: (x.int(), p, c, n),
        "index_cache: expected shape": lambda x, p, c, n: (x[:, :256], p, c, n),
        "page_table: expected the last dimension contiguous": lambda x, p, c, n: (x, p.mT, c, n),
        "total: expected an integer >= 0, got 1.5": lambda x, p, c, n: (x, p, c, 1.5),
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op, message", [(op, message) for op in BAD for message in BAD[op]])
def test_bad_input(op, message, mode):
    args = op_arguments("cpu" if mode == "fake" else mode)[op]
    args = BAD[op][message](*args)
    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode() as fake:
                args = [fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
                getattr(dsa_kernels, op)(*args)
        else:
            getattr(dsa_kernels, op)(*args)
