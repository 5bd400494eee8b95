"""The one tolerance of the numerical tests, derived from the precision and never tuned."""

import torch


def assert_close(name, actual, exact, same_precision, scale=None):
    """Per row: the error against float64 is at most 2x that of torch in the same precision.

    Args:
        name: names the tensor in the failure.
        actual: the output under test, rows along the last dimension.
        exact: the reference's, of float64 inputs.
        same_precision: the reference's, of the inputs the kernel had; rounded to the output's dtype.
        scale: per row, the size of the terms that a sum with cancellation adds up; default the row's largest value.

    Where torch happens to be more exact than its precision, the floor is one rounding to the output's dtype, of the
    row's largest value, plus 4 units of float32 of `scale`. NaN must be where the reference has it.
    """
    assert actual.shape == exact.shape == same_precision.shape, name
    if actual.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps / 2
    unit = torch.finfo(torch.float32).eps
    actual, exact, same_precision = (
        x.detach().double().reshape(-1, x.shape[-1]) for x in (actual, exact, same_precision)
    )
    nan = exact.isnan()
    assert torch.equal(actual.isnan(), nan), f"{name}: NaN in other places than the reference's"
    error, torch_error, size = (
        x.masked_fill(nan, 0).abs().amax(-1)
        for x in (actual - exact, same_precision - exact, exact)
    )
    scale = size if scale is None else scale.flatten()
    allowed = torch.maximum(2 * torch_error, rounding * size + 4 * unit * scale)
    row = (error - allowed).argmax()
    assert (error <= allowed).all(), f"{name}: row {row}: error {error[row]:.3e} > {allowed[row]:.3e}"  # fmt: skip
