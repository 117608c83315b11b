"""A run spec as numbers: all that the engines need, resolved, checked, and free of presets and files.

`scenario` is the one place where a spec, the catalog and the machine's bill of materials meet; behind it there are only
arrays and seconds. A scenario that can't be simulated is refused here, in a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from modelworks.simulate.buildout import DAY_S, Capacity, capacity
from modelworks.simulate.closed_form import effective_time_ratio
from modelworks.simulate.failures import Cause, causes
from modelworks.simulate.machine import Machine, machine
from modelworks.simulate.recovery import Checkpoints, checkpoints, group_nodes, restart_s
from modelworks.simulate.workload import Workload, duration_at_full_speed_s, workload
from modelworks.spec import facts
from modelworks.spec.errors import InputError
from modelworks.spec.run import RunSpec

LONGEST_DAYS = 3650.0
LEAST_RATIO = 1e-3
"""Below this share of useful time a run is said not to progress."""
MOST_FAILURES = 20_000_000
"""Failures of one replica that are still simulated."""


@dataclass(frozen=True)
class Scenario:
    """What both engines simulate. Times in seconds, work in seconds of the finished machine at full speed."""

    run: RunSpec
    machine: Machine
    work: Workload
    causes: tuple[Cause, ...]
    nodes: int
    """The job's nodes when the machine is finished."""
    capacity: Capacity
    horizon_s: float
    target_s: float
    """Work to be done; infinite if only the days count."""
    checkpoints: Checkpoints
    restart_s: float
    drain_s: float
    swap_s: float
    replace_s: float
    restart_spread: float
    manual_fraction: float
    manual_s: float
    hot: int
    pool: int
    technicians: int
    burn_in_s: float
    lemon_fraction: float
    lemon_after_s: float
    maintenance_every_s: float
    """Infinite for none."""
    maintenance_s: float
    check_share: float
    """Share of the running time that health checks take."""
    foreseen_fraction: float
    elastic: bool
    group_nodes: int
    least_nodes: int
    resize_s: float
    age_s: float
    observed_age_s: float

    @property
    def per_s(self) -> float:
        """Failures per second of the finished machine, of what stops the job at once."""
        return sum(cause.per_s for cause in self.causes if cause.facts.kind != "straggler")

    @property
    def mttf_s(self) -> float:
        """Mean time to an unexpected interruption of the finished machine; infinite if nothing fails."""
        return 1.0 / self.per_s if self.per_s else math.inf

    @cached_property
    def cause_table(self) -> dict[str, npt.NDArray[Any]]:
        """The causes' properties as arrays, to be indexed by a failure's cause."""
        survives = set(self.run.simulate.state.peer_survives)
        rows = self.causes or (None,)

        def column(read: Any, kind: Any = np.float32) -> npt.NDArray[Any]:
            return np.array([read(cause) if cause else 0 for cause in rows], dtype=kind)

        return {
            "detect_s": column(lambda c: c.detect_s),
            "repair_s": column(lambda c: c.repair_s),
            "repair_fraction": column(lambda c: c.facts.repair_fraction if c.nodes else 0.0),
            "outage_s": column(lambda c: c.facts.outage_s),
            "slowdown": column(lambda c: c.facts.slowdown, np.float64),
            "nodes": column(lambda c: c.nodes, np.int64),
            "foreseeable": column(lambda c: c.facts.foreseeable, bool),
            "silent": column(lambda c: c.facts.kind == "silent", bool),
            "straggler": column(lambda c: c.facts.kind == "straggler", bool),
            "survives": column(lambda c: c.facts.scope in survives, bool),
            "elastic": column(lambda c: c.facts.scope in {"node", "rack", "leaf"}, bool),
        }

    def steady(self, failures: float) -> Scenario:
        """The finished machine on an endless run, until so many failures are expected; for questions of practice."""
        built = Capacity(np.zeros(1), self.capacity.nodes[-1:])
        horizon_s = min(self.horizon_s, failures * self.mttf_s)
        return replace(self, capacity=built, horizon_s=horizon_s, target_s=math.inf)

    def with_interval(self, every_s: float) -> Scenario:
        """The same with other time between checkpoints; between those in memory where there are such."""
        if self.checkpoints.fast:
            ratio = max(1, round(self.checkpoints.ratio * self.checkpoints.every_s / every_s))
            return replace(self, checkpoints=replace(self.checkpoints, every_s=every_s, ratio=ratio))
        plan = checkpoints(
            self.run, self.work.checkpoint_bytes, self.work.step_time_s, self.machine.parts, every_s=every_s
        )
        return replace(self, checkpoints=plan)


