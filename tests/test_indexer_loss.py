import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import dsa_kernels
from dsa_kernels import AttentionTarget
from dsa_kernels.indexer_loss.reference import indexer_loss as reference
from dsa_kernels.indexer_loss.reference import indexer_loss_bwd as reference_bwd

OP = "indexer_loss"
ULP = torch.finfo(torch.float32).eps
SCALE = 0.11


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def random_selection(q_lengths, k_lengths, topk):
    """Random causal keys, ascending, -1 in the tail. [T, K]"""
    rows = []
    for q_length, k_length in zip(q_lengths, k_lengths):
        for u in range(q_length):
            seen = max(0, k_length - q_length + u + 1)
            chosen = torch.randperm(seen)[:topk].sort().values
            rows.append(F.pad(chosen, (0, topk - len(chosen)), value=-1))
    return torch.stack(rows).int() if rows else torch.empty(0, topk, dtype=torch.int32)


def make(q_lengths, k_lengths, *, dtype=torch.float32, topk=None, heads=4, groups=2, dim=64, index_heads=3,
         index_dim=64, device="cpu"):  # fmt: skip
    """The op's flat arguments without the last. Indexer queries and keys are small multiples of 1/4: their products
    are exact in every precision, so that all implementations agree on which relu is active."""
    num_tokens, num_keys = sum(q_lengths), sum(k_lengths)
    indices = None if topk is None else random_selection(q_lengths, k_lengths, topk).to(device)
    return [
        (torch.randn(num_tokens, index_heads, index_dim) * 2).round().div(4).to(device, dtype),
        (torch.randn(num_keys, index_dim) * 2).round().div(4).to(device, dtype),
        torch.randn(num_tokens, index_heads).to(device),
        torch.randn(num_tokens, heads, dim).to(device, dtype),
        torch.randn(num_keys, groups, dim).to(device, dtype),
        (torch.randn(num_tokens, heads) + 4).to(device),
        indices,
        offsets(q_lengths, device),
        offsets(k_lengths, device),
        SCALE,
    ]


def public(args, **kwargs):
    index_q, index_k, weights, q, k, lse, indices, cu_q, cu_k, scale = args
    target = AttentionTarget(q, k, lse, scale)
    return dsa_kernels.indexer_loss(
        index_q, index_k, weights, target, cu_q, cu_k, indices=indices, **kwargs
    )


def double(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]  # fmt: skip


def loss_and_gradients(function, args, dloss):
    """loss and the gradients of its first three arguments."""
    leaves = [x.detach().clone().requires_grad_() for x in args[:3]]
    loss = function([*leaves, *args[3:]])
    if not loss.requires_grad:  # the reference of rows without a key
        return loss, *map(torch.zeros_like, leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))


def assert_rows(name, ours, same_precision, exact, floor):
    """Per row: our error against float64 is at most twice that of PyTorch at the same precision, plus `floor`."""
    ours, same_precision, exact = (x.double().flatten(1) if x.dim() > 1 else x.double()[:, None] for x in (ours, same_precision, exact))  # fmt: skip
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    error = (ours - exact).norm(dim=1)
    allowed = 2 * (same_precision - exact).norm(dim=1) + floor
    worst = (error - allowed).argmax() if len(error) else 0
    assert (error <= allowed).all(), f"{name}: row {worst}: error {error[worst]}, allowed {allowed[worst]}"  # fmt: skip


def assert_matches_reference(tier, args, deterministic=False):
    dloss = torch.randn(args[0].shape[0], device=tier.device)
    with tier:
        ours = loss_and_gradients(lambda a: public(a, deterministic=deterministic), args, dloss)
    assert_loss_and_gradients(ours, args, dloss)


