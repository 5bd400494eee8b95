"""Argument checks. Every failure is a ValueError that names the argument, what was expected and what came.

They look at metadata only (dtype, shape, stride, device), so they hold for CPU, CUDA and fake tensors alike and never
read device data on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.bfloat16)
FP32 = (torch.float32,)
FP8 = (torch.float8_e4m3fn,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
UINT8 = (torch.uint8,)


class Arguments:
    """Checks the arguments of one call; letters of the shapes keep their meaning over the whole call.

    >>> a = Arguments("sparse_attention")
    >>> a.tensor("q", q, "T H D", FLOATS)
    >>> a.tensor("k", k, "L G D", (q.dtype,))     # D must equal q's D, the device q's device
    >>> a["D"]
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, tuple[int, str]] = {}
        self.device: tuple[torch.device, str] | None = None

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter][0]

    def fail(self, name: str, expected: str, got: object) -> None:
        raise ValueError(f"{self.op}: {name}: expected {expected}, got {got}")

    def require(self, condition: bool, name: str, expected: str, got: object) -> None:
        if not condition:
            self.fail(name, expected, got)

    def tensor(
        self,
        name: str,
        value: torch.Tensor,
        shape: str,
        dtypes: Sequence[torch.dtype],
        *,
        contiguous: bool = False,
        inner: int = 1,
    ) -> None:
        """Checks one tensor.

        Args:
            shape: one token a dimension: a letter (equal letters, equal sizes), a number, a product such as `2F`,
                a sum such as `S+1`, or `_` for any size.
            dtypes: the accepted dtypes.
            contiguous: the whole tensor must be contiguous; otherwise only its last `inner` dimensions.
        """
        if not isinstance(value, torch.Tensor):
            self.fail(name, "a torch.Tensor", type(value).__name__)
        if value.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self.fail(name, expected, str(value.dtype).removeprefix("torch."))
        self._device(name, value)
        tokens = shape.split()
        if value.dim() != len(tokens):
            self.fail(name, f"shape [{', '.join(tokens)}]", list(value.shape))
        for axis, token in enumerate(tokens):
            self._size(name, tokens, axis, token, value)
        if contiguous:
            self.require(
                value.is_contiguous(), name, "a contiguous tensor", f"strides {value.stride()}"
            )
            return
        if value.numel() == 0:
            return
        stride = 1
        for axis in range(value.dim() - 1, value.dim() - 1 - inner, -1):
            if value.shape[axis] > 1 and value.stride(axis) != stride:
                what = "dimension" if inner == 1 else f"{inner} dimensions"
                self.fail(name, f"the last {what} contiguous", f"strides {value.stride()}")
            stride *= value.shape[axis]

    def optional(
        self,
        name: str,
        value: torch.Tensor | None,
        shape: str,
        dtypes: Sequence[torch.dtype],
        **how: bool,
    ) -> None:
        """Like `tensor`, for an argument that may be None."""
        if value is not None:
            self.tensor(name, value, shape, dtypes, **how)  # type: ignore[arg-type]

    def integer(self, name: str, value: int, low: int, high: int | None = None) -> None:
        """Checks low <= value (<= high)."""
        expected = f"an integer >= {low}" + ("" if high is None else f" and <= {high}")
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            self.fail(name, expected, repr(value))
        if value < low or (high is not None and value > high):
            self.fail(name, expected, value)

    def number(self, name: str, value: float, *, positive: bool = True) -> None:
        """Checks a finite (positive) float."""
        expected = "a finite positive number" if positive else "a finite number"
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not ok or not (-float("inf") < value < float("inf")) or (positive and value <= 0):
            self.fail(name, expected, repr(value))

    def one_of(self, name: str, value: object, allowed: Sequence[object]) -> None:
        self.require(value in allowed, name, " or ".join(map(str, allowed)), value)

    def _device(self, name: str, value: torch.Tensor) -> None:
        if self.device is None:
            self.require(
                value.device.type in ("cpu", "cuda"), name, "a CPU or CUDA tensor", value.device
            )
            self.device = (value.device, name)
        elif value.device != self.device[0]:
            self.fail(name, f"device {self.device[0]} (that of {self.device[1]})", value.device)

    def _size(
        self, name: str, tokens: list[str], axis: int, token: str, value: torch.Tensor
    ) -> None:
        size = value.shape[axis]
        if token == "_":
            return
        expected = self._evaluate(token)
        if expected is None:
            self.sizes[token] = (size, name)
        elif size != expected:
            source = f" (from {self.sizes[token][1]})" if token in self.sizes else ""
            self.fail(
                name,
                f"shape [{', '.join(tokens)}] with {token} = {expected}{source}",
                list(value.shape),
            )

    def _evaluate(self, token: str) -> int | None:
        """The size a token stands for; None for a letter seen for the first time."""
        if token.isdigit():
            return int(token)
        if "+" in token:
            letter, number = token.split("+")
            return self.sizes[letter][0] + int(number)
        digits = token.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
        letter = token[len(digits) :]
        if letter not in self.sizes:
            if digits:
                raise KeyError(f"{token}: {letter} is not bound yet")
            return None
        return int(digits or 1) * self.sizes[letter][0]
