"""Benchmark cases of varlen_attention."""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import dsa_kernels
from dsa_kernels.varlen_attention.reference import varlen_attention as reference

from .case import Case, Unavailable


def inputs(sequences, length, heads, kv_heads, dim, device, backward):
    tokens = sequences * length
    q, k, v = (
        torch.randn(tokens, n, dim, device=device, dtype=torch.bfloat16, requires_grad=backward)
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)


def ours(q, k, v, cu, *, causal, length):
    return dsa_kernels.varlen_attention(q, k, v, cu, cu, causal=causal)[0]


def eager(q, k, v, cu, *, causal, length):
    return reference(q, k, v, cu, cu, causal, q.shape[-1] ** -0.5, False)[0]


def sdpa(q, k, v, cu, *, causal, length, backend):
    """The same sequences as a padded batch, which equal lengths fill without waste."""
    batch = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    try:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*batch, is_causal=causal, enable_gqa=True)
    except RuntimeError as error:
        raise Unavailable(f"SDPA {backend.name} does not serve this call") from error
    return out.transpose(1, 2).reshape(q.shape)


def torch_varlen(q, k, v, cu, *, causal, length):
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable("this torch has no varlen_attn") from error
    if not q.is_cuda:
        raise Unavailable("varlen_attn serves CUDA tensors")
    options = {"window_size": (-1, 0) if causal else (-1, -1)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, cu, cu, length, length, **options)


def flash_attn(q, k, v, cu, *, causal, length):
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable("flash-attn is not installed") from error
    return flash_attn_varlen_func(q, k, v, cu, cu, length, length, causal=causal)


def step(function, backward, *args):
    """One timed call: the forward, and with `backward` the gradients of q, k and v too."""
    out = function(*args)
    if not backward:
        return out
    return (out, *torch.autograd.grad(out, args[:3], torch.ones_like(out)))


def verify(result, args, *, causal, length, backward):
    """The first and the last sequence against the definition in float64."""
    for part in (slice(0, length), slice(-length, None)):
        leaves = [x.detach()[part].double().requires_grad_() for x in args[:3]]
        function = functools.partial(eager, causal=causal, length=length)
        expected = step(function, backward, *leaves, args[3][:2])
        outputs, references = (result, expected) if backward else ((result,), (expected,))
        for a, e in zip(outputs, references):
            error = (a.detach()[part].double() - e).norm() / e.norm()
            assert error < 1e-2, error  # bf16 operands and results: 2^-9 each


def case(sequences, length, heads, kv_heads, dim, causal, backward, device, quick=False) -> Case:
    def timed(function, **options):
        bound = functools.partial(function, causal=causal, length=length, **options)
        return functools.partial(step, bound, backward)

    pairs = length * (length + 1) / 2 if causal else length * length
    tokens = sequences * length
    row_bytes = 2.0 * tokens * dim
    compiled = torch.compile(functools.partial(eager, causal=causal, length=length))
    peers = {
        "eager": timed(eager),
        "compiled eager": functools.partial(step, compiled, backward),
        "SDPA flash": timed(sdpa, backend=SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": timed(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
        "varlen_attn": timed(torch_varlen),
        "flash-attn": timed(flash_attn),
    }
    if sequences > 8 or device.type == "cpu":  # it unrolls the loop over the sequences
        del peers["compiled eager"]
    name = f"{sequences} x {length}, {heads}/{kv_heads} x {dim}"
    name += ", causal" if causal else ""
    return Case(
        name=name + (", fwd+bwd" if backward else ""),
        inputs=lambda: inputs(sequences, length, heads, kv_heads, dim, device, backward),
        ours=timed(ours),
        verify=functools.partial(verify, causal=causal, length=length, backward=backward),
        peers=peers,
        flops=4.0 * sequences * pairs * heads * dim * (3.5 if backward else 1),
        bytes=row_bytes * (heads + kv_heads) * (4 if backward else 2),
        quick=quick,
        context=length if causal else None,
        series=f"causal, {heads}/{kv_heads} x {dim}" + (", fwd+bwd" if backward else ""),
    )


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            case(4, 256, 32, 4, 128, True, False, device, True),
            case(1, 1024, 32, 4, 128, True, False, device, True),
            case(1, 512, 32, 4, 128, True, True, device, True),
            case(1, 1024, 16, 16, 72, False, False, device, True),  # one frame of the ViT
        ]
    return [
        case(*shape, backward, device, quick=not backward)
        for backward in (False, True)
        for shape in (
            (64, 512, 32, 4, 128, True),
            (64, 1024, 32, 4, 128, True),
            (32, 2048, 32, 4, 128, True),
            (8, 1024, 16, 16, 72, False),  # the ViT: 8192 patches in frames of 1024
        )
    ]
