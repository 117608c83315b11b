"""What fails and when: rates of components become the failures of a job over time, drawn for many replicas at once.

Three ideas. A count of interruptions on an observed cluster, over that cluster's components and hours, is a rate of one
component; times the components of another cluster it is a rate of that one. A Weibull component of which there are
many, each repaired as it fails, gives a Poisson process whose rate follows the component's age (Crow 1974: the
power-law process); so all causes together are one Poisson process with a rate that depends on time, and times are
drawn by inverting its integral. Everything random that follows from a failure (how soon it is seen, how long the repair
takes, whether the node is a lemon) is drawn with it, so that both engines meet the same failures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from modelworks.simulate.machine import components, network
from modelworks.spec.errors import InputError
from modelworks.spec.hardware import ClusterSpec, NetworkSpec
from modelworks.spec.machine import PartsSpec
from modelworks.spec.simulation import CauseSpec, FailuresSpec, SimulateSpec

if TYPE_CHECKING:
    from modelworks.simulate.scenario import Scenario

DAY_S = 86400.0
_BINS = 512
"""Steps of time between which a changing rate is taken to be constant."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cause:
    """One thing that fails, with the scenario's changes; times in seconds."""

    name: str
    facts: CauseSpec
    per_s: float
    """Failures per second in the whole job, at the age of the observation."""
    shape: float
    detect_s: float
    repair_s: float
    nodes: int
    """How many go down with it."""


def causes(
    catalog: FailuresSpec,
    changes: SimulateSpec,
    counts: dict[str, int],
    nodes_per_scope: dict[str, int],
    parts: PartsSpec,
) -> tuple[Cause, ...]:
    """The causes of a catalog file, scaled to a cluster's components.

    Raises
    ------
    InputError
        If the scenario changes a cause that the file doesn't have, or the file counts a component that isn't known.
    """
    unknown = set(changes.causes) - set(catalog.causes)
    if unknown:
        known = ", ".join(catalog.causes)
        raise InputError(f"simulate.causes.{min(unknown)}: no such cause in {catalog.name}; known are {known}")
    observed = observed_components(catalog, parts)
    found = []
    for name, facts in catalog.causes.items():
        if facts.component not in counts:
            raise InputError(
                f"causes.{name}.component = {facts.component!r} is not accepted: one of {', '.join(counts)} is"
            )
        change = changes.causes.get(name)
        hours = catalog.observation.days * 24.0
        if facts.interruptions is not None:
            if not observed[facts.component]:
                raise InputError(f"causes.{name}: the observed cluster has no {facts.component}")
            per_component = facts.interruptions / (observed[facts.component] * hours * 3600.0)
        else:
            per_component = 1.0 / (facts.mtbf_hours * 3600.0)  # type: ignore[operator] # one of the two is given
        repair_hours = (change.repair_hours if change else None) or facts.repair_hours
        detect_s = change.detect if change and change.detect is not None else facts.detect_s
        found.append(
            Cause(
                name=name,
                facts=facts,
                per_s=per_component * counts[facts.component] * changes.rate * (change.rate if change else 1.0),
                shape=(change.shape if change else None) or facts.shape,
                detect_s=detect_s,
                repair_s=repair_hours * 3600.0 / changes.repair.speed,
                nodes=nodes_per_scope[facts.scope],
            )
        )
    if not sum(cause.per_s for cause in found) < np.inf:
        raise InputError("simulate.rate: failures without end are not accepted: a finite rate is")
    return tuple(found)


def observed_components(catalog: FailuresSpec, parts: PartsSpec) -> dict[str, int]:
    """What the observed job's cluster was made of."""
    seen = catalog.observation
    cluster = ClusterSpec(
        device="h100-sxm",
        gpus=seen.gpus,
        gpus_per_node=seen.gpus_per_node,
        network=NetworkSpec(nic_bandwidth_bytes=50e9, nics_per_node=seen.gpus_per_node, levels=seen.levels),
    )
    return components(cluster, parts, network(cluster, parts))


def expected(scenario: Scenario, until_s: Floats) -> Floats:
    """Expected failures of each cause until given times: an array of causes by times.

    The rate of a power-law process with shape k is that of the observation times (age / observed age)^(k - 1).
    """
    times = np.asarray(until_s, float)
    share = scenario.capacity.node_seconds(times) / scenario.nodes
    rows = []
    for cause in scenario.causes:
        if cause.shape == 1.0:
            rows.append(cause.per_s * share)
            continue
        k, begin, seen = cause.shape, scenario.age_s, scenario.observed_age_s
        aged = ((begin + times) ** k - begin**k) / (k * seen ** (k - 1.0))
        growth = np.divide(share, times, out=np.ones_like(times), where=times > 0)
        rows.append(cause.per_s * aged * growth)
    return np.array(rows).reshape(len(scenario.causes), times.size)


