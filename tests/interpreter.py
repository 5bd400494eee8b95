"""Triton's interpreter, made to round as GPUs do."""

import os

import torch


def round_to_nearest_even():
    """Makes float32 to bfloat16 round to nearest even in the interpreter, which truncates.

    No effect on compiled kernels, nor on other conversions.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    if hasattr(original, "truncating"):
        return

    def convert(data, source, target, rounding_mode):
        if source != tl.float32 or target != tl.bfloat16:
            return original(data, source, target, rounding_mode)
        rounded = torch.tensor(data, dtype=torch.float32).bfloat16()
        return rounded.view(torch.int16).numpy().view("uint16").reshape(data.shape)

    convert.truncating = original
    interpreter._convert_float = convert
