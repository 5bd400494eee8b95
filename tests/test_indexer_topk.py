import importlib
from itertools import pairwise

import pytest
import torch
from hard_scores import deceptive_rows, hard_rows
from held_multiprocessors import hold_multiprocessors
from hypothesis import given, settings
from hypothesis import strategies as st
from indexer_inputs import e4m3, int32, opcheck, packed, paged

import dsa_kernels
from dsa_kernels.indexer_logits.reference import indexer_logits as reference_logits
from dsa_kernels.indexer_topk.reference import indexer_topk as reference
from dsa_kernels.indexer_topk.reference import indexer_topk_paged as reference_paged
from dsa_kernels.topk_select.reference import topk_select as sorted_rows

OP = "indexer_topk"
triton_windows = importlib.import_module("dsa_kernels.indexer_topk.triton")
triton_selection = importlib.import_module("dsa_kernels.topk_select.triton")
EXTREME = st.integers(-(2**31), 2**31 - 1)


def select(args, topk, width):
    return dsa_kernels.indexer_topk(*args, topk, max_seqlen_k=width)


def visible(cu_q, num_keys, tokens, width):
    """Keys that each token sees."""
    seen = torch.zeros(tokens, dtype=torch.int32)
    for q0, q1, keys in zip(cu_q, cu_q[1:], num_keys):
        seen[q0:q1] = (torch.arange(q0, q1) + 1 + keys - q1).clamp(0, min(keys, width))
    return seen


def assert_selects_own_scores(indices, logits, topk, seen):
    """Exactly the set that a stable sort of the implementation's own scores gives."""
    expected = sorted_rows(logits, topk, None, seen.to(logits.device))
    torch.testing.assert_close(indices, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "heads, dim, topk", [(5, 32, 1), (16, 64, 37), (16, 64, 500), (8, 128, 50)]
)
def test_packed(tier, heads, dim, topk):
    """Sequences of all relations; rows that see fewer keys than topk, more, and none."""
    cu_q, cu_k, width = [0, 1, 1, 8, 11, 11, 16], [0, 90, 95, 220, 223, 230, 300], 120
    args = packed(cu_q, cu_k, heads, dim, tier.device, tokens=18, keys=310)
    with tier:
        indices = select(args, topk, width)
        logits = dsa_kernels.indexer_logits(*args, max_seqlen_k=width)
    keys = [b - a for a, b in pairwise(cu_k)]
    assert_selects_own_scores(indices, logits, topk, visible(cu_q, keys, 18, width))
    assert (indices[16:] == -1).all()


@pytest.mark.parametrize("heads, dim, topk", [(3, 64, 20), (16, 64, 64), (64, 128, 300)])
def test_paged(tier, heads, dim, topk):
    cu_q, lengths = [0, 1, 3, 3, 7, 8], [200, 64, 30, 65, 0]
    args = paged(cu_q, lengths, 5, heads, dim, tier.device)
    with tier:
        indices = dsa_kernels.indexer_topk_paged(*args, topk)
        logits = dsa_kernels.indexer_logits_paged(*args)
    assert_selects_own_scores(indices, logits, topk, visible(cu_q, lengths, 8, 320))


def test_reference_is_a_sort_of_the_reference_logits():
    """The two definitions agree, with ties, infinities and NaN among the scores."""
    args = packed([0, 6, 9], [0, 100, 140], 2, 64, "cpu")
    args[3][::5], args[3][1::5], args[3][2::5] = 0.0, torch.nan, torch.inf
    for dtype in (torch.float32, torch.float64):
        args = (args[0], args[1].to(dtype), *args[2:])
        indices = reference(*args, 60, 100)
        seen = visible([0, 6, 9], [100, 40], 9, 100)
        assert_selects_own_scores(indices, reference_logits(*args, 100), 60, seen)


