"""Benchmark cases of norm_rope and its gradient: the decoder's heads with norm, the ViT's without."""

from __future__ import annotations

import torch

import dsa_kernels
from dsa_kernels.norm_rope.reference import norm_rope as reference
from dsa_kernels.norm_rope.reference import norm_rope_bwd as reference_bwd

from .case import Case, Unavailable

EPS = 1e-6


def hugging_face(q, k, q_weight, k_weight, cos, sin):
    """Qwen3Attention: F.rms_norm, then x * cos + rotate_half(x) * sin with repeated tables, all in bfloat16."""
    cos, sin = (torch.cat((t, t), -1)[:, None].to(q.dtype) for t in (cos, sin))

    def one(x, weight):
        if weight is not None:
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat((-x2, x1), -1) * sin

    return one(q, q_weight), one(k, k_weight)


def liger(q, k, q_weight, k_weight, cos, sin):
    """Liger has the rotation alone, over [B, H, T, D]; the norm is F.rms_norm."""
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError as error:
        raise Unavailable("liger-kernel is not installed") from error
    if q.device.type != "cuda":
        raise Unavailable("Liger needs a GPU")
    if q_weight is not None:
        q = torch.nn.functional.rms_norm(q, q.shape[-1:], q_weight, EPS)
        k = torch.nn.functional.rms_norm(k, k.shape[-1:], k_weight, EPS)
    cos, sin = (torch.cat((t, t), -1)[None].to(q.dtype) for t in (cos, sin))
    return LigerRopeFunction.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)


def make_inputs(tokens: int, heads: int, kv_heads: int, dim: int, norm: bool, device: torch.device):
    """q and k are views of one fused projection, as in the model."""
    projection = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).bfloat16()
    q, k, _ = projection.split([heads, kv_heads, kv_heads], dim=1)
    weights = [torch.rand(dim, device=device).bfloat16() if norm else None for _ in range(2)]
    angle = 100 * torch.rand(tokens, dim // 2, device=device)
    return q, k, *weights, angle.cos(), angle.sin()


def verify_forward(outputs, inputs):
    for actual, expected in zip(outputs, reference(*inputs, EPS)):
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-5)


def verify_backward(grads, inputs):
    for actual, expected in zip(grads, reference_bwd(*inputs, EPS, True)):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=1e-3)


def case(shape: tuple[str, int, int, int, bool], tokens: int, device: torch.device, quick: bool) -> Case:  # fmt: skip
    name, *sizes = shape
    heads, kv_heads, dim, _ = sizes
    return Case(
        name=f"{name} T={tokens}, {heads}/{kv_heads} x {dim}",
        inputs=lambda: make_inputs(tokens, *sizes, device),
        ours=dsa_kernels.norm_rope,
        verify=verify_forward,
        peers={
            "eager": lambda *inputs: reference(*inputs, EPS),
            "Hugging Face": hugging_face,
            "torch.compile": torch.compile(hugging_face, dynamic=False),
            "Liger": liger,
        },
        bytes=tokens * dim * (4.0 * (heads + kv_heads) + 4),
        quick=quick,
        context=tokens,
        series=name,
    )


def backward_case(shape: tuple[str, int, int, int, bool], tokens: int, device: torch.device, quick: bool) -> Case:  # fmt: skip
    name, *sizes = shape
    heads, kv_heads, dim, norm = sizes

    def inputs():
        q, k, *rest = make_inputs(tokens, *sizes, device)
        return torch.randn_like(q).contiguous(), torch.randn_like(k).contiguous(), q, k, *rest

    return Case(
        name=f"{name} backward T={tokens}",
        inputs=inputs,
        ours=lambda *args: torch.ops.dsa_kernels.norm_rope_bwd(*args, EPS, True),
        verify=verify_backward,
        peers={
            "eager": lambda *args: reference_bwd(*args, EPS, True),
            "torch.compile": torch.compile(
                lambda *args: reference_bwd(*args, EPS, True), dynamic=False
            ),
        },
        bytes=tokens * dim * ((6.0 if norm else 4.0) * (heads + kv_heads) + 4),
        quick=quick,
        context=tokens,
        series=f"{name} backward",
    )


DECODER = ("decoder", 32, 4, 128, True)
INDEXER_LIKE = ("16 heads of 64", 16, 1, 64, True)
VIT = ("ViT", 16, 16, 72, False)


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [make(shape, 2048, device, True) for make in (case, backward_case) for shape in (DECODER, VIT)]  # fmt: skip
    tokens = {DECODER: (1, 64, 8192, 131072), INDEXER_LIKE: (8192,), VIT: (8192, 65536)}
    return [
        make(shape, t, device, quick=t == 8192)
        for make in (case, backward_case)
        for shape, counts in tokens.items()
        for t in counts
    ]
