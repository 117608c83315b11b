"""How long processes of this machine take to exchange tensors, measured among as many of them."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from modelworks.spec.errors import OperationError
from modelworks.spec.hardware import CollectiveTime
from modelworks.train.ranks import only_this_machine

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
"""Bytes: what latency alone decides, what bandwidth alone does, and two between."""
_ROUNDS = {1 << 12: 20, 1 << 16: 20, 1 << 20: 8, 1 << 24: 3}
_STARTUP_S = 120.0


def measure_collectives(counts: tuple[int, ...] = (2, 4)) -> list[CollectiveTime]:
    """Time every kind of collective by size, among so many processes of one thread each.

    Raises
    ------
    OperationError
        If the processes can't be started or don't find each other.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    world = max(counts)
    with tempfile.TemporaryDirectory() as folder:
        members = [
            context.Process(
                target=_member, args=(rank, world, counts, str(Path(folder) / "store"), sender), daemon=True
            )
            for rank in range(world)
        ]
        try:
            for member in members:
                member.start()
            sender.close()
            if not receiver.poll(_STARTUP_S):
                raise OperationError(f"{world} processes didn't exchange anything within {_STARTUP_S:.0f} s")
            return list(receiver.recv())
        except (OSError, EOFError) as error:
            raise OperationError(f"collectives cannot be measured: {error or 'a process has ended early'}") from error
        finally:
            for member in members:
                if member.pid is not None:
                    member.join(5.0)
                    member.kill()


def _member(rank: int, world: int, counts: tuple[int, ...], store: str, sender: Any) -> None:
    torch.set_num_threads(1)
    only_this_machine()
    dist.init_process_group("gloo", store=FileStore(store, world), rank=rank, world_size=world)
    times = []
    for count in counts:
        group = dist.new_group(list(range(count)))
        if rank < count:
            times += [
                CollectiveTime(kind=kind, ranks=count, bytes=size, time_s=_time(work, size, count, group))  # type: ignore[arg-type]
                for kind, work in _KINDS.items()
                for size in SIZES
            ]
        dist.barrier()
    if rank == 0:
        sender.send(times)
    dist.destroy_process_group()


def _time(work: Callable[[Tensor, Tensor, Any], Any], size: int, count: int, group: Any) -> float:
    """The shortest time of a few, of the slowest process."""
    whole = torch.zeros(size // 4)
    part = torch.zeros(size // 4 // count)
    work(whole, part, group)
    shortest = float("inf")
    for _ in range(_ROUNDS[size]):
        dist.barrier(group)
        begun = time.perf_counter()
        work(whole, part, group)
        taken = torch.tensor(time.perf_counter() - begun)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=group)
        shortest = min(shortest, float(taken))
    return shortest


_KINDS: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "all_reduce": lambda whole, part, group: dist.all_reduce(whole, group=group),
    "all_gather": lambda whole, part, group: dist.all_gather_single(whole, part, group=group),
    "reduce_scatter": lambda whole, part, group: dist.reduce_scatter_single(part, whole, group=group),
    "all_to_all": lambda whole, part, group: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
}
