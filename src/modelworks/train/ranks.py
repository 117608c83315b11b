"""The processes of one run: which of them this one is, and the few facts on which all must agree.

A run is its spec, the step and the data's order; everything else that decides what happens next (the clock, a signal,
what memory is free) differs from process to process. Such facts are taken from the first process or reduced over all,
so that all processes take the same turn. Alone, a process agrees with itself.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

import modelworks
from modelworks.spec.errors import InputError, OperationError

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

    Raises
    ------
    InputError
        If this process has other software than the first one.
    OperationError
        If the port to meet at is another program's.
    """
    if os.environ["MASTER_ADDR"] == "127.0.0.1":
        only_this_machine()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=_TIMEOUT))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OperationError(f"the processes can't meet at {where}: the port is in use by another program") from None
    attempt = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _refuse_other_software(attempt, rank)
    dist.init_process_group("gloo", store=attempt, rank=rank, world_size=world, timeout=_TIMEOUT)
    return Ranks(rank, world)


def software() -> str:
    """What must be the same for all processes: versions, and a digest of the code that they run together."""
    package, digest = Path(modelworks.__file__).parent, hashlib.sha256()
    for room in ("spec", "model", "data", "train"):
        for path in sorted((package / room).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    code = digest.hexdigest()[:12]
    return f"Modelworks {modelworks.__version__} (code {code}), PyTorch {torch.__version__}, Python {python}"


def _refuse_other_software(store: Store, rank: int) -> None:
    mine = software()
    if rank == 0:
        store.set("software", mine)
    elif (first := store.get("software").decode()) != mine:
        raise InputError(f"process {rank} has {mine}, and process 0 has {first}: the same on every node is accepted")
