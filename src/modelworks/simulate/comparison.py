"""Machines compared over the calendar: what each has trained by when, which overtakes which, what a run costs on each.

Each is simulated as it stands when it is finished, which gives its ETTR; the build-out then says how much of it there
is on which day.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modelworks.simulate.answers import answer
from modelworks.simulate.buildout import Candidate, capacity, overtakes
from modelworks.simulate.scenario import scenario
from modelworks.spec.run import RunSpec
from modelworks.spec.simulation import AlternativeSpec, BatchSpec

_STEADY_DAYS = 30.0
_STEADY_SAMPLES = 100
_FIRST_DAY = datetime.date(2024, 7, 1)
"""Where no date is given."""


@dataclass(frozen=True)
class Comparison:
    """The machines and what is known of each."""

    tokens: int
    """The budget that each is to train."""
    candidates: list[Candidate]
    ettrs: list[float]
    nodes: list[int]
    gpus: list[int]
    overtakings: list[tuple[str, str, datetime.date]]
    """(this one, that one, the date on which this one has trained more)."""

    @property
    def first(self) -> Candidate:
        """The one that finishes first."""
        return min(self.candidates, key=lambda each: each.finish(self.tokens))

    @property
    def cheapest(self) -> Candidate:
        """The one on which the budget's tokens cost least."""
        return min(self.candidates, key=self.usd)

    def usd(self, candidate: Candidate) -> float:
        """What the run costs: write-off, energy and upkeep until it is done."""
        return candidate.usd_until(candidate.finish(self.tokens))

    def dates(self, points: int = 60) -> list[datetime.date]:
        """Dates from the first machine's start to the last one's finish and a little on."""
        start = min(each.start for each in self.candidates)
        end = max(each.finish(self.tokens) for each in self.candidates).date()
        days = max(points, math.ceil((end - start).days * 1.2))
        return [start + datetime.timedelta(days=round(days * point / points)) for point in range(points + 1)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        dates = self.dates()
        rows = [
            {
                "name": each.name,
                "gpus": gpus,
                "start": each.start.isoformat(),
                "ettr": ettr,
                "tokens_per_day": each.tokens_per_s * 86400,
                "finish": each.finish(self.tokens).date().isoformat(),
                "usd": self.usd(each),
                "capital_usd": each.capital_usd,
                "usd_per_million_tokens": self.usd(each) / self.tokens * 1e6,
                "joules_per_token": each.joules_per_token(),
                "tokens_over_time": each.tokens(dates).tolist(),
                "flop_over_time": each.flop(dates).tolist(),
            }
            for each, ettr, gpus in zip(self.candidates, self.ettrs, self.gpus, strict=True)
        ]
        return {
            "tokens": self.tokens,
            "dates": [date.isoformat() for date in dates],
            "machines": rows,
            "overtakes": [{"who": who, "whom": whom, "on": on.isoformat()} for who, whom, on in self.overtakings],
            "first": self.first.name,
            "cheapest": self.cheapest.name,
        }


def alternative(run: RunSpec, other: AlternativeSpec) -> RunSpec:
    """The same run on another machine."""
    cluster, spec = run.cluster, run.simulate
    per_node = other.gpus_per_node or cluster.gpus_per_node
    changed: dict[str, Any] = {
        "name": other.name,
        "preset": None,
        "device": other.device,
        "gpus": other.gpus,
        "gpus_per_node": per_node,
        "scale_up_domain": other.scale_up_domain or cluster.scale_up_domain,
    }
    if other.node_overhead_w is not None:
        changed["node_overhead_w"] = other.node_overhead_w
    values = cluster.model_dump() | changed
    if cluster.network is not None:
        nics = max(1, cluster.network.nics_per_node * per_node // cluster.gpus_per_node)
        values["network"] = cluster.network.model_dump() | {"nics_per_node": nics}
    simulated = spec.model_copy(
        update={
            "batches": other.batches,
            "power": other.power,
            "start": other.start or spec.start,
            "mfu": other.mfu or spec.mfu,
            "step_time": None if (other.device, other.gpus) != (cluster.device, cluster.gpus) else spec.step_time,
            "alternatives": [],
        }
    )
    train = run.train.model_copy(update={"precision": other.precision} if other.precision else {})
    changed_cluster = type(cluster).model_validate(values)
    return run.model_copy(update={"cluster": changed_cluster, "simulate": simulated, "train": train})


def compare(
    run: RunSpec, others: Sequence[RunSpec] = (), progress: Callable[[float], None] | None = None
) -> Comparison:
    """Compare a run's machine with its alternatives and with those of other runs, for this run's tokens."""
    named = [(run.cluster.name, run)]
    named += [(other.name, alternative(run, other)) for other in run.simulate.alternatives]
    named += [(other.name, other) for other in others]
    candidates, ettrs = [], []
    for number, (name, each) in enumerate(named):
        candidate, ettr = _candidate(name, each)
        candidates.append(candidate)
        ettrs.append(ettr)
        if progress is not None:
            progress((number + 1) / len(named))
    passed = []
    for one in candidates:
        for other in candidates:
            on = overtakes(one, other) if one is not other else None
            if on is not None:
                passed.append((one.name, other.name, on))
    return Comparison(
        tokens=run.train.tokens,
        candidates=candidates,
        ettrs=ettrs,
        nodes=[each.cluster.nodes for _, each in named],
        gpus=[each.cluster.gpus for _, each in named],
        overtakings=sorted(passed, key=lambda item: item[2]),
    )


def _candidate(name: str, run: RunSpec) -> tuple[Candidate, float]:
    spec = run.simulate
    finished = spec.model_copy(update={"batches": [], "power": [], "days": _STEADY_DAYS})
    endless = run.train.model_copy(update={"tokens": 10**18})
    steady = run.model_copy(update={"simulate": finished, "train": endless})
    found = answer(steady, min(_STEADY_SAMPLES, spec.samples), search=False)
    ettr = float(found.outcome.ettr.mean())
    resolved, built = scenario(steady), found.machine
    nodes = run.cluster.nodes
    batches = spec.batches or [BatchSpec(day=0.0, gpus=run.cluster.gpus)]
    steps = capacity(nodes, run.cluster.gpus_per_node, batches, spec.power, resolved.machine.power.total_w / nodes)
    tokens_per_s = resolved.work.tokens_per_s * ettr * float(steps.nodes[-1]) / nodes
    return (
        Candidate(
            name=name,
            start=spec.start or _FIRST_DAY,
            capacity=steps,
            tokens_per_s=tokens_per_s,
            flops=tokens_per_s * resolved.work.flop_per_token,
            power_w=built.power.total_w,
            usd_per_year=built.cost.usd_per_year,
            capital_usd=built.cost.capital_usd,
        ),
        ettr,
    )
