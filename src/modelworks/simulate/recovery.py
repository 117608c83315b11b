"""What happens after a failure, as numbers: when checkpoints can be relied on, how long a restart takes.

Checkpoints have two levels, of which either may be absent: fast ones (in the memory of peers) after every `every_s` of
work, and durable ones (in storage) with every `ratio`th of them. A checkpoint stops the job for its stall; a durable
one can be relied on `lag_s` after that. All functions are of the time since the job last started, so both engines and
the closed forms share them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelworks.spec.errors import InputError
from modelworks.spec.machine import PartsSpec
from modelworks.spec.run import RunSpec

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Checkpoints:
    """When the state is saved and what that costs; times in seconds."""

    every_s: float
    """Work between two checkpoints, of either level."""
    stall_s: float
    """What a fast one stops the job for."""
    ratio: int
    """Every so many-th is durable as well."""
    durable_stall_s: float
    """What a durable one stops the job for, beyond that."""
    lag_s: float
    """Until a durable one can be relied on."""
    fast: bool
    """Whether fast ones can be recovered from."""
    fast_read_s: float
    read_s: float

    @property
    def cycle_s(self) -> float:
        """From one durable checkpoint to the next, stalls included."""
        return self.ratio * (self.every_s + self.stall_s) + self.durable_stall_s

    @property
    def overhead(self) -> float:
        """Share of the running time that checkpoints take."""
        return 1.0 - self.ratio * self.every_s / self.cycle_s

    def progress(self, running_s: Floats) -> tuple[Floats, Floats, Floats]:
        """Work done after so much running time, and how much of it fast and durable checkpoints hold. In seconds."""
        whole = np.floor(running_s / self.cycle_s)
        rest = running_s - whole * self.cycle_s
        step_s = self.every_s + self.stall_s
        inner = np.minimum(np.floor(rest / step_s), self.ratio)
        begun = np.where(inner < self.ratio, np.minimum(rest - inner * step_s, self.every_s), 0.0)
        held = (whole * self.ratio + inner) * self.every_s
        durable = np.floor(np.maximum(running_s - self.lag_s, 0.0) / self.cycle_s) * (self.ratio * self.every_s)
        return held + begun, held if self.fast else durable, durable

    def running_s(self, work_s: Floats) -> Floats:
        """How long it takes to do so much work, no checkpoint being made at its end."""
        made = np.maximum(np.ceil(work_s / self.every_s) - 1.0, 0.0)
        return np.asarray(work_s + made * self.stall_s + np.floor(made / self.ratio) * self.durable_stall_s)


def checkpoints(
    run: RunSpec, checkpoint_bytes: float, step_time_s: float, parts: PartsSpec, every_s: float | None = None
) -> Checkpoints:
    """What the run's checkpoints cost, from their size and the bandwidths, or as the scenario states it.

    A write takes the state's size over the storage's bandwidth; a snapshot a GPU's share over the bandwidth to its
    host; a copy into a peer's memory in addition that share over the NIC's bandwidth, behind the job.

    Raises
    ------
    InputError
        If they don't fit the storage, or are made faster than they can be written.
    """
    state, gpus, cluster = run.simulate.state, run.cluster.gpus, run.cluster
    every = every_s if every_s is not None else _every(run, step_time_s)
    if every <= 0:
        raise InputError(f"checkpoint.every = {every:g} is not accepted: a time above zero is")
    room = state.storage_bytes if state.storage_bytes is not None else gpus * parts.storage.capacity_per_gpu_bytes
    needed = checkpoint_bytes * run.checkpoint.keep
    if needed > room:
        raise InputError(
            f"simulate.state.storage_bytes = {room:_} is not accepted: checkpoint.keep = {run.checkpoint.keep} "
            f"checkpoints of {checkpoint_bytes:.3g} bytes need {needed:.3g}"
        )
    bandwidth = (
        state.storage_bandwidth_bytes or cluster.storage_bandwidth_bytes or gpus * parts.storage.bandwidth_per_gpu_bytes
    )
    write_s = state.write if state.write is not None else checkpoint_bytes / bandwidth
    read_s = state.read if state.read is not None else checkpoint_bytes / bandwidth
    snapshot_s = checkpoint_bytes / gpus / state.snapshot_bandwidth_bytes
    nic = cluster.network.nic_bandwidth_bytes if cluster.network else state.snapshot_bandwidth_bytes
    peer_read_s = checkpoint_bytes / gpus / nic
    stall_s = state.stall if state.stall is not None else (write_s if state.kind == "sync" else snapshot_s)
    if state.kind == "sync":
        return Checkpoints(every, 0.0, 1, stall_s, 0.0, False, read_s, read_s)
    if state.kind == "async":
        _writable(every, write_s)
        return Checkpoints(every, 0.0, 1, stall_s, write_s, False, read_s, read_s)
    ratio = state.storage_every
    if state.kind == "multi-level":
        ratio = max(1, round(every / state.peer_every))
        every = every / ratio
    _writable(every * ratio, write_s)
    return Checkpoints(every, stall_s, ratio, 0.0, write_s, True, peer_read_s, read_s)


def _every(run: RunSpec, step_time_s: float) -> float:
    steps = run.checkpoint.every_steps
    return steps * step_time_s if steps is not None else run.checkpoint.every


def _writable(every_s: float, write_s: float) -> None:
    if write_s > every_s:
        raise InputError(
            f"checkpoint.every = {every_s:g} s is not accepted: writing one takes {write_s:.3g} s; at least that is"
        )


def restart_s(run: RunSpec, ranks: int) -> float:
    """Mean time from nodes that are there to the first new step, loading the state not included.

    Setting up communicators is taken to grow linearly with the ranks, as the exchange of addresses through one store
    does.
    """
    restart = run.simulate.restart
    communicators = restart.communicator + restart.communicator_per_rank * ranks
    return restart.scheduler + restart.container + communicators + restart.warm_up


def group_nodes(run: RunSpec) -> int:
    """Nodes of one replica of the model, for elastic data parallelism."""
    gpus = run.simulate.elastic.group_gpus
    if gpus is None:
        parallel = run.parallel
        degrees = [parallel.tensor, parallel.pipeline, parallel.context]
        if "auto" in degrees:
            raise InputError("simulate.elastic.group_gpus is missing: GPUs of one replica, as parallel has 'auto'")
        gpus = math.prod(int(degree) for degree in degrees)
    nodes = max(1, math.ceil(gpus / run.cluster.gpus_per_node))
    if nodes > run.cluster.nodes:
        raise InputError(f"simulate.elastic.group_gpus = {gpus} is not accepted: the cluster has {run.cluster.gpus}")
    return nodes
