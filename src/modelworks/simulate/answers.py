"""The answers that a simulation gives: how much of the time counts, what stops the run, what that costs.

`answer` runs the Monte Carlo engine and sums its books up; the keys of `Answer.as_dict` are a contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from modelworks.simulate.buildout import DAY_S
from modelworks.simulate.closed_form import daly_s, repair_wait_s, young_s
from modelworks.simulate.failures import causes, draw
from modelworks.simulate.machine import Machine, components, gpus_for_budget, machine, network
from modelworks.simulate.montecarlo import follow, simulate
from modelworks.simulate.outcome import REASONS, Floats, Outcome
from modelworks.simulate.scenario import Scenario, scenario
from modelworks.spec.errors import InputError
from modelworks.spec.facts import failures
from modelworks.spec.run import RunSpec
from modelworks.spec.simulation import MOST_GPUS

SIZES = (1, 2, 4, 10)
"""Times the cluster for which the mean time to failure is told."""
_SEARCH_REPLICAS, _SEARCH_FAILURES, _SEARCH_POINTS = 48, 150, 13


@dataclass(frozen=True)
class Answer:
    """What was found out about a run."""

    scenario: Scenario
    outcome: Outcome
    seed: int
    best_interval_s: float | None
    young_daly_s: float | None

    @property
    def samples(self) -> int:
        """Replicas that were simulated."""
        return len(self.outcome.elapsed_s)

    @cached_property
    def machine(self) -> Machine:
        """The bill of materials, spare nodes included."""
        s = self.scenario
        cluster = s.run.cluster
        gpus = cluster.gpus + (s.hot + s.pool) * cluster.gpus_per_node
        return machine(cluster.model_copy(update={"gpus": gpus}), s.run.simulate.parts, s.run.simulate.prices)

    @property
    def lost_s(self) -> Floats:
        """(R,) Time that doesn't count, of as much of the machine as was there."""
        return self.outcome.there_s - self.outcome.useful_s

    def gpu_hours(self, seconds: float) -> float:
        """So much time of all the job's GPUs."""
        return seconds * self.scenario.run.cluster.gpus / 3600.0

    @property
    def cause_names(self) -> list[str]:
        """The causes, in the order of the books."""
        return [cause.name for cause in self.scenario.causes]

    @cached_property
    def days_to_finish(self) -> dict[str, float] | None:
        """Days until the tokens are done, by quantile; those that weren't within the horizon are missing."""
        days = np.where(self.outcome.finished, self.outcome.elapsed_s / DAY_S, math.inf)
        found = {f"p{q}": float(np.quantile(days, q / 100, method="inverted_cdf")) for q in (10, 50, 90)}
        found = {name: value for name, value in found.items() if value < math.inf}
        return found or None

    @cached_property
    def goodput(self) -> list[tuple[str, float]]:
        """From peak FLOPs to useful tokens: (what is left after this, share of the peak)."""
        work, out = self.scenario.work, self.outcome
        elapsed = float(out.elapsed_s.sum())
        left = work.mfu * work.slowest_rank
        steps = [("peak FLOPs", 1.0), ("model FLOPs of a step (MFU)", left), ("slowest rank", work.mfu)]
        lost = out.reasons_s.sum(axis=0) / elapsed * work.mfu
        left = work.mfu
        for reason, share in sorted(zip(REASONS, lost, strict=True), key=lambda item: -item[1]):
            left -= float(share)
            if share > 0:
                steps.append((reason, left))
        return steps

    @cached_property
    def spares(self) -> dict[str, float]:
        """Nodes out of service right after a loss: how many spares cover so many of the losses."""
        counts = self.outcome.nodes_out
        if not counts.sum():
            return {"p50": 0, "p99": 0, "p999": 0}
        share = np.cumsum(counts) / counts.sum()
        return {name: int(np.searchsorted(share, q)) for name, q in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))}

    def mttf_hours(self, times: int = 1) -> float | None:
        """Mean time to an unexpected interruption of a cluster so many times as large; None if nothing fails."""
        s = self.scenario
        if times == 1:
            return s.mttf_s / 3600.0 if s.per_s else None
        cluster = s.run.cluster
        if cluster.gpus * times > MOST_GPUS or (cluster.network is None and cluster.nodes * times > 1):
            return None
        larger = cluster.model_copy(update={"gpus": cluster.gpus * times})
        parts = s.machine.parts
        try:
            counts = components(larger, parts, network(larger, parts))
        except InputError:
            return None
        simulate_spec = s.run.simulate
        found = causes(failures(simulate_spec.failures), simulate_spec, counts, s.machine.nodes_per_scope, parts)
        per_s = sum(cause.per_s for cause in found if cause.facts.kind != "straggler")
        return 1.0 / per_s / 3600.0 if per_s else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the keys are a contract."""
        s, out, run = self.scenario, self.outcome, self.scenario.run
        built, cost = self.machine, self.machine.cost
        counts = out.interruptions.sum(axis=1)
        lost_hours = self.gpu_hours(float(self.lost_s.mean()))
        useful_tokens = out.useful_s / s.work.step_time_s * s.work.tokens_per_step
        wait_s = repair_wait_s(s.technicians, *self._repairs())
        found: dict[str, Any] = {
            "name": run.name,
            "cluster": run.cluster.name,
            "device": run.cluster.device,
            "gpus": run.cluster.gpus,
            "days": float(out.elapsed_s.mean() / DAY_S),
            "samples": self.samples,
            "seed": self.seed,
            "interruptions": _spread(counts)
            | {"by_cause": dict(zip(self.cause_names, out.interruptions.mean(axis=0).tolist(), strict=True))},
            "planned_interruptions": float(out.planned.mean()),
            "drains": float(out.drains.sum(axis=1).mean()),
            "undetected_corruptions": self._undetected(),
            "ettr": _spread(out.ettr),
            "mttf_hours": self.mttf_hours(),
            "mttf_hours_at": {f"{times}x": self.mttf_hours(times) for times in SIZES},
            "lost_gpu_hours": lost_hours,
            "lost_gpu_hours_by_reason": {
                reason: self.gpu_hours(value) for reason, value in zip(REASONS, out.reasons_s.mean(axis=0), strict=True)
            },
            "lost_gpu_hours_by_cause": {
                name: self.gpu_hours(value)
                for name, value in zip(self.cause_names, out.causes_s.mean(axis=0), strict=True)
            },
            "lost_usd": lost_hours * cost.usd_per_gpu_hour,
            "checkpoint": {
                "every_s": s.checkpoints.every_s,
                "durable_every_s": s.checkpoints.every_s * s.checkpoints.ratio,
                "bytes": s.work.checkpoint_bytes,
                "stall_s": s.checkpoints.stall_s + s.checkpoints.durable_stall_s,
                "write_s": s.checkpoints.lag_s or s.checkpoints.durable_stall_s,
                "best_interval_s": self.best_interval_s,
                "young_daly_s": self.young_daly_s,
            },
            "days_to_finish": self.days_to_finish,
            "finished": float(out.finished.mean()),
            "gpu_hours": self.gpu_hours(float(out.there_s.mean())),
            "step_time_s": s.work.step_time_s,
            "mfu": s.work.mfu,
            "tokens_per_day": s.work.tokens_per_s * float(out.ettr.mean()) * DAY_S,
            "useful_tokens": float(useful_tokens.mean()),
            "goodput": [{"after": name, "share": share} for name, share in self.goodput],
            "spares": {"hot": s.hot, "pool": s.pool, "nodes_out": self.spares},
            "repair": {"technicians": s.technicians, "wait_hours": wait_s / 3600.0 if wait_s < math.inf else None},
            "machine": built.as_dict(),
            "usd_per_million_tokens": self._usd_per_million_tokens(),
        }
        if run.simulate.target_gpu_hours:
            found["target_gpu_hours"] = run.simulate.target_gpu_hours
        if run.simulate.budget_usd:
            found["budget"] = self.budget()
        return found

    def budget(self) -> dict[str, float]:
        """What the budget buys: GPUs with and without the building around them."""
        spec, cluster = self.scenario.run.simulate, self.scenario.run.cluster
        assert spec.budget_usd is not None
        return {
            "usd": spec.budget_usd,
            "gpus": gpus_for_budget(cluster, spec.budget_usd, spec.parts, spec.prices),
            "gpus_without_building": gpus_for_budget(cluster, spec.budget_usd, spec.parts, spec.prices, building=False),
        }

    def _usd_per_million_tokens(self) -> float | None:
        tokens = self.scenario.work.tokens_per_s * float(self.outcome.ettr.mean()) * 365 * DAY_S
        return self.machine.cost.usd_per_year / tokens * 1e6 if tokens else None

    def _repairs(self) -> tuple[float, float]:
        """Repairs per second and their mean duration, by the rates."""
        rates = [c.per_s * c.facts.repair_fraction if c.nodes else 0.0 for c in self.scenario.causes]
        total = sum(rates)
        if not total:
            return 0.0, 0.0
        each = [rate * c.repair_s for rate, c in zip(rates, self.scenario.causes, strict=True)]
        return total, sum(each) / total

    def _undetected(self) -> float:
        """Silent corruptions that nobody finds, by the share that is found."""
        hidden = 0.0
        for cause, mean in zip(self.scenario.causes, self.outcome.interruptions.mean(axis=0), strict=True):
            hidden += float(mean) * cause.facts.undetected / (1.0 - cause.facts.undetected)
        return hidden


def answer(
    run: RunSpec,
    samples: int | None = None,
    seed: int | None = None,
    progress: Callable[[float], None] | None = None,
    search: bool = True,
) -> Answer:
    """Simulate a run.

    Parameters
    ----------
    samples, seed
        Instead of the run's own.
    progress
        Told the share that is done.
    search
        Whether the best checkpoint interval is looked for as well.

    Raises
    ------
    InputError
        If the scenario can't be, or can never progress.
    """
    resolved = scenario(run)
    samples = samples if samples is not None else run.simulate.samples
    seed = seed if seed is not None else run.simulate.seed
    if samples < 1 or seed < 0:
        raise InputError(f"--samples {samples} and --seed {seed} are not accepted: at least 1 and 0 are")
    outcome = simulate(resolved, samples, seed, progress)
    plan = resolved.checkpoints
    cost_s, mttf_s = plan.stall_s + plan.durable_stall_s, resolved.mttf_s
    best = best_interval_s(resolved, seed) if search else None
    theirs = daly_s(cost_s, mttf_s) if cost_s and mttf_s < math.inf else None
    return Answer(resolved, outcome, seed, best, theirs)


def best_interval_s(resolved: Scenario, seed: int) -> float | None:
    """The time between checkpoints with the largest ETTR, found by simulation. None if nothing fails.

    Thirteen intervals around Young's, in equal ratios, meet the same failures; a parabola through the best and its
    neighbours gives the answer. Not shorter than a checkpoint can be written; of two levels, it is the one in memory.
    """
    plan, mttf_s = resolved.checkpoints, resolved.mttf_s
    if mttf_s == math.inf:
        return None
    shortest = 1.0 if plan.fast else max(plan.lag_s, 1.0)
    middle = max(young_s(max(plan.stall_s + plan.durable_stall_s, 1e-2), mttf_s), shortest)
    low, high = max(middle / 6.0, shortest), min(middle * 6.0, 4.0 * mttf_s)
    if high <= low:
        return low
    trial = resolved.steady(_SEARCH_FAILURES)
    stream = draw(trial, _SEARCH_REPLICAS, np.random.SeedSequence([seed, 1]))
    intervals = np.geomspace(low, high, _SEARCH_POINTS)
    ratios = np.array([follow(trial.with_interval(float(each)), stream).ettr.mean() for each in intervals])
    top = int(ratios.argmax())
    if top in {0, len(intervals) - 1}:
        return float(intervals[top])
    bend = np.polyfit(np.log(intervals[top - 1 : top + 2]), ratios[top - 1 : top + 2], 2)
    return float(np.exp(-bend[1] / (2 * bend[0])))


def _spread(values: Any) -> dict[str, float]:
    p5, p95 = np.percentile(values, [5, 95])
    return {"mean": float(np.mean(values)), "p5": float(p5), "p95": float(p95)}