def test_near_the_float64_reference(tier):
    """Across implementations sets may differ only where the scores at the boundary are within rounding."""
    args = packed([0, 8], [0, 700], 16, 64, tier.device)
    with tier:
        indices = select(args, 64, 700).long()
    exact = reference(args[0], args[1].double(), *args[2:], 64, 700).long()
    logits = dsa_kernels.indexer_logits(*args, max_seqlen_k=700)
    ours, theirs = logits.gather(1, indices), logits.gather(1, exact)
    slack = 2e-2 if tier.device.type == "cuda" else 1e-5
    assert (ours.sort(1).values - theirs.sort(1).values).abs().max() < slack * logits.abs().max()


@pytest.mark.parametrize(
    "heads, tokens, length, topk",
    [(1, 11, 300, 40), (16, 11, 9000, 2048), (16, 11, 70_000, 4096), (64, 11, 9000, 33), (16, 1050, 33_000, 2048), (64, 264, 131_072, 33), (16, 8448, 9000, 2048)],
)  # fmt: skip
def test_hard_scores(tier, heads, tokens, length, topk):
    """Ties, plateaus, infinities, NaN, and rows that no sample tells: one head sees, and the score is the key's scale.
    Few tokens, which CUDA scores and selects in two steps, and so many that it does both in one, with a list of
    candidates or, of short rows, with all scores."""
    if tier.interpreted and length > 300:
        pytest.skip("minutes in the interpreter")
    if tokens > 11 and tier.name != "cuda":
        pytest.skip("only CUDA has a design for many tokens")
    k, q, weights = (
        torch.zeros(length, 64),
        torch.zeros(tokens, heads, 64),
        torch.zeros(tokens, heads),
    )
    k[:, 0], q[:, -1, 0], weights[:, -1] = 1, 1, 1
    seen = torch.arange(length - tokens, length) + 1
    for scale in torch.cat([hard_rows(length), deceptive_rows(length)]):
        args = (
            q.to(torch.float8_e4m3fn).to(tier.device), weights.to(tier.device),
            k.to(torch.float8_e4m3fn).to(tier.device), scale.to(tier.device),
            int32([0, tokens], tier.device), int32([0, length], tier.device),
        )  # fmt: skip
        with tier:
            indices = select(args, topk, length)
        scores = scale.to(tier.device).expand(tokens, -1)
        assert_selects_own_scores(indices, scores, topk, seen)


def test_long_rows(tier):
    """Many times more keys than candidates are kept, random and in adversarial (ascending) order."""
    rows, length, topk = (2, 2500, 100) if tier.interpreted else (70, 30_000, 300)
    args = packed([0, rows], [0, length], 4, 64, tier.device)
    for scale in (args[3], torch.arange(length, device=tier.device).float()):
        args = (*args[:3], scale, *args[4:])
        with tier:
            indices = select(args, topk, length)
            logits = dsa_kernels.indexer_logits(*args, max_seqlen_k=length)
        assert_selects_own_scores(indices, logits, topk, visible([0, rows], [length], rows, length))


@pytest.mark.parametrize("many", [False, True])
def test_windows(tier, many, monkeypatch):
    """Rows and keys in several windows, candidates carried from one to the next; both sizes of Triton's selection."""
    if tier.name == "triton":
        for name, value in (("ROWS", 64), ("WORKSPACE_BYTES", 0), ("FEWEST_KEYS", 256)):
            monkeypatch.setattr(triton_windows, name, value)
        monkeypatch.setattr(triton_selection, "MANY_ROWS", 1 if many else 1000)
    cu_q, cu_k, topk = [0, 2, 3], [0, 1300, 1390], 40
    args = packed(cu_q, cu_k, 4, 64, tier.device)
    requests = paged([0, 1, 3], [700, 260], 11, 4, 64, tier.device)
    with tier:
        indices = select(args, topk, 1300)
        logits = dsa_kernels.indexer_logits(*args, max_seqlen_k=1300)
        paged_indices = dsa_kernels.indexer_topk_paged(*requests, topk)
        paged_logits = dsa_kernels.indexer_logits_paged(*requests)
    assert_selects_own_scores(indices, logits, topk, visible(cu_q, [1300, 90], 3, 1300))
    seen = visible([0, 1, 3], [700, 260], 3, 704)
    assert_selects_own_scores(paged_indices, paged_logits, topk, seen)


