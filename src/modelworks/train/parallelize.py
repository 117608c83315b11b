"""Applies a layout to a network from outside; the network's own file knows nothing of it.

Data parallelism is PyTorch's FSDP2 at every ZeRO stage, a block at a time: stage 3 splits the weights and gathers a
block's when it is needed, 2 keeps them gathered from the forward to the backward pass, 1 moreover adds up whole
gradients over the micro batches and reduces them once, and 0 splits nothing and only averages gradients (DDP).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from modelworks.model.decoder import Decoder
from modelworks.train.layout import Layout
from modelworks.train.ranks import Ranks


class Parallel:
    """A run's processes, arranged by a layout.

    Attributes
    ----------
    layout, ranks
        The degrees, and the processes.
    data_rank
        Which share of each global batch this process takes.
    """

    def __init__(self, layout: Layout, ranks: Ranks) -> None:
        self.layout, self.ranks = layout, ranks
        self.mesh: DeviceMesh | None = None
        self.data_rank = 0
        self._sharded: FSDPModule | None = None
        if layout.processes > 1:
            self.mesh = init_device_mesh("cpu", (layout.replicas, layout.shard), mesh_dim_names=("replicate", "shard"))
            self.data_rank = ranks.rank

    def apply(self, decoder: Decoder) -> None:
        """Split a network over the processes, in place. Every process must hold the same weights."""
        if self.mesh is None:
            return
        mesh = self.mesh if self.layout.replicas > 1 or self.layout.zero_stage == 0 else self.mesh["shard"]
        whole_until_backward = self.layout.zero_stage < 3
        for block in decoder.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=not whole_until_backward)
        self._sharded = fully_shard(decoder, mesh=mesh, reshard_after_forward=False)
        # gloo has no averaging reduction; FSDP then divides the sum itself.
        for module in decoder.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    def share(self, count: int) -> tuple[int, int]:
        """Which of `count` sequences this process takes: the first one's place, and how many."""
        each = count // self.layout.data
        return self.data_rank * each, each

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro batch: what of the gradients' exchange waits for the last."""
        if self._sharded is not None and self.layout.zero_stage < 3:
            if self.layout.zero_stage < 2:
                self._sharded.set_requires_gradient_sync(last)
            self._sharded.set_is_last_backward(last)
            self._sharded.set_reshard_after_backward(last)
        yield

    def clip(self, parameters: Iterable[Tensor], largest: float) -> float:
        """Scale all gradients so that their norm over the whole network is at most `largest`, and return that norm.

        Each process adds what it holds, divided by how many processes hold the same, so that one sum over all
        processes serves every layout.
        """
        groups: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                groups.setdefault(self._copies(parameter.grad), []).append(_local(parameter.grad))
        squares = [
            torch.nn.utils.get_total_norm(gradients).double().square() / copies for copies, gradients in groups.items()
        ]
        norm = math.sqrt(float(self.ranks.sum(torch.stack(squares).sum())))
        scale = largest / (norm + 1e-6)
        if scale < 1.0:
            for gradients in groups.values():
                torch._foreach_mul_(gradients, scale)
        return norm

    def _copies(self, tensor: Tensor) -> int:
        """How many processes hold the same part of a tensor as this one."""
        parts = 1
        if isinstance(tensor, DTensor):
            sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
            parts = math.prod(size for placement, size in sizes if isinstance(placement, Shard))
        return self.ranks.world // self.layout.pipeline // parts


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
