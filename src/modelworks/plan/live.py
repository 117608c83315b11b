"""A plan that answers while a slider moves: the best of a thinned space of layouts, and what more devices would buy.

Two ideas. The choices that rarely decide are left at their usual values (state sharded over all replicas, powers of
two as degrees), which leaves some thousands of layouts of the millions that `planner.plan` searches; what is found is
feasible and near the best, and often it. And other numbers of devices are tried with the layouts found, with more or
fewer replicas of each, all in one evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from modelworks.plan.block import Setting
from modelworks.plan.cost import Cost, run_cost
from modelworks.plan.layout import IntArray, Layouts, joined
from modelworks.plan.planner import Candidate, Point, candidate, setting_for, software_name, software_spec, space_for
from modelworks.plan.search import GROUP, Space, candidates, pareto
from modelworks.plan.step import Evaluation, evaluate
from modelworks.spec.files import device_spec
from modelworks.spec.hardware import DeviceSpec
from modelworks.spec.run import RunSpec

_DEGREES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LEAST_PART = 2048
"""Tokens of a sequence that context parallelism leaves to a device at least."""
_SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)
"""How many times as many replicas are tried."""
_MOST_DEVICES = 1_000_000
_SCALED = 160
"""Layouts of which other numbers of replicas are tried, fastest first."""


@dataclass(frozen=True)
class Quick:
    """The answer to a run, without what takes long to find."""

    run: RunSpec
    setting: Setting
    tried: int
    """Layouts that were evaluated."""
    distinct: Evaluation
    """The best of each distinct layout that fits, fastest first."""
    leanest: Candidate | None
    """The layout that needs least memory, if any divides model, batch and devices."""

    @property
    def device(self) -> DeviceSpec:
        """What it runs on."""
        return self.setting.device

    @property
    def best(self) -> Candidate | None:
        """The fastest layout that fits, if one does."""
        return candidate(self.distinct, 0) if len(self.distinct.layouts) else None

    def seconds(self, step: float) -> float:
        """How long the whole run takes at so many seconds a step."""
        return self.run.train.steps * step

    def cost(self, devices: int, step: float) -> Cost:
        """What the whole run costs on so many devices."""
        return run_cost(self.run.cluster, self.device, devices, self.seconds(step))


def quick(run: RunSpec) -> Quick:
    """Find a layout for a run among a thinned space; what the run's spec states is kept.

    Raises
    ------
    InputError
        If the device doesn't know the precision.
    """
    device = device_spec(run.cluster.device)
    software = software_spec(software_name(run, device))
    setting = setting_for(run.model, run.train.seq_len, run.cluster, device, software)
    every = candidates(setting, run.train.global_batch, _thinned(space_for(run, setting), run))
    layouts = every.at(np.arange(len(every)))
    if run.parallel.zero_stage == "auto" and (layouts.zero_stage < 3).any():
        layouts = layouts.take((layouts.zero_stage < 3) | (layouts.pipeline == 1))
    if run.parallel.expert_tensor == "auto":
        layouts = layouts.take((layouts.expert_tensor == 1) | (layouts.expert_tensor == layouts.tensor))
    evaluation = evaluate(setting, run.train.global_batch, layouts)
    order = np.argsort(evaluation.step_time_s, kind="stable")
    order = order[evaluation.fits[order]]
    leanest = candidate(evaluation, int(np.argmin(evaluation.memory_bytes))) if len(layouts) else None
    return Quick(run, setting, len(layouts), _rows(evaluation, order[_first(layouts.take(order))]), leanest)


def sizes(found: Quick) -> tuple[list[Point], list[Point]]:
    """The best layouts found for other numbers of devices, fewest first: those not beaten in time, cost and devices
    at once, and the others."""
    chosen = found.distinct.layouts.take(np.arange(min(_SCALED, len(found.distinct.layouts))))
    scaled = joined([_with_replicas(chosen, scale) for scale in _SCALES])
    devices, node = scaled.devices, found.run.cluster.gpus_per_node
    evaluation = evaluate(found.setting, found.run.train.global_batch, scaled)
    order = np.argsort(evaluation.step_time_s, kind="stable")
    whole = (devices % node == 0) | (devices <= node)
    order = order[(evaluation.fits & whole & (devices <= _MOST_DEVICES))[order]]
    best = order[np.unique(devices[order], return_index=True)[1]]
    points, spent = [], []
    for index in best:
        one, count = candidate(evaluation, int(index)), int(devices[index])
        cost = found.cost(count, one.step_time_s)
        usd = cost.rent_usd or cost.owned_usd
        points.append(Point(count, found.seconds(one.step_time_s) / 86400.0, usd, one))
        spent.append(usd or cost.device_hours)
    front = pareto(evaluation.step_time_s[best], np.array(spent), devices[best].astype(np.float64))
    kept = list(zip(points, front.tolist(), strict=True))
    return [point for point, on_front in kept if on_front], [point for point, on_front in kept if not on_front]


def _thinned(space: Space, run: RunSpec) -> Space:
    """A space with the choices that its run leaves open brought down to the usual ones."""
    model, seq_len = run.model, run.train.seq_len
    stages = {p for p in range(1, 33) if model.layers % p == 0} | {2, 4, 8, 16}
    if space.most_devices & (space.most_devices - 1):
        stages |= {3, 6, 12, 24}
    usual: dict[str, tuple[int | float, ...]] = {
        "tensor": (1, 2, 4, 8),
        "pipeline": tuple(sorted(p for p in stages if p <= model.layers)),
        "context": tuple(c for c in (1, 2, 4, 8, 16) if c == 1 or c <= seq_len // _LEAST_PART),
        "micro_batch": (1, 2, 4),
        "virtual_stages": (1, 2, 4, 8),
        "schedule": (0, 1),
        "recompute": (0, 1, 3),
        "recompute_share": (1.0,),
        "zero_stage": (1, 3),
        "sequence_parallel": (True,),
        "shards": (10**9,),
    }
    if model.moe is not None:
        most = model.moe.experts
        usual["expert"] = tuple(sorted(e for e in {*_DEGREES, most} if most // 32 <= e <= most))
    return replace(space, accepted=usual | dict(space.accepted))


def _first(layouts: Layouts) -> IntArray:
    """Positions of the first of each distinct layout, in their order."""
    key = np.zeros(len(layouts), dtype=np.int64)
    for name in (*GROUP, "data"):
        values, positions = np.unique(getattr(layouts, name), return_inverse=True)
        key = key * max(1, len(values)) + positions
    found: IntArray = np.sort(np.unique(key, return_index=True)[1])
    return found


def _rows(evaluation: Evaluation, which: IntArray) -> Evaluation:
    return Evaluation(
        layouts=evaluation.layouts.take(which),
        step_time_s=evaluation.step_time_s[which],
        reasons=evaluation.reasons[:, which],
        memory=evaluation.memory[:, which],
        fits=evaluation.fits[which],
        mfu=evaluation.mfu[which],
        tokens_per_s=evaluation.tokens_per_s[which],
    )


def _with_replicas(layouts: Layouts, scale: float) -> Layouts:
    """The layouts that stay whole with so many times as many replicas."""
    data = layouts.data * scale
    kept = layouts.take(data == np.floor(data))
    data = np.round(kept.data * scale).astype(np.int64)
    return kept.with_(data=data, shards=np.where(kept.zero_stage > 0, data * kept.context, kept.shards))