def test_short_rows_take_all_keys(tier):
    """Rows that see at most topk keys hold all of them, NaN scores included; the next row selects."""
    args = packed([0, 4, 7], [0, 30, 80], 4, 64, tier.device)
    args[3][:] = torch.nan
    args[3][79] = 1.0
    with tier:
        indices = select(args, 49, 50).tolist()
    assert indices[:5] == [[*range(n), *[-1] * (49 - n)] for n in (27, 28, 29, 30, 48)]
    assert indices[5] == [*range(49)]
    assert indices[6] == [*range(48), 49]


def test_pages_outside_the_cache_score_minus_infinity(tier):
    q, weights, cache, table, lengths, cu_q = paged([0, 1], [256], 4, 4, 64, tier.device)
    table[0, 1], table[0, 3] = -1, len(cache)
    weights.abs_()
    with tier:
        indices = dsa_kernels.indexer_topk_paged(q, weights, cache, table, lengths, cu_q, 130)
    expected = [
        *range(66),
        *range(128, 192),
    ]  # the 128 keys that exist, then the first two that do not
    assert indices[0].tolist() == expected


def test_empty(tier):
    with tier:
        assert select(packed([0, 0], [0, 5], 4, 64, tier.device), 3, 5).shape == (0, 3)
        assert (select(packed([0, 2], [0, 5], 4, 64, tier.device), 3, 0) == -1).all()
        assert (select(packed([0, 2], [0, 0], 4, 64, tier.device), 3, 9) == -1).all()
        args = packed([0, 2], [0, 5], 4, 64, tier.device)
        none = int32([0], tier.device)
        assert (select((*args[:4], none, none), 3, 5) == -1).all()
        args = paged([0, 1, 2], [0, 0], 2, 4, 64, tier.device)
        assert (dsa_kernels.indexer_topk_paged(*args, 3) == -1).all()
        args = (*args[:3], args[3][:, :0], *args[4:])
        assert (dsa_kernels.indexer_topk_paged(*args, 3) == -1).all()


def test_same_bits_whatever_the_batch(tier):
    q, weights, k, k_scale, *_ = args = packed([0, 7, 12], [0, 400, 490], 6, 64, tier.device)
    with tier:
        together = select(args, 50, 400)
        assert torch.equal(together, select(args, 50, 400))
        for t in (0, 6):
            keys = 400 - 6 + t
            cu = int32([0, 1], tier.device), int32([0, keys], tier.device)
            alone = (q[t : t + 1], weights[t : t + 1], k[:keys], k_scale[:keys], *cu)
            assert torch.equal(select(alone, 50, keys)[0], together[t])


def test_a_perturbed_row_is_noticed(tier):
    args = packed([0, 4], [0, 200], 4, 64, tier.device)
    with tier:
        before = select(args, 20, 200)
        args[1][2] *= -1
        assert (select(args, 20, 200) != before).any(1).tolist() == [False, False, True, False]


@settings(max_examples=12)
@given(st.data())
def test_property_packed(tier, data):
    """Any lengths: the sort of the own scores. Any garbage offsets: entries within bounds, ascending, then -1."""
    sizes = st.lists(st.integers(0, 5), min_size=1, max_size=3)
    queries, keys = data.draw(sizes, "queries"), data.draw(sizes, "keys")
    sequences = min(len(queries), len(keys))
    cu_q = [sum(queries[:i]) for i in range(sequences + 1)]
    cu_k = [sum(keys[:i]) for i in range(sequences + 1)]
    width, topk = data.draw(st.integers(1, 7), "width"), data.draw(st.integers(1, 4), "topk")
    args = packed(cu_q, cu_k, 2, 32, tier.device)
    with tier:
        indices = select(args, topk, width)
        logits = dsa_kernels.indexer_logits(*args, max_seqlen_k=width)
        seen = visible(cu_q, keys, cu_q[-1], width)
        assert_selects_own_scores(indices, logits, topk, seen)
        garbage = [data.draw(st.lists(EXTREME | st.integers(-2, 12), min_size=3, max_size=3)) for _ in "qk"]  # fmt: skip
        indices = select((*args[:4], *(int32(g, tier.device) for g in garbage)), topk, width)
    assert_well_formed(indices, min(width, len(args[2])))


