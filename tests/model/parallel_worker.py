"""Run by test_parallel.py under torchrun: one training step on several ranks against the same step on one."""

import copy
import os
import sys

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from keye_model.parallel import parallelize

LENGTH = 70


def step(model, sequences):
    """Hidden states, and the gradients of a loss that is a mean over the tokens: next token and indexer."""
    count = len(sequences)
    cu = F.pad(torch.full((count,), LENGTH).cumsum(0), (1, 0)).int()
    positions = torch.arange(LENGTH).repeat(count).expand(3, -1)
    pixels = torch.randn(24, 3, 14, 14, generator=torch.Generator().manual_seed(5))
    output = model(
        sequences.flatten(), positions, cu, LENGTH, pixel_values=pixels.repeat(count, 1, 1, 1),
        grids=[(1, 4, 6)] * count, index_loss=True,
    )  # fmt: skip
    loss = model.loss(output.hidden, sequences.roll(-1, 1).flatten())
    loss = loss + sum(stats.index_loss.mean() for stats in output.stats)
    loss.backward()
    return output.hidden.detach(), loss.detach()


def main():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = tiny.model()
    sequences = torch.randint(0, 280, (ranks, LENGTH))
    sequences[:, 3:9] = tiny.IMAGE
    alone = copy.deepcopy(whole)
    hidden, loss = step(alone, sequences)

    model = parallelize(whole, init_device_mesh("cpu", (ranks,)))
    mine, my_loss = step(model, sequences[rank : rank + 1])
    torch.testing.assert_close(mine, hidden.view(ranks, LENGTH, -1)[rank], rtol=1e-4, atol=1e-4)
    dist.all_reduce(my_loss)
    torch.testing.assert_close(my_loss / ranks, loss, rtol=1e-5, atol=0)

    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    sharded = 0
    for name, parameter in parameters.items():
        gradient, want = parameter.grad, expected[name]
        if isinstance(gradient, DTensor):
            sharded += 1
            gradient = gradient.full_tensor()
        else:
            assert ".experts." in name
            want = want.chunk(ranks)[rank]
        error = (gradient - want).abs().max() / want.abs().max().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: gradients differ by {error:.1e} of the largest"
    if rank == 0:
        print(
            f"equal on {ranks} ranks: {len(parameters)} gradients, {sharded} of them sharded by FSDP"
        )
    dist.destroy_process_group()
    # Without the destructors of static objects: one of torch's ends now and then in std::terminate, as a thread of gloo's
    # still runs (1 of 10 times on a busy machine, torch 2.13).
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
