"""Several GPUs: the decoder's experts split over the ranks, everything else sharded with FSDP2.

Each rank works on its own tokens. A layer sends the rows of its tokens to the ranks that hold their experts, and gets them
back, with `all_to_all_single`; the split sizes are read on the host once a layer. Gradients are means over the ranks: FSDP
averages its own, and those of the experts, which see every rank's rows, are divided by the number of ranks.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import dsa_kernels

from .decoder import DecoderLayer
from .model import KeyeVL
from .moe import Experts


def parallelize(model: KeyeVL, mesh: DeviceMesh) -> KeyeVL:
    """Shards a network that every rank holds whole, in place, over a mesh of one dimension.

    Raises:
        ValueError: the number of experts is no multiple of the number of ranks.
    """
    group = mesh.get_group()
    ours: set[nn.Parameter] = set()
    for layer in cast(list[DecoderLayer], model.decoder.layers):
        layer.mlp.experts = ShardedExperts(cast(Experts, layer.mlp.experts), group)
        experts = set(layer.mlp.experts.parameters())
        fully_shard(layer, mesh=mesh, ignored_params=experts)
        ours |= experts
    if model.visual is not None:
        for block in model.visual.layers:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=ours)
    return model


class ShardedExperts(nn.Module):
    """This rank's experts: `num_experts / ranks` of them, in order of the ranks."""

    def __init__(self, whole: Experts, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.ranks, rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.num_experts = whole.w13.shape[0]
        if self.num_experts % self.ranks:
            raise ValueError(f"num_experts: expected a multiple of {self.ranks} ranks, got {self.num_experts}")  # fmt: skip
        self.local = self.num_experts // self.ranks
        mine = slice(rank * self.local, (rank + 1) * self.local)
        self.w13 = nn.Parameter(whole.w13.detach()[mine].clone())
        self.w2 = nn.Parameter(whole.w2.detach()[mine].clone())
        for weight in (self.w13, self.w2):
            weight.register_hook(lambda gradient: gradient / self.ranks)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        routing = dsa_kernels.routing_map(ids, self.num_experts)
        sent = routing.offsets.diff().view(
            self.ranks, self.local
        )  # rows of ours for each rank's experts
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        out_rows, in_rows = received.sum(1).tolist(), sent.sum(1).tolist()

        rows = x[routing.row_token[: sum(in_rows)]]
        rows = all_to_all_single_autograd(rows, out_rows, in_rows, self.group)
        # Rows arrive rank by rank, within a rank by expert; the experts want them by expert alone.
        expert = torch.arange(self.local, device=x.device).repeat(self.ranks)
        order = expert.repeat_interleave(received.flatten()).argsort(stable=True)
        offsets = torch.nn.functional.pad(received.sum(0).cumsum(0), (1, 0)).int()
        rows = dsa_kernels.experts(rows[order], self.w13, self.w2, offsets)
        rows = all_to_all_single_autograd(rows[order.argsort()], in_rows, out_rows, self.group)

        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        has_row = routing.slot_row >= 0
        for j in range(ids.shape[1]):
            slot = torch.where(has_row[:, j, None], rows[routing.slot_row[:, j].clamp(min=0)], 0)
            out = out + weights[:, j, None] * slot
        return out.to(x.dtype)