@settings(max_examples=12)
@given(st.data())
def test_property_paged(tier, data):
    requests = data.draw(st.integers(1, 3), "requests")
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=requests, max_size=requests), "lengths")  # fmt: skip
    tokens = data.draw(st.lists(st.integers(0, 2), min_size=requests, max_size=requests), "tokens")
    cu_q = [sum(tokens[:i]) for i in range(requests + 1)]
    topk = data.draw(st.integers(1, 150), "topk")
    args = paged(cu_q, lengths, 3, 2, 32, tier.device)
    with tier:
        indices = dsa_kernels.indexer_topk_paged(*args, topk)
        logits = dsa_kernels.indexer_logits_paged(*args)
        assert_selects_own_scores(indices, logits, topk, visible(cu_q, lengths, cu_q[-1], 192))
        for argument in args[3:]:
            at = data.draw(st.integers(0, argument.numel() - 1))
            argument.view(-1)[at] = data.draw(EXTREME | st.integers(-2, 200))
        indices = dsa_kernels.indexer_topk_paged(*args, topk)
    assert_well_formed(indices, 192)


def assert_well_formed(indices, width):
    last = torch.where(indices < 0, width, indices).long()
    assert ((indices >= -1) & (indices < width)).all()
    assert ((last.diff() > 0) | (last[:, 1:] == width)).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    args = packed([0, 3, 5], [0, 20, 27], 4, 64, device)
    opcheck(torch.ops.dsa_kernels.indexer_topk.default, (*args, 8, 20))
    args = paged([0, 1, 3], [70, 20], 2, 4, 64, device)
    opcheck(torch.ops.dsa_kernels.indexer_topk_paged.default, (*args, 8))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    q, w, *rest = packed([0, 3], [0, 90], 4, 64, device)
    compiled = torch.compile(lambda w: select((q, w * 2, *rest), 9, 90) + 1, fullgraph=True)
    assert torch.equal(compiled(w), select((q, w * 2, *rest), 9, 90) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 200])