def scenario(run: RunSpec) -> Scenario:
    """Resolve a run spec.

    Raises
    ------
    InputError
        If the scenario can't be, or can never progress.
    """
    spec = run.simulate
    facts_of_failures = facts.failures(spec.failures)
    built = machine(run.cluster, spec.parts, spec.prices)
    work = workload(run)
    nodes = run.cluster.nodes
    hot, pool = _spares(run)
    found = causes(facts_of_failures, spec, built.counts, built.nodes_per_scope, built.parts)
    plan = checkpoints(run, work.checkpoint_bytes, work.step_time_s, built.parts)
    steps = capacity(nodes, run.cluster.gpus_per_node, spec.batches, spec.power, built.power.total_w / nodes)
    restart = restart_s(run, run.cluster.gpus)
    per_s = sum(cause.per_s for cause in found)
    lost_s = restart + plan.read_s + spec.restart.drain + plan.every_s
    horizon_s, target_s = _horizon(run, work, steps, min(0.8, per_s * lost_s))
    checks = spec.health_checks
    resolved = Scenario(
        run=run,
        machine=built,
        work=work,
        causes=found,
        nodes=nodes,
        capacity=steps,
        horizon_s=horizon_s,
        target_s=target_s,
        checkpoints=plan,
        restart_s=restart,
        drain_s=spec.restart.drain,
        swap_s=spec.restart.swap,
        replace_s=spec.restart.replace,
        restart_spread=spec.restart.spread,
        manual_fraction=spec.restart.manual_fraction,
        manual_s=spec.restart.manual,
        hot=hot,
        pool=pool,
        technicians=spec.repair.technicians or max(4, math.ceil(nodes / 250)),
        burn_in_s=spec.repair.burn_in,
        lemon_fraction=spec.repair.lemon_fraction,
        lemon_after_s=spec.repair.lemon_after,
        maintenance_every_s=spec.maintenance.every or math.inf,
        maintenance_s=spec.maintenance.duration,
        check_share=checks.duration / (checks.every + checks.duration) if checks.every else 0.0,
        foreseen_fraction=checks.coverage if checks.every else 0.0,
        elastic=spec.elastic.enabled,
        group_nodes=group_nodes(run) if spec.elastic.enabled else 1,
        least_nodes=math.ceil(spec.elastic.least * nodes),
        resize_s=spec.elastic.resize,
        age_s=(spec.age if spec.age is not None else facts_of_failures.observation.age_days) * DAY_S,
        observed_age_s=facts_of_failures.observation.age_days * DAY_S,
    )
    _can_progress(resolved)
    return resolved


def _spares(run: RunSpec) -> tuple[int, int]:
    spares, nodes = run.simulate.spares, run.cluster.nodes
    hot = spares.hot if spares.hot is not None else math.ceil(nodes / 50)
    if hot + spares.pool > nodes:
        raise InputError(
            f"simulate.spares: hot = {hot} and pool = {spares.pool} are more than the job's {nodes} nodes; "
            "at most as many are accepted"
        )
    return hot, spares.pool


def _horizon(run: RunSpec, work: Workload, steps: Capacity, lost: float) -> tuple[float, float]:
    """How long is simulated, and the work to be done; `lost` is the share of time that failures will take, roughly."""
    full_s = duration_at_full_speed_s(work)
    if run.simulate.days is not None:
        if run.simulate.days > LONGEST_DAYS:
            raise InputError(f"simulate.days = {run.simulate.days:g} is not accepted: up to {LONGEST_DAYS:g} are")
        return run.simulate.days * DAY_S, full_s
    # Until the tokens are done, with room for bad luck; a replica that needs longer is given up.
    horizon_s = float(steps.times_s[-1]) + full_s * 1.5 / (1.0 - lost) + DAY_S
    if horizon_s > LONGEST_DAYS * DAY_S:
        raise InputError(
            f"train.tokens = {work.tokens:_} take {full_s / DAY_S:,.0f} days on this cluster without a failure; "
            f"give --days, or tokens for fewer than {LONGEST_DAYS / 2:,.0f} days"
        )
    return horizon_s, full_s


def _can_progress(resolved: Scenario) -> None:
    """Refuse what would fail faster than it restarts, and what would fail too often to be followed."""
    plan, mttf_s = resolved.checkpoints, resolved.mttf_s
    restart = resolved.restart_s + plan.read_s + resolved.drain_s
    if mttf_s < math.inf:
        exponent = (restart + plan.every_s + plan.stall_s + plan.durable_stall_s) / mttf_s
        ratio = 0.0
        if exponent < 500:
            ratio = effective_time_ratio(plan.every_s, plan.stall_s + plan.durable_stall_s, restart, mttf_s)
        if ratio < LEAST_RATIO and not resolved.elastic:
            raise InputError(
                f"the run can never progress: it fails every {mttf_s:.3g} s on average, and a restart with the way to "
                f"the next checkpoint takes {restart + plan.every_s:.3g} s; lower simulate.rate, checkpoint.every or "
                "the times of simulate.restart"
            )
    failures = resolved.per_s * resolved.horizon_s
    if failures > MOST_FAILURES:
        raise InputError(
            f"{failures:.3g} failures in {resolved.horizon_s / DAY_S:g} days are too many to follow one by one: "
            f"up to {MOST_FAILURES:.0e} are"
        )