@dataclass(frozen=True)
class FailureStream:
    """Failures of many replicas. Arrays of (failures, replicas), in order of time; infinite times fill them up.

    Single precision serves for all but the times.
    """

    time_s: Floats
    """When it strikes; of what is silent or slow: when it is found."""
    cause: npt.NDArray[np.int16]
    detect_s: npt.NDArray[np.float32]
    """Until it is noticed; of what is silent or slow: since when it went on."""
    repair_s: npt.NDArray[np.float32]
    """A technician's work; 0 if the nodes stay."""
    relapse_s: npt.NDArray[np.float32]
    """From its return until a lemon fails again; infinite for others."""
    outage_s: npt.NDArray[np.float32]
    """For which nobody can work, waiting for a person included."""
    restart: npt.NDArray[np.float32]
    """The restart's time over its mean."""
    lot: npt.NDArray[np.float32]
    """A uniform number: which node it is, and whether it is one that the job uses."""
    foreseen: npt.NDArray[np.bool_]
    """Whether a health check found it first."""

    @property
    def replicas(self) -> int:
        """How many replicas there are."""
        return int(self.time_s.shape[1])

    def only(self, replica: int) -> FailureStream:
        """One replica's failures."""
        columns = slice(replica, replica + 1)
        return FailureStream(*(getattr(self, name)[:, columns] for name in self.__dataclass_fields__))


def draw(scenario: Scenario, replicas: int, seed: np.random.SeedSequence) -> FailureStream:
    """Draw the failures of so many replicas until the scenario's horizon."""
    rng = np.random.default_rng(seed)
    bounds = np.linspace(0.0, scenario.horizon_s, _BINS + 1)
    bounds = np.unique(np.concatenate([bounds, scenario.capacity.times_s[scenario.capacity.times_s < bounds[-1]]]))
    cumulative = expected(scenario, bounds)
    total = cumulative.sum(axis=0)
    mean = float(total[-1])
    rows = int(mean + 6.0 * np.sqrt(mean) + 8)
    hazard = rng.standard_exponential((rows, replicas))
    np.cumsum(hazard, axis=0, out=hazard)
    if np.ptp(np.diff(total) / np.diff(bounds)) <= 1e-9 * mean / scenario.horizon_s:
        time_s = hazard * (scenario.horizon_s / mean) if mean else np.full(hazard.shape, np.inf)
    else:
        time_s = np.interp(hazard, total, bounds, right=np.inf)
    time_s[time_s >= scenario.horizon_s] = np.inf
    shape = time_s.shape
    cause = _which(rng, scenario, time_s, bounds, cumulative)
    table = scenario.cause_table
    unit = rng.random(shape, np.float32)
    repair_s = np.where(unit < table["repair_fraction"][cause], table["repair_s"][cause], np.float32(0))
    repair_s *= rng.standard_exponential(shape, np.float32)
    # What is left of the same number, once it is known that the node is repaired, is uniform again.
    again = unit / np.maximum(table["repair_fraction"][cause], np.float32(1e-9))
    lemon = (repair_s > 0) & (again < scenario.lemon_fraction) & (table["nodes"][cause] == 1)
    relapse_s = np.where(
        lemon, np.float32(scenario.lemon_after_s) * rng.standard_exponential(shape, np.float32), np.inf
    )
    outage_s = table["outage_s"][cause] * rng.standard_exponential(shape, np.float32)
    waits = rng.random(shape, np.float32) < scenario.manual_fraction
    outage_s[waits] += np.float32(scenario.manual_s) * rng.standard_exponential(int(waits.sum()), np.float32)
    spread = np.float32(np.sqrt(np.log1p(scenario.restart_spread**2)))
    restart = np.exp(spread * rng.standard_normal(shape, np.float32) - spread**2 / 2)
    foreseen = table["foreseeable"][cause]
    if scenario.foreseen_fraction:
        foreseen = foreseen & (rng.random(shape, np.float32) < scenario.foreseen_fraction)
    else:
        foreseen = np.zeros(shape, bool)
    return FailureStream(
        time_s=time_s,
        cause=cause,
        detect_s=table["detect_s"][cause] * rng.standard_exponential(shape, np.float32),
        repair_s=repair_s,
        relapse_s=relapse_s.astype(np.float32),
        outage_s=outage_s,
        restart=restart,
        lot=rng.random(shape, np.float32),
        foreseen=foreseen,
    )


def _which(
    rng: np.random.Generator, scenario: Scenario, time_s: Floats, bounds: Floats, cumulative: Floats
) -> npt.NDArray[np.int16]:
    """Choose each failure's cause, by the causes' shares of the rate at its time."""
    number = len(scenario.causes)
    unit = rng.random(time_s.shape)
    if number == 0:
        return np.zeros(time_s.shape, np.int16)
    rates = np.diff(cumulative, axis=1)
    shares = np.cumsum(rates, axis=0) / np.maximum(rates.sum(axis=0), 1e-300)
    shares[-1] = 1.0
    if all(cause.shape == 1.0 for cause in scenario.causes):
        return np.searchsorted(shares[:, 0], unit, side="right").clip(0, number - 1).astype(np.int16)
    # One sorted list for all steps of time: step + share.
    step = np.searchsorted(bounds, time_s, side="right") - 1
    np.clip(step, 0, rates.shape[1] - 1, out=step)
    keys = (np.arange(rates.shape[1]) + shares).T.ravel()
    found = np.searchsorted(keys, step + unit, side="right") - step * number
    return found.clip(0, number - 1).astype(np.int16)
