"""Benchmark cases of indexer_loss: the warm-up's dense form, the sparse stage's selected form, and their gradients."""

from __future__ import annotations

import torch

import dsa_kernels
from dsa_kernels.indexer_loss.reference import indexer_loss as reference
from dsa_kernels.indexer_loss.reference import indexer_loss_bwd as reference_bwd

from .case import Case, Unavailable

HEADS, GROUPS, DIM, INDEX_HEADS, INDEX_DIM = 32, 4, 128, 16, 64
SCALE = DIM**-0.5
EAGER_PAIRS = 2**31  # (token, head, key) triples beyond which the eager peer's blocks take minutes


def make(tokens: int, topk: int | None, device: torch.device, deterministic: bool):
    """The op's flat arguments: one causal sequence; random selections, the worst case for gathers."""
    index_q = torch.randn(tokens, INDEX_HEADS, INDEX_DIM, device=device).bfloat16()
    index_k = torch.randn(tokens, INDEX_DIM, device=device).bfloat16()
    weights = torch.randn(tokens, INDEX_HEADS, device=device) / INDEX_DIM**0.5
    q = torch.randn(tokens, HEADS, DIM, device=device).bfloat16()
    k = torch.randn(tokens, GROUPS, DIM, device=device).bfloat16()
    # q . k of random heads is normal: the sum of exp(scale q . k) over n keys is about n sqrt(e).
    seen = torch.arange(1, tokens + 1, device=device)
    seen = seen if topk is None else seen.clamp(max=topk)
    lse = (seen.float().log() + 0.5)[:, None].repeat(1, HEADS)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    indices = None if topk is None else random_indices(tokens, topk, device)
    return (
        index_q,
        index_k,
        weights,
        q,
        k,
        lse,
        indices,
        cu_seqlens,
        cu_seqlens,
        SCALE,
        deterministic,
    )


def random_indices(tokens: int, topk: int, device: torch.device) -> torch.Tensor:
    """[T, K]: K random causal keys of each token, ascending, -1 in the tail."""
    rows = []
    for begin in range(0, tokens, 1024):
        t = torch.arange(begin, min(begin + 1024, tokens), device=device)
        order = torch.rand(len(t), tokens, device=device)
        order.masked_fill_(torch.arange(tokens, device=device) > t[:, None], -1)
        values, chosen = order.topk(min(topk, tokens), dim=1)
        chosen = chosen.masked_fill(values < 0, tokens).sort(1).values
        rows.append(torch.where(chosen == tokens, -1, chosen).int())
    return torch.cat(rows)


def make_bwd(tokens: int, topk: int | None, device: torch.device, deterministic: bool):
    args = make(tokens, topk, device, deterministic)
    _, index_lse, mass = torch.ops.dsa_kernels.indexer_loss(*args)
    return (torch.randn(tokens, device=device), *args[:6], index_lse, mass, *args[6:])


def ours(*args):
    index_q, index_k, weights, q, k, lse, indices, cu_q, cu_k, scale, deterministic = args
    target = dsa_kernels.AttentionTarget(q, k, lse, scale)
    return dsa_kernels.indexer_loss(
        index_q, index_k, weights, target, cu_q, cu_k, indices=indices, deterministic=deterministic
    )


def ours_bwd(*args):
    return torch.ops.dsa_kernels.indexer_loss_bwd(*args)


def few_enough(function):
    """The eager peer builds [block, heads, keys] in memory; past some size it only burns the benchmark's time."""

    def peer(*args):
        indices, q = args[-5], args[-8]
        keys = q.shape[0] if indices is None else indices.shape[1]
        if q.shape[0] * q.shape[1] * keys > EAGER_PAIRS * (1 if q.is_cpu else 32):
            raise Unavailable("the eager form is too slow at this size")
        return function(*args)

    return peer


def verify(loss, inputs):
    """The first tokens see no key beyond their own rows."""
    rows = min(256, inputs[0].shape[0])
    sample = [x[:rows] if isinstance(x, torch.Tensor) else x for x in inputs]
    sample[7] = sample[8] = torch.tensor([0, rows], dtype=torch.int32, device=loss.device)
    expected = reference(*sample)[0]
    torch.testing.assert_close(loss[:rows], expected, rtol=1e-4, atol=1e-4)


def verify_bwd(gradients, inputs):
    """d index_q and d weights of the first tokens."""
    rows = min(256, inputs[1].shape[0])
    sample = [x[:rows] if isinstance(x, torch.Tensor) else x for x in inputs]
    sample[10] = sample[11] = torch.tensor([0, rows], dtype=torch.int32, device=inputs[0].device)
    expected = reference_bwd(*sample)
    for i in (0, 2):
        error = (gradients[i][:rows].float() - expected[i].float()).norm()
        assert error <= 1e-2 * expected[i].float().norm()
    assert torch.isfinite(gradients[1]).all()


def cases_of(tokens: int, topk: int | None, device: torch.device, quick: bool) -> list[Case]:
    pairs = tokens * (tokens + 1) / 2
    if topk is not None and topk < tokens:
        pairs = topk * (topk + 1) / 2 + (tokens - topk) * topk
    form = "dense" if topk is None else f"k={topk}"
    attention, index = HEADS * DIM, INDEX_HEADS * INDEX_DIM
    inputs = tokens * 2 * (attention + index + (GROUPS * DIM + INDEX_DIM)) + 4 * tokens * (HEADS + INDEX_HEADS)  # fmt: skip
    inputs += 0 if topk is None else 4 * tokens * topk
    gradients = tokens * (2 * (index + INDEX_DIM) + 4 * INDEX_HEADS)
    forward = Case(
        name=f"{tokens} {form}",
        inputs=lambda: make(tokens, topk, device, False),
        ours=ours,
        verify=verify,
        peers={
            "eager": few_enough(lambda *a: reference(*a)[0]),
            "torch.compile": few_enough(lambda *a: torch.compile(reference)(*a)[0]),
        },
        flops=2 * pairs * (attention + index),
        bytes=inputs + 4 * tokens,
        quick=quick,
        context=tokens,
        series=f"{form.split('=')[0]} forward",
    )
    backward = [
        Case(
            name=f"{tokens} {form} backward" + (" deterministic" if deterministic else ""),
            inputs=lambda d=deterministic: make_bwd(tokens, topk, device, d),
            ours=ours_bwd,
            verify=verify_bwd,
            peers={
                "eager": few_enough(reference_bwd),
                "torch.compile": few_enough(lambda *a: torch.compile(reference_bwd)(*a)),
            },
            flops=2 * pairs * (attention + 3 * index),
            bytes=inputs + gradients + 4 * tokens,
            quick=quick and not deterministic,
            context=tokens,
            series=f"{form.split('=')[0]} backward" + (" deterministic" if deterministic else ""),
        )
        for deterministic in ([False] if device.type == "cpu" else [False, True])
    ]
    return [forward, *backward]


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        shapes = [(512, None, True), (1024, None, True), (1024, 256, True), (2048, 256, True)]
    else:
        shapes = [(2048, None, True), (8192, None, True), (8192, 2048, False), (32768, 2048, True)]
    return [case for shape in shapes for case in cases_of(*shape[:2], device, shape[2])]
