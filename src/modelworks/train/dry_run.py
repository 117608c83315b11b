"""One process of a run as it would be, without the others and without memory: is the layout sound, and does it fit?

Two ideas. PyTorch's `fake` backend makes the groups of one rank of any number of them, and nothing is ever sent; and
on the meta device the network is split by the same code as in training, so what is counted is what training holds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from modelworks.model.decoder import Decoder
from modelworks.spec.errors import InputError
from modelworks.spec.run import RunSpec
from modelworks.train.layout import Layout, layout
from modelworks.train.optimizers import Optimizers
from modelworks.train.parallelize import Parallel, local
from modelworks.train.precision import BF16, FP32
from modelworks.train.ranks import Ranks
from modelworks.train.refusals import refuse_unsupported


@dataclass(frozen=True)
class Member:
    """What one process of a run holds; bytes."""

    rank: int
    stage: int
    kind: str
    """Of its stage: `first`, `middle` or `last`; `first` where there is one."""
    layers: int
    groups: dict[str, int]
    """Processes in each of its groups."""
    parameters: int
    """Elements of its stage that it computes with: what data-parallel processes split is counted whole."""
    weights: int
    """Kept from the forward to the backward pass: those that stand gathered, and this process's shards."""
    gradients: int
    optimizer: int
    shards: int
    """Of `weights`, what it keeps between steps: its shards, and what isn't split."""
    seconds: float
    """How long it took to build."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def members(spec: RunSpec, ranks: list[int] | None = None) -> Iterator[Member]:
    """Build some of a run's processes: those of `ranks`, or the first one, one of a middle stage and the last one.

    Raises
    ------
    InputError
        If the layout can't be trained, or there is no such rank.
    """
    world = spec.cluster.gpus
    refuse_unsupported(spec, world)
    degrees = layout(spec, world)
    in_stage = world // degrees.pipeline
    for rank in ranks or sorted({0, degrees.pipeline // 2 * in_stage, world - 1}):
        if not 0 <= rank < world:
            raise InputError(f"--rank {rank} is not accepted: 0 to {world - 1} are")
        yield _member(spec, degrees, rank)


def _member(spec: RunSpec, degrees: Layout, rank: int) -> Member:
    begun = time.perf_counter()
    with _alone_in(degrees.processes, rank):
        parallel = Parallel(degrees, Ranks(rank, degrees.processes))
        stage = rank // (degrees.processes // degrees.pipeline)
        kind = "first" if stage == 0 else "last" if stage == degrees.pipeline - 1 else "middle"
        with torch.device("meta"):
            decoder = Decoder(spec.model)
        # What the plan takes `auto` for, and what a GPU takes.
        parallel.apply(decoder, spec.parallel, FP32 if spec.train.precision == "fp32" else BF16)
        state = Optimizers(decoder, spec.train, torch.bfloat16, parallel.whole).prepare_state()
        held = [parallel.held(name, parameter) for name, parameter in decoder.named_parameters()]
        return Member(
            rank=rank,
            stage=stage,
            kind=kind,
            layers=len(decoder.blocks),
            groups=parallel.group_sizes(),
            parameters=sum(each.elements for each in held),
            weights=sum(each.weights for each in held),
            gradients=sum(each.gradients for each in held),
            optimizer=sum(local(tensor).nbytes for tensor in state.values()),
            shards=sum(each.own for each in held),
            seconds=time.perf_counter() - begun,
        )


@contextlib.contextmanager
def _alone_in(world: int, rank: int) -> Iterator[None]:
    """Be one of so many processes that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
