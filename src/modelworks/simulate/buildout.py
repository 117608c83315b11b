"""A machine that is being built: GPUs arrive in batches, halls get power in phases, training runs on what is there.

The capacity is a step function of time: as many whole nodes as have arrived and can be fed. The same function gives the
FLOPs and tokens that accumulate over calendar time, by which machines of different generations are compared: the day
on which one overtakes the other, and which finishes a given run first or cheapest.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelworks.spec.errors import InputError
from modelworks.spec.simulation import BatchSpec, PowerPhaseSpec

DAY_S = 86400.0
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Capacity:
    """Nodes that can work, from each time on."""

    times_s: Floats
    nodes: npt.NDArray[np.int64]

    def at(self, seconds: Floats) -> npt.NDArray[np.int64]:
        """Nodes at given times."""
        return self.nodes[np.searchsorted(self.times_s, seconds, side="right") - 1]

    def node_seconds(self, seconds: Floats) -> Floats:
        """Node-seconds from the beginning until given times."""
        spans = np.diff(self.times_s, append=np.inf)
        until = np.clip(np.asarray(seconds, float)[..., None] - self.times_s, 0.0, spans)
        return np.asarray((until * self.nodes).sum(axis=-1))


def capacity(
    nodes: int, gpus_per_node: int, batches: Sequence[BatchSpec], phases: Sequence[PowerPhaseSpec], node_w: float
) -> Capacity:
    """Nodes over time.

    Parameters
    ----------
    nodes
        Of the finished machine.
    batches
        GPUs that arrive, none for all on day 0. What arrives beyond the machine isn't used.
    phases
        The site's power from a day on; none for enough.
    node_w
        What one node takes at the site's meter, its share of the network and cooling included.

    Raises
    ------
    InputError
        If nothing can run on day 0.
    """
    arrivals = sorted(batches, key=lambda batch: batch.day) or [BatchSpec(day=0.0, gpus=nodes * gpus_per_node)]
    limits = sorted(phases, key=lambda phase: phase.day)
    days = sorted({batch.day for batch in arrivals} | {phase.day for phase in limits})
    steps = []
    for day in days:
        there = min(nodes, sum(batch.gpus for batch in arrivals if batch.day <= day) // gpus_per_node)
        fed = [phase.megawatts for phase in limits if phase.day <= day]
        steps.append(min(there, int(fed[-1] * 1e6 / node_w)) if fed else there)
    if steps[0] == 0:
        raise InputError("simulate.batches and simulate.power: nothing can run on day 0: no whole node has power")
    kept = [index for index in range(len(days)) if index == 0 or steps[index] != steps[index - 1]]
    return Capacity(
        times_s=np.array([days[index] * DAY_S for index in kept]), nodes=np.array([steps[index] for index in kept])
    )


@dataclass(frozen=True)
class Candidate:
    """A machine in a comparison."""

    name: str
    start: datetime.date
    capacity: Capacity
    tokens_per_s: float
    """Of the finished machine, failures counted."""
    flops: float
    """Useful model FLOP/s of the finished machine, failures counted."""
    power_w: float
    """Of the site, finished machine."""
    usd_per_year: float
    capital_usd: float

    def tokens(self, dates: Sequence[datetime.date]) -> Floats:
        """Tokens trained until given dates."""
        return self.tokens_per_s * self._full_seconds(dates)

    def flop(self, dates: Sequence[datetime.date]) -> Floats:
        """Model FLOPs done until given dates."""
        return self.flops * self._full_seconds(dates)

    def _full_seconds(self, dates: Sequence[datetime.date]) -> Floats:
        seconds = np.array([(date - self.start).days * DAY_S for date in dates])
        return np.asarray(self.capacity.node_seconds(np.maximum(seconds, 0.0)) / self.capacity.nodes[-1])

    def finish(self, tokens: float) -> datetime.datetime:
        """When a token budget is done."""
        needed = tokens / self.tokens_per_s * self.capacity.nodes[-1]
        done = self.capacity.node_seconds(self.capacity.times_s)
        step = int(np.searchsorted(done, needed, side="right")) - 1
        seconds = self.capacity.times_s[step] + (needed - done[step]) / self.capacity.nodes[step]
        return datetime.datetime.combine(self.start, datetime.time()) + datetime.timedelta(seconds=float(seconds))

    def usd_until(self, end: datetime.datetime) -> float:
        """Write-off, energy and upkeep from the first batch until a time, for the nodes that were there."""
        seconds = (end - datetime.datetime.combine(self.start, datetime.time())).total_seconds()
        full = float(self.capacity.node_seconds(np.array([seconds]))[0]) / float(self.capacity.nodes[-1])
        return self.usd_per_year * full / (365 * DAY_S)

    def joules_per_token(self) -> float:
        """Energy of the site for a token."""
        return self.power_w / self.tokens_per_s


def overtakes(one: Candidate, other: Candidate, within_days: int = 3650) -> datetime.date | None:
    """The first date on which `one` has trained more tokens than `other` after having trained fewer; None if never."""
    first = min(one.start, other.start)
    dates = [first + datetime.timedelta(days=day) for day in range(within_days)]
    ahead = one.tokens(dates) - other.tokens(dates)
    behind = np.flatnonzero(ahead < 0)
    if not behind.size:
        return None
    passed = np.flatnonzero((ahead > 0) & (np.arange(len(dates)) > behind[0]))
    return dates[int(passed[0])] if passed.size else None
