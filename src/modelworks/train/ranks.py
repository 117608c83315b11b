"""The processes of one run: which of them this one is, and the few facts on which all must agree.

A run is its spec, the step and the data's order; everything else that decides what happens next (the clock, a signal,
what memory is free) differs from process to process. Such facts are taken from the first process or reduced over all,
so that all processes take the same turn. Alone, a process agrees with itself.
"""

from __future__ import annotations

import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others in one collective before it takes them for lost."""


class Ranks:
    """The processes of a run.

    Attributes
    ----------
    rank
        This process's number.
    world
        How many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run: logs, reports and commits checkpoints."""
        return self.rank == 0

    def of_first(self, value: float) -> float:
        """The first process's value."""
        return float(self.sum(torch.tensor(value if self.first else 0.0, dtype=torch.float64)))

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        return value if self.world == 1 else int(self._reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in their place."""
        return values if self.world == 1 else self._reduced(values, dist.ReduceOp.SUM)

    def close(self) -> None:
        """Leave the group; waits for nobody."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(values, operation)
        return values


def only_this_machine() -> None:
    """Let gloo use the loopback interface, whatever the machine's own name resolves to."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def join() -> Ranks:
    """Meet the other processes, as the environment that torchrun gives says where.

    Each attempt of a restarted run meets in a part of the store that is its own, since what an earlier attempt has
    left there would send some of its processes to peers that are gone.
    """
    if os.environ["MASTER_ADDR"] == "127.0.0.1":
        only_this_machine()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(rendezvous("env://", rank, world, timeout=_TIMEOUT))
    attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    dist.init_process_group("gloo", store=PrefixStore(attempt, store), rank=rank, world_size=world, timeout=_TIMEOUT)
    return Ranks(rank, world)