def test_cuda_graph_replay_with_other_inputs(rows):
    args = packed([0, 3, rows], [0, 30_000, 60_000], 16, 64, "cuda")
    select(args, 64, 40_000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = select(args, 64, 40_000)
    for old, new in zip(args, packed([0, 4, rows], [0, 20_000, 60_000], 16, 64, "cuda")):
        old.copy_(new)
    graph.replay()
    assert torch.equal(indices, select(args, 64, 40_000))


def many_lengths(sequences, longest, heads, dim, width):
    """Sequences most of which are short, some without queries or keys or with more of one than of the other."""
    queries = torch.randint(0, longest // 8, (sequences,))
    queries[torch.randint(0, sequences, (sequences // 4,))] = longest
    keys = (queries + torch.randint(-longest // 2, longest // 2, (sequences,)) // 2).clamp(
        0, longest
    )
    keys[0], queries[0], queries[1], keys[2] = longest, longest, 0, 0
    cu_q, cu_k = ([0, *lengths.cumsum(0).tolist()] for lengths in (queries, keys))
    return packed(cu_q, cu_k, heads, dim, "cuda"), visible(cu_q, keys.tolist(), cu_q[-1], width)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sequences, longest, heads, dim, topk, width",
    [
        (16, 9000, 16, 64, 2048, 9000), (120, 4000, 4, 128, 512, 4000), (40, 5000, 32, 64, 37, 5000),
        (24, 6000, 64, 128, 4096, 6000), (20, 7000, 16, 128, 2048, 7000), (30, 4000, 32, 128, 700, 4000),
        (8, 20_000, 16, 64, 2048, 9000), (5, 18_000, 16, 64, 2048, 18_000),
    ],
)  # fmt: skip
def test_sequences_of_many_lengths(sequences, longest, heads, dim, topk, width):
    """Many tokens. CUDA keeps the scores of those that see no more keys than there is room for in the workspace: in a
    kernel for that alone if these are all, in the last case beside the lists of others."""
    args, seen = many_lengths(sequences, longest, heads, dim, width)
    with dsa_kernels.use("cuda"):
        indices = select(args, topk, width)
        logits = dsa_kernels.indexer_logits(*args, max_seqlen_k=width)
    for rows in torch.arange(len(seen)).split(4096):
        assert_selects_own_scores(indices[rows], logits[rows], topk, seen[rows])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads, dim, tokens, length",
    [
        (16, 64, 9000, 9000), (16, 64, 5000, 20_000), (32, 128, 5000, 8000), (64, 128, 4500, 6000),
        (8, 64, 3000, 40_000), (64, 128, 600, 70_000),
    ],
)  # fmt: skip
def test_same_bits_however_called(heads, dim, tokens, length):
    """A sequence packed among others, alone, in calls of few tokens and of many, which go one step or two, and with few
    multiprocessors free."""
    cu_q, cu_k = [0, 300, 300 + tokens, 600 + tokens], [0, 3000, 3000 + length, 4000 + length]
    q, weights, k, k_scale, *_ = args = packed(cu_q, cu_k, heads, dim, "cuda")
    with dsa_kernels.use("cuda"):
        together = select(args, 2048, length)
        for held in (1, 100, 131):
            hold_multiprocessors(held)
            assert torch.equal(select(args, 2048, length), together)
        for first, last in [(0, tokens), *pairwise([0, 1, 40, tokens // 2, tokens])]:
            seen = length - tokens + last
            rows, keys = slice(300 + first, 300 + last), slice(3000, 3000 + seen)
            cu = int32([0, last - first], "cuda"), int32([0, seen], "cuda")
            part = (q[rows], weights[rows], k[keys], k_scale[keys], *cu)
            assert torch.equal(select(part, 2048, length), together[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("requests, length", [(1, 131_072), (8, 40_000), (64, 8192)])
def test_decode_with_few_multiprocessors_free(requests, length):
    cu_q, lengths = list(range(requests + 1)), [length] * requests
    args = paged(cu_q, lengths, length // 64 + 1, 16, 64, "cuda")
    with dsa_kernels.use("cuda"):
        expected = dsa_kernels.indexer_topk_paged(*args, 2048)
        for held in (1, 100, 131):
            hold_multiprocessors(held)
            assert torch.equal(dsa_kernels.indexer_topk_paged(*args, 2048), expected)


@pytest.mark.gpu
def test_cuda_graph_replay_with_other_lengths():
    """The same tokens, first as sequences of many lengths, then as a few long ones."""
    args, _ = many_lengths(24, 8000, 16, 64, 8000)
    select(args, 300, 8000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = select(args, 300, 8000)
    graph.replay()
    assert torch.equal(indices, select(args, 300, 8000))
    for cu, all_ in ((args[4], len(args[0])), (args[5], len(args[2]))):
        cu.copy_((torch.arange(25, device="cuda") * 8000).clamp(max=all_))
    graph.replay()
    assert torch.equal(indices, select(args, 300, 8000))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tokens, length", [(5000, 8192), (20_000, 9000), (300, 131_072), (70, 262_144)]
)
def test_workspace_is_bounded(tokens, length):
    args = packed([0, tokens], [0, length], 4, 64, "cuda")
    select(args, 16, length)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    indices = select(args, 16, length)
    workspace = torch.cuda.max_memory_allocated() - before - indices.nbytes
    assert workspace <= 64e6


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tokens, length", [(2048, 131_072), (64, 262_144), (1, 131_072)])
def test_model_shapes(tokens, length):
    """Chunks of rows at the model's 16 heads x 64, k = 2048, on some rows each."""
    args = packed([0, tokens], [0, length], 16, 64, "cuda")
    indices = select(args, 2048, length)
    logits = dsa_kernels.indexer_logits(*args, max_seqlen_k=length)
    rows = torch.arange(0, tokens, 67)
    seen = visible([0, tokens], [length], tokens, length)[rows]
    assert_selects_own_scores(indices[rows], logits[rows], 2048, seen)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_2_31():
    """Keys whose offset passes 2^31, packed and on the last pages of a cache."""
    keys = torch.zeros(2**25 + 1000, 64, dtype=torch.uint8, device="cuda")
    keys[-1000:] = e4m3(1000, 64, device="cuda").view(torch.uint8)
    k = keys.view(torch.float8_e4m3fn)
    q, weights, *_ = packed([0, 0, 3], [0, 1, 2], 16, 64, "cuda")
    scale = torch.ones(len(k), device="cuda")
    cu_q, cu_k = int32([0, 0, 3], "cuda"), int32([0, len(k) - 1000, len(k)], "cuda")
    indices = select((q, weights, k, scale, cu_q, cu_k), 64, 1000)
    alone = int32([0, 3], "cuda"), int32([0, 1000], "cuda")
    assert torch.equal(indices, select((q, weights, k[-1000:], scale[-1000:], *alone), 64, 1000))

    args = paged([0, 1, 2], [300, 500], 8, 16, 64, "cuda")
    expected = dsa_kernels.indexer_topk_paged(*args, 64)
    q, weights, cache, table, *rest = args
    shift = 2**31 // (64 * 68) + 10
    large = torch.zeros(shift + len(cache), 64 * 68, dtype=torch.uint8, device="cuda")
    large[shift:] = cache
    table = torch.where((table >= 0) & (table < len(cache)), table + shift, table)
    assert torch.equal(
        dsa_kernels.indexer_topk_paged(q, weights, large, table, *rest, 64), expected
    )


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    args = packed([0, 3], [0, 90], 4, 64, "cuda")
    arrays = (args[0], cupy.from_dlpack(args[1]), *args[2:])
    assert torch.equal(select(arrays, 9, 90), select(args, 9, 90))


BAD = {
    "q: expected float8_e4m3fn": lambda a: {"q": a["q"].float()},
    "weights: expected shape": lambda a: {"weights": a["weights"][:2]},
    "k: expected shape": lambda a: {"k": a["k"][0]},
    "k_scale: expected float32": lambda a: {"k_scale": a["k_scale"].double()},
    "cu_seqlens_q: expected int32": lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()},
    "cu_seqlens_k: expected a contiguous": lambda a: {"cu_seqlens_k": a["cu_seqlens_k"].expand(4, 2)[::2, 0]},
    "topk: expected an integer >= 1, got 0": lambda a: {"topk": 0},
    "max_seqlen_k: expected an integer >= 0": lambda a: {"max_seqlen_k": -5},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", [*BAD, "indexer_topk_paged: topk: expected an integer >= 1"])
def test_bad_input(message, mode):
    def call_bad():
        device = "cpu" if mode == "fake" else mode
        names = ["q", "weights", "k", "k_scale", "cu_seqlens_q", "cu_seqlens_k"]
        args = dict(zip(names, packed([0, 4], [0, 9], 4, 64, device)), topk=2, max_seqlen_k=9)
        if message in BAD:
            return dsa_kernels.indexer_topk(**{**args, **BAD[message](args)})
        cache = torch.zeros(3, 64 * 68, dtype=torch.uint8, device=device)
        table = torch.zeros(1, 3, dtype=torch.int32, device=device)
        length = torch.zeros(1, dtype=torch.int32, device=device)
        cu_q = args["cu_seqlens_q"]
        return dsa_kernels.indexer_topk_paged(args["q"], args["weights"], cache, table, length, cu_q, 0)  # fmt: skip

    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with torch._subclasses.FakeTensorMode():
                call_bad()
        else:
            call_bad()


def test_paged_reference_equals_packed_reference():
    q, weights, cache, table, lengths, cu_q = paged([0, 2], [150], 3, 4, 64, "cpu")
    pages = cache[table[0].long()]
    k = pages[:, : 64 * 64].reshape(-1, 64)[:150].contiguous().view(torch.float8_e4m3fn)
    k_scale = pages[:, 64 * 64 :].contiguous().view(torch.float32).flatten()[:150].contiguous()
    a = reference_paged(q, weights, cache, table, lengths, cu_q, 40)
    assert torch.equal(a, reference(q, weights, k, k_scale, cu_q, int32([0, 150], "cpu"), 40, 150))
