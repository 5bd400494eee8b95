"""Products with few outputs or few tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T: [T, K] by [N, K] to [T, N].

    Under torch.compile a single token's becomes sums, one kernel that reads the weights at the memory's rate; cuBLAS cuts
    such a product into few blocks, or in two launches.
    """
    if torch.compiler.is_compiling() and x.is_cuda and x.shape[0] == 1:
        return (x.float()[:, None] * weight.float()).sum(-1).to(x.dtype)
    return F.linear(x, weight)