def assert_loss_and_gradients(ours, args, dloss):
    exact_args = double(args)
    exact = loss_and_gradients(lambda a: reference(*a, False)[0], exact_args, dloss)
    _, exact_lse, exact_mass = reference(*exact_args, False)
    loss, index_lse, mass = reference(*args, False)
    gradients = reference_bwd(dloss, *args[:6], index_lse, mass, *args[6:], False)

    # The floor: exp(x) is known to |x| ulp, and every result is a difference: loss = sum p (log p - I) + mass lse_I,
    # dI = mass softmax(I) - P. The two parts of a gradient follow from its linearity in mass.
    exact_lse = exact_lse.nan_to_num(neginf=0)
    exponents = torch.cat([exact_lse, args[5].double().flatten()]).abs()
    ulps = ULP * (4 + exponents.max() if len(exponents) else 4)
    assert_rows("loss", ours[0], loss, exact[0], ulps * (exact[0].abs() + 2 * (exact_mass * exact_lse).abs()))  # fmt: skip
    twice = reference_bwd(dloss.double(), *exact_args[:6], exact_lse, 2 * exact_mass, *args[6:], False)  # fmt: skip
    for i, name in enumerate(("d index_q", "d index_k", "d index_weights"), start=1):
        parts = [twice[i - 1] - exact[i], 2 * exact[i] - twice[i - 1]]
        floor = ulps * sum(x.flatten(1).norm(dim=1) for x in parts) if len(exact[i]) else 0
        assert_rows(name, ours[i], gradients[i - 1], exact[i], floor)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("topk", [None, 11], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(tier, dtype, topk, deterministic):
    """Several sequences: one token, no queries, fewer keys than queries, prefix before the queries."""
    k_lengths = [1, 4, 2, 20 if tier.interpreted and topk else 150]
    q_lengths = [1, 0, 4, 5 if tier.interpreted else 35]
    args = make(q_lengths, k_lengths, dtype=dtype, topk=topk, device=tier.device)
    assert_matches_reference(tier, args, deterministic)


@pytest.mark.parametrize("topk", [None, 70], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 6, "groups": 1, "dim": 128, "index_heads": 1, "index_dim": 128},
        {"heads": 8, "groups": 4, "dim": 128, "index_heads": 16, "index_dim": 64},
        {"heads": 2, "groups": 2, "dim": 64, "index_heads": 5, "index_dim": 128},
    ],
    ids=["6/1x128,1x128", "8/4x128,16x64", "2/2x64,5x128"],
)
def test_head_counts_and_dims(tier, sizes, topk):
    q_lengths = [1, 3] if tier.interpreted else [5, 12]
    args = make(q_lengths, [90, 12], dtype=torch.bfloat16, topk=topk, device=tier.device, **sizes)
    assert_matches_reference(tier, args)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_equals_torch_kl_div(tier, form):
    """Softmax targets built head by head, F.kl_div against F.log_softmax: the definition in other words."""
    tokens, keys, topk, heads, groups = 12, 20, 6, 4, 2
    args = make([tokens], [keys], topk=topk if form == "sparse" else None, device=tier.device)
    index_q, index_k, weights, q, k, _, indices, *_ = double(args)
    visible = torch.ones(tokens, keys, dtype=torch.bool, device=tier.device).tril(keys - tokens)
    if indices is not None:
        visible = torch.zeros_like(visible).scatter(1, indices.long(), True)
    s = torch.einsum("thd,khd->htk", q, k.repeat_interleave(heads // groups, 1)) * SCALE
    s = s.masked_fill(~visible, -torch.inf)
    p = s.softmax(-1).unflatten(0, (groups, -1)).mean(1)  # [G, T, L]
    args[5] = s.logsumexp(-1).T.float().contiguous()
    scores = torch.einsum(
        "th,thk->tk", weights, torch.einsum("thd,kd->thk", index_q, index_k).relu()
    )
    log_softmax = F.log_softmax(scores.masked_fill(~visible, -torch.inf), -1)
    expected = F.kl_div(
        log_softmax.expand(groups, -1, -1)[:, visible], p[:, visible], reduction="none"
    )
    rows = visible.nonzero()[:, 0].expand(groups, -1)
    expected = torch.zeros(tokens, dtype=torch.float64, device=tier.device).index_add(0, rows.flatten(), expected.flatten())  # fmt: skip
    with tier:
        loss = public(args)
    # lse in float32 moves log p by half an ulp of it, p by as much.
    magnitude = groups * (2 * scores.abs().amax(1) + s.logsumexp(-1).abs().amax(0) + 1)
    assert ((loss - expected).abs() <= 8 * ULP * magnitude).all()


def test_a_wrong_row_is_noticed(tier):
    args = make([1, 6], [1, 16], topk=9, device=tier.device)
    dloss = torch.randn(7, device=tier.device)
    with tier:
        ours = loss_and_gradients(public, args, dloss)
        broken = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        broken[6][5, 4] = -1  # one of the nine keys of one token
        wrong = loss_and_gradients(public, broken, dloss)
    assert_loss_and_gradients(ours, args, dloss)
    for i in range(4):
        mixed = [*ours[:i], wrong[i], *ours[i + 1 :]]
        with pytest.raises(AssertionError):
            assert_loss_and_gradients(mixed, args, dloss)
    assert (ours[0] != wrong[0]).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("topk", [None, 4], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "q_lengths, k_lengths", [([], []), ([0], [0]), ([0], [5]), ([5], [0]), ([3, 0], [0, 2])]
)
def test_empty(tier, q_lengths, k_lengths, topk):
    args = make(q_lengths, k_lengths, topk=topk, device=tier.device)
    dloss = torch.ones(args[0].shape[0], device=tier.device)
    with tier:
        results = loss_and_gradients(public, args, dloss)
    for result, like in zip(results, (dloss, *args[:3])):
        assert torch.equal(result, torch.zeros_like(like))


def test_no_selected_keys(tier):
    args = make([6], [6], topk=0, device=tier.device)
    with tier:
        results = loss_and_gradients(public, args, torch.ones(6, device=tier.device))
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize("topk", [None, 5], ids=["dense", "sparse"])
def test_rows_of_no_sequence_may_hold_anything(tier, topk):
    args = make([3, 8, 4], [7, 11, 9], topk=topk, device=tier.device)
    inner = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    for x in (inner[0], inner[2], inner[3], inner[5]):  # token rows
        x[:3], x[11:] = torch.nan, torch.inf
    for x in (inner[1], inner[4]):  # key rows
        x[:7], x[18:] = torch.inf, torch.nan
    inner[7] = torch.tensor([3, 11], dtype=torch.int32, device=tier.device)
    inner[8] = torch.tensor([7, 18], dtype=torch.int32, device=tier.device)
    dloss = torch.randn(15, device=tier.device)
    with tier:
        everything = loss_and_gradients(lambda a: public(a, deterministic=True), args, dloss)
        alone = loss_and_gradients(lambda a: public(a, deterministic=True), inner, dloss)
    for part, whole, rows in zip(alone, everything, [(3, 11), (3, 11), (7, 18), (3, 11)]):
        outside = torch.ones(part.shape[0], dtype=torch.bool)
        outside[slice(*rows)] = False
        assert torch.equal(part[slice(*rows)], whole[slice(*rows)])
        assert (part[outside] == 0).all()


@pytest.mark.parametrize("topk", [None, 5], ids=["dense", "sparse"])
def test_strided_rows(tier, topk):
    args = make([9], [9], topk=topk, device=tier.device)
    strided = list(args)
    for i in (0, 3, 4):  # [T, H, D] stored as [H, T, D]
        strided[i] = args[i].transpose(0, 1).contiguous().transpose(0, 1)
    for i in (1, 2, 5):  # rows of a wider tensor
        strided[i] = F.pad(args[i], (3, 4))[:, 3:-4]
    if topk:
        strided[6] = F.pad(args[6], (1, 1))[:, 1:-1]
    dloss = torch.randn(9, device=tier.device)
    with tier:
        expected = loss_and_gradients(lambda a: public(a, deterministic=True), args, dloss)
        leaves = [x.requires_grad_() for x in strided[:3]]
        loss = public(strided, deterministic=True)
        gradients = torch.autograd.grad(loss, leaves, dloss)
    for result, like in zip((loss, *gradients), expected):
        assert torch.equal(result, like)


def test_duplicates_count_once_and_garbage_not_at_all(tier):
    args = make([2], [10], topk=8, device=tier.device)
    clean = torch.tensor([[1, 4, 7, 9, -1, -1, -1, -1]] * 2, dtype=torch.int32, device=tier.device)
    dirty = torch.tensor([[1, 4, 4, 7, 9, -1, 10, 2**31 - 1], [-(2**31), 1, 1, 4, 7, 9, 9, 9]],
                         dtype=torch.int32, device=tier.device)  # fmt: skip
    with tier:
        args[6] = clean
        expected = loss_and_gradients(public, args, torch.ones(2, device=tier.device))
        args[6] = dirty
        results = loss_and_gradients(public, args, torch.ones(2, device=tier.device))
    for result, like in zip(results, expected):
        torch.testing.assert_close(result, like, rtol=0, atol=16 * ULP * float(like.abs().max()))


@given(st.data())
def test_property(tier, data):
    """Any cu_seqlens and any indices, garbage included, mean what the reference says."""
    sequences = data.draw(st.integers(0, 3), "sequences")
    num_tokens = data.draw(st.integers(0, 3 if tier.interpreted else 12), "tokens")
    num_keys = data.draw(st.integers(0, 6 if tier.interpreted else 40), "keys")
    topk = data.draw(st.none() | st.integers(0, 6), "topk")
    extreme = st.integers(-(2**31), 2**31 - 1)

    def draw(size, high, name):
        values = data.draw(st.lists(st.integers(-2, high + 2) | extreme, min_size=size, max_size=size), name)  # fmt: skip
        return torch.tensor(values, dtype=torch.int32, device=tier.device)

    args = make([num_tokens], [num_keys], heads=2, index_heads=2, device=tier.device)
    if topk is not None:
        args[6] = draw(num_tokens * topk, num_keys, "indices").view(num_tokens, topk)
    args[7] = draw(sequences + 1, num_tokens, "cu_seqlens_q")
    args[8] = draw(sequences + 1, num_keys, "cu_seqlens_k")
    if data.draw(st.booleans(), "ordered"):
        args[7], args[8] = args[7].sort().values, args[8].sort().values
    assert_matches_reference(tier, args, data.draw(st.booleans(), "deterministic"))


@pytest.mark.parametrize("topk", [None, 9], ids=["dense", "sparse"])
def test_same_bits_on_every_run(tier, topk):
    q_lengths, k_lengths = ([3, 2], [5, 2]) if tier.interpreted else ([90, 70], [90, 99])
    args = make(q_lengths, k_lengths, dtype=torch.bfloat16, topk=topk, device=tier.device)
    dloss = torch.randn(sum(q_lengths), device=tier.device)
    threads = torch.get_num_threads()
    runs = []
    with tier:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            runs.append(loss_and_gradients(lambda a: public(a, deterministic=True), args, dloss))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_the_target_is_a_constant():
    args = make([5], [5])
    for i in range(6):
        args[i].requires_grad_()
    gradients = torch.autograd.grad(public(args).sum(), args[:6], allow_unused=True)
    assert [g is None for g in gradients] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("topk", [None, 3], ids=["dense", "sparse"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device, topk):
    args = make([2, 5], [2, 7], topk=topk, device=device)
    for x in args[:3]:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.dsa_kernels.indexer_loss.default, (*args, True))
    with torch.no_grad():
        _, index_lse, mass = torch.ops.dsa_kernels.indexer_loss(*args, True)
    bwd = (torch.randn(7, device=device), *args[:6], index_lse, mass, *args[6:], True)
    bwd = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in bwd)
    torch.library.opcheck(torch.ops.dsa_kernels.indexer_loss_bwd.default, bwd)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_a_graph_break(device):
    args = make([6], [6], topk=4, device=device)
    dloss = torch.randn(6, device=device)

    def function(*args):
        return public([args[0] * 2, *args[1:]], deterministic=True) + 1

    compiled = torch.compile(function, fullgraph=True)
    results = loss_and_gradients(lambda a: compiled(*a), args, dloss)
    expected = loss_and_gradients(lambda a: function(*a), args, dloss)
    for result, like in zip(results, expected):
        torch.testing.assert_close(result, like, rtol=2 * ULP, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [None, 64], ids=["dense", "sparse"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_graph_replay_with_other_inputs(topk, deterministic):
    first, second = (
        make(q, [500, 300], dtype=torch.bfloat16, topk=topk, device="cuda")
        for q in ([200, 300], [450, 50])
    )
    dloss = torch.randn(500, device="cuda")
    op, bwd = torch.ops.dsa_kernels.indexer_loss, torch.ops.dsa_kernels.indexer_loss_bwd

    def step(args):
        loss, index_lse, mass = op(*args, deterministic)
        return loss, *bwd(dloss, *args[:6], index_lse, mass, *args[6:], deterministic)

    with dsa_kernels.use("triton"):
        step(first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(first)
    for x, y in zip(first, second):
        if isinstance(x, torch.Tensor):
            x.copy_(y)
    graph.replay()
    assert_loss_and_gradients(results, second, dloss)


@pytest.mark.gpu
def test_model_shape_on_the_gpu():
    sizes = {"heads": 32, "groups": 4, "dim": 128, "index_heads": 16, "index_dim": 64}
    tier_args = {"dtype": torch.bfloat16, "device": "cuda", **sizes}
    for topk in (None, 256):
        args = make([130, 700], [130, 1000], topk=topk, **tier_args)
        dloss = torch.randn(830, device="cuda")
        for deterministic in (False, True):
            with dsa_kernels.use("triton"):
                ours = loss_and_gradients(lambda a, d=deterministic: public(a, deterministic=d), args, dloss)  # fmt: skip
            assert_loss_and_gradients(ours, args, dloss)


@pytest.mark.gpu
@pytest.mark.slow
def test_memory_grows_with_the_tokens_alone():
    """16384 x 16384: one matrix of a byte a pair would be 268 MB."""
    args = make([16384], [16384], dtype=torch.bfloat16, index_heads=16, device="cuda")
    for x in args[:3]:
        x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    public(args).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 200e6


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("topk", [None, 40], ids=["dense", "sparse"])
def test_offsets_past_2_31(topk):
    """Query rows 2^28 elements apart, key rows 2^27: the last ones lie past 2^31."""
    args = make([16], [40], dtype=torch.bfloat16, topk=topk, device="cuda")
    far = list(args)
    far[3] = torch.empty(15 * 2**28 + 4096, dtype=torch.bfloat16, device="cuda").as_strided((16, 4, 64), (2**28, 64, 1))  # fmt: skip
    far[3].copy_(args[3])
    far[4] = torch.empty(39 * 2**27 + 4096, dtype=torch.bfloat16, device="cuda").as_strided((40, 2, 64), (2**27, 64, 1))  # fmt: skip
    far[4].copy_(args[4])
    dloss = torch.randn(16, device="cuda")
    with dsa_kernels.use("triton"):
        near_results = loss_and_gradients(lambda a: public(a, deterministic=True), args, dloss)
        far_results = loss_and_gradients(lambda a: public(a, deterministic=True), far, dloss)
    assert all(torch.equal(a, b) for a, b in zip(near_results, far_results))


@pytest.mark.gpu
def test_cupy():
    cupy = pytest.importorskip("cupy")
    args = make([5], [9], topk=3, device="cuda")
    arrays = [cupy.from_dlpack(x) if isinstance(x, torch.Tensor) else x for x in args]
    assert torch.equal(public(arrays), public(args))


def test_numpy():
    args = make([5], [9], topk=3)
    arrays = [x.numpy() if isinstance(x, torch.Tensor) else x for x in args]
    assert torch.equal(public(arrays), public(args))


def replaced(**changes):
    names = [
        "index_q",
        "index_k",
        "index_weights",
        "q",
        "k",
        "lse",
        "indices",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "scale",
    ]

    def call(args):
        for name, change in changes.items():
            args[names.index(name)] = change(args[names.index(name)])
        return public(args)

    return call


BAD = {
    "index_q: expected float32 or bfloat16, got float64": replaced(index_q=lambda x: x.double()),
    "index_q: expected shape": replaced(index_q=lambda x: x[0]),
    "index_q: expected Di = 64 or 128": replaced(index_q=lambda x: x[..., :32]),
    "index_q: expected the last dimension contiguous": replaced(index_q=lambda x: x.repeat(1, 1, 2)[..., ::2]),
    "index_k: expected float32, got bfloat16": replaced(index_k=lambda x: x.bfloat16()),
    "index_k: expected shape": replaced(index_k=lambda x: x[:, :32]),
    "index_weights: expected float32": replaced(index_weights=lambda x: x.bfloat16()),
    "index_weights: expected shape": replaced(index_weights=lambda x: x[1:]),
    "q: expected D = 64 or 128": replaced(q=lambda x: x[..., :16]),
    "q: expected shape": replaced(q=lambda x: x[1:]),
    "k: expected shape": replaced(k=lambda x: x[1:]),
    "k: expected a number of heads that divides q's 4, got 3": replaced(k=lambda x: x[:, :1].repeat(1, 3, 1)),
    "lse: expected shape": replaced(lse=lambda x: x[:, 1:]),
    "lse: expected a torch.Tensor": replaced(lse=lambda x: None),
    "indices: expected int32, got int64": replaced(indices=lambda x: x.long()),
    "indices: expected shape": replaced(indices=lambda x: x[1:]),
    "cu_seqlens_q: expected int32": replaced(cu_seqlens_q=lambda x: x.long()),
    "cu_seqlens_k: expected shape": replaced(cu_seqlens_k=lambda x: x[1:]),
    "cu_seqlens_q: expected S . 1 >= 1 entries": replaced(cu_seqlens_q=lambda x: x[:0]),
    "softmax_scale: expected a finite positive number, got nan": replaced(scale=lambda x: float("nan")),
    "deterministic: expected a bool, got 'no'": lambda args: public(args, deterministic="no"),
    "target: expected an AttentionTarget, got tuple": lambda args: dsa_kernels.indexer_loss(*args[:3], tuple(args[3:6]), *args[7:9]),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, mode):
    def call():
        device = "cpu" if mode == "fake" else mode
        args = make([3, 4], [5, 6], topk=2, device=device)
        if mode == "fake":
            args = [fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        return BAD[message](args)

    fake = torch._subclasses.FakeTensorMode()
    with pytest.raises(ValueError, match=message):
        if mode == "fake":
            with fake:
                call()
        else:
            call()
