"""A plan: the layout that a run gets, what it takes, and what else was considered.

`setting_for` puts together what a step is evaluated on: model, device, its kernels, the network, the software's traits.
`plan` searches the layouts that a run's spec leaves open and sets out what the best one takes and why others lose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from modelworks.plan.block import Setting
from modelworks.plan.collectives import fabric
from modelworks.plan.cost import Cost, run_cost
from modelworks.plan.kernels import kernels_for
from modelworks.plan.layout import PRECISIONS, RECOMPUTE, SCHEDULES, Layouts
from modelworks.plan.local import measured_on, with_overheads
from modelworks.plan.memory import MEMORY, stages_memory
from modelworks.plan.pipeline import deal_layers
from modelworks.plan.search import GROUP, Found, Space, pareto, search
from modelworks.plan.step import REASONS, Evaluation, evaluate
from modelworks.spec import catalog
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import device_spec
from modelworks.spec.flops import (
    attention_flop_per_token,
    forward_flop_per_token,
    training_flop_per_token,
    vision_flop_per_sequence,
)
from modelworks.spec.hardware import ClusterSpec, DeviceSpec
from modelworks.spec.home import hardware_file
from modelworks.spec.model import ModelSpec, VisionSpec
from modelworks.spec.run import RunSpec, TrainSpec
from modelworks.spec.software import CalibrationSpec, SoftwareSpec

DEFAULT_SOFTWARE = "megatron-core"
"""Whose traits a plan for GPUs assumes if the run doesn't say."""

MOST_DEVICES = 524_288
"""What three levels of 128-port switches join (a fat tree of k-port switches joins k^3 / 4); larger networks are not
modelled."""


@dataclass(frozen=True)
class Candidate:
    """One layout and what it takes, as plain values."""

    layout: dict[str, Any]
    step_time_s: float
    tokens_per_s: float
    mfu: float
    reasons: dict[str, float]
    """Seconds of the step by reason; they add up to it."""
    memory: dict[str, float]
    """Bytes on a device of the fullest stage by component."""
    fits: bool

    @property
    def memory_bytes(self) -> float:
        """All of a device's memory."""
        return sum(self.memory.values())


def candidate(evaluation: Evaluation, index: int) -> Candidate:
    """One row of an evaluation."""
    return Candidate(
        layout=evaluation.layouts.row(index),
        step_time_s=float(evaluation.step_time_s[index]),
        tokens_per_s=float(evaluation.tokens_per_s[index]),
        mfu=float(evaluation.mfu[index]),
        reasons=dict(zip(REASONS, evaluation.reasons[:, index].tolist(), strict=True)),
        memory=dict(zip(MEMORY, evaluation.memory[:, index].tolist(), strict=True)),
        fits=bool(evaluation.fits[index]),
    )


def software_spec(name: str) -> SoftwareSpec:
    """A framework's traits by its catalog name, or by the path of a TOML file."""
    found = catalog.entry("software", name)
    return validate(SoftwareSpec, {"name": found.name} | found.values, where=f"software {name}")


def calibration_spec(name: str = "planner") -> CalibrationSpec:
    """The planner's global parameters."""
    return validate(CalibrationSpec, catalog.entry("calibration", name).values, where=f"calibration {name}")


def setting_for(
    model: ModelSpec,
    seq_len: int,
    cluster: ClusterSpec,
    device: DeviceSpec,
    software: SoftwareSpec,
    calibration: CalibrationSpec | None = None,
    train: TrainSpec | None = None,
) -> Setting:
    """What steps of a model on a cluster are evaluated on."""
    calibration = calibration or calibration_spec()
    if device.kind == "cpu":
        kernels = measured_on(device, cluster.gpus)
        software = with_overheads(software, device, cluster.gpus)
    else:
        kernels = kernels_for(device)
    network = fabric(cluster, kernels, calibration)
    optimizer, state = (train.optimizer, train.optimizer_state) if train else ("adamw", "fp32")
    moment_bytes = 2 if state == "bf16" else 4
    return Setting(model, seq_len, device, kernels, network, software, calibration, optimizer, moment_bytes)


# --- the plan of a run ------------------------------------------------------------------------------------------------

LOSSES = {
    "matmul": "matrix products below peak",
    "attention": "attention below peak",
    "memory": "streaming activations",
    "tensor": "tensor-parallel exchanges",
    "context": "context-parallel exchanges",
    "expert": "expert-parallel exchanges",
    "launch": "waiting for kernel launches",
    "vision": "the vision tower",
    "recompute": "recomputation",
    "bubble": "pipeline bubble",
    "pipeline": "sends between stages",
    "data": "exchanges over replicas",
    "optimizer": "optimizer",
    "host": "host work once a step",
    "jitter": "waiting for the slowest rank",
}
"""What each of a step's reasons costs, in words."""


@dataclass(frozen=True)
class Alternative:
    """A layout that lost, and why."""

    candidate: Candidate
    slower: float
    """By how much, as a fraction of the best step."""
    why: str


@dataclass(frozen=True)
class Loss:
    """One step of the waterfall from peak to achieved: a share of the peak, so that all of them and the MFU make 1."""

    reason: str
    words: str
    share: float


@dataclass(frozen=True)
class Point:
    """One point of the front of time, cost and devices."""

    devices: int
    days: float
    usd: float | None
    """Rented; None where no price is known."""
    candidate: Candidate


@dataclass(frozen=True)
class Sensitivity:
    """What a tenth more of one resource buys, as a fraction of the step's time."""

    resource: str
    same_layout: float
    """Saved with the layout as it is."""
    searched: float
    """Saved with the layout that is then the best."""
    layout: dict[str, Any]
    """That layout."""


@dataclass(frozen=True)
class Assumption:
    """A number that the plan stands on."""

    subject: str
    field: str
    value: str
    certainty: str
    source: str


@dataclass(frozen=True)
class Plan:
    """What a run takes, laid out as well as its spec allows."""

    name: str
    run: RunSpec
    """The run with every choice made: `train` takes it."""
    device: DeviceSpec
    software: SoftwareSpec
    devices: int
    """How many the best layout uses."""
    best: Candidate
    precision: str
    micro_batch: int
    micro_batches: int
    """Micro batches of one replica in a step."""
    steps: int
    flop_per_step: float
    """Model FLOPs; recomputation isn't counted."""
    step_time_s: float
    tokens_per_s: float
    mfu: float
    memory_bytes: float
    run_time_s: float
    """All steps; validation, checkpoints and failures are not counted."""
    waterfall: tuple[Loss, ...]
    memory_by_stage: dict[str, dict[str, float]]
    """Bytes on a device of the first, a middle and the last stage, by component."""
    cost: Cost
    alternatives: tuple[Alternative, ...]
    frontier: tuple[Point, ...]
    sensitivity: tuple[Sensitivity, ...]
    assumptions: tuple[Assumption, ...]
    notes: tuple[str, ...]
    evaluated: int
    """Layouts that were evaluated in full."""
    considered: int
    """Layouts that divide the model, the batch and the devices."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        plain = asdict(self)
        plain["run"] = self.run.model_dump(mode="json", exclude_none=True)
        plain["device"], plain["software"] = self.device.name, self.software.name
        plain["model"] = self.run.model.name
        plain["run_time_days"] = self.run_time_s / 86400.0
        plain["device_memory_bytes"] = self.device.memory_bytes
        plain["peak_flops"] = self.device.peak_flops[self.precision]  # type: ignore[index]
        return plain


def plan(run: RunSpec, *, wide: bool = False, top: int = 5, device: DeviceSpec | None = None) -> Plan:
    """The best layout of a run, what it takes, and why others lose.

    Parameters
    ----------
    run
        Choices that it states are kept; those that are `auto` are searched.
    wide
        Search everything that is feasible: other precisions (where it is `auto`), fewer devices than there are, what
        the framework doesn't do (schedules, recomputation, what is sharded, tensor without sequence parallelism), and
        virtual stages that leave the ends short of several layers.
    top
        How many other layouts to give reasons for.
    device
        Instead of the one that the run's cluster names.

    Raises
    ------
    InputError
        If no layout divides what it must or fits the memory: naming the choice that is in the way, or how much memory
        is missing and what would fit.
    """
    if run.cluster.gpus > MOST_DEVICES:
        raise InputError(
            f"cluster.gpus = {run.cluster.gpus} is not accepted: up to {MOST_DEVICES} are, what three levels of "
            "128-port switches join"
        )
    device = device or device_spec(run.cluster.device)
    software = software_spec(software_name(run, device))
    train, cluster = run.train, run.cluster
    setting = setting_for(run.model, train.seq_len, cluster, device, software, train=train)
    space = space_for(run, setting, wide)
    found = search(setting, train.global_batch, space)
    if not len(found.distinct.layouts):
        found = search(setting, train.global_batch, replace(space, least_devices=1))
    if not len(found.distinct.layouts):
        raise InputError(refusal(run, setting, space))
    evaluation = found.distinct
    best = candidate(evaluation, 0)
    layout, devices = best.layout, int(evaluation.layouts.devices[0])
    flop = training_flop_per_token(run.model, train.seq_len) * train.tokens_per_step
    run_time_s = train.steps * best.step_time_s
    return Plan(
        name=run.name,
        run=resolved(run, layout, devices, software.name),
        device=device,
        software=software,
        devices=devices,
        best=best,
        precision=layout["precision"],
        micro_batch=layout["micro_batch"],
        micro_batches=train.global_batch // (layout["data"] * layout["micro_batch"]),
        steps=train.steps,
        flop_per_step=flop,
        step_time_s=best.step_time_s,
        tokens_per_s=best.tokens_per_s,
        mfu=best.mfu,
        memory_bytes=best.memory_bytes,
        run_time_s=run_time_s,
        waterfall=waterfall(run.model, train.seq_len, best),
        memory_by_stage=memory_by_stage(setting, train.global_batch, evaluation.layouts.take(np.array([0]))),
        cost=run_cost(cluster, device, devices, run_time_s),
        alternatives=_alternatives(evaluation, top),
        frontier=_frontier(run, device, evaluation),
        sensitivity=_sensitivity(setting, cluster, train.global_batch, found, space.memory_limit),
        assumptions=_assumptions(run, device, software),
        notes=_notes(run, setting, devices, best),
        evaluated=found.evaluated,
        considered=len(found.candidates),
    )


def software_name(run: RunSpec, device: DeviceSpec) -> str:
    """The framework whose traits a run's plan assumes."""
    if run.software != "auto":
        return run.software
    return "modelworks" if device.kind == "cpu" else DEFAULT_SOFTWARE


def space_for(run: RunSpec, setting: Setting, wide: bool = False) -> Space:
    """The layouts that a run's spec leaves open."""
    parallel, train, cluster, device = run.parallel, run.train, run.cluster, setting.device
    accepted: dict[str, tuple[Any, ...]] = {}
    for name in (
        "data", "tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_stages", "zero_stage",
        "sequence_parallel", "recompute_share",
    ):  # fmt: skip
        if (value := getattr(parallel, name)) != "auto":
            accepted[name] = (value,)
    if parallel.shard != "auto":
        accepted["shards"] = (parallel.shard,)
    if parallel.recompute != "auto":
        accepted["recompute"] = (RECOMPUTE.index(parallel.recompute),)
    if parallel.schedule != "auto":
        accepted["schedule"] = (SCHEDULES.index(parallel.schedule),)
    if not wide:
        software = setting.software
        accepted.setdefault("sequence_parallel", (software.sequence_parallel,))
        accepted.setdefault("zero_stage", tuple(software.zero_stages))
        accepted.setdefault("schedule", tuple(SCHEDULES.index(name) for name in software.schedules))
        accepted.setdefault("recompute", tuple(RECOMPUTE.index(name) for name in software.recomputes))
    if train.micro_batch != "auto":
        accepted["micro_batch"] = (train.micro_batch,)
    accepted["precision"] = tuple(PRECISIONS.index(name) for name in precisions(run, device, wide))
    stated = all(getattr(parallel, name) != "auto" for name in ("data", "tensor", "pipeline", "context"))
    least = 1 if wide else cluster.gpus if stated else math.ceil(0.9 * cluster.gpus)
    return Space(
        most_devices=cluster.gpus,
        least_devices=least,
        devices_per_node=cluster.gpus_per_node,
        domain=cluster.scale_up_domain,
        island=setting.fabric.island,
        memory_limit=float(device.memory_bytes),
        uneven=wide,
        partial=(1, 2, 3) if wide else tuple(RECOMPUTE.index(name) for name in setting.software.partial_recomputes),
        accepted=accepted,
    )


def precisions(run: RunSpec, device: DeviceSpec, wide: bool = False) -> list[str]:
    """The precisions that a run may take on a device; `auto` is bf16 where that is faster than fp32, and fp8 beside it
    in a wide search."""
    rates, asked = device.peak_flops, run.train.precision
    if asked == "auto":
        chosen = ["bf16" if rates.get("bf16", 0.0) > rates.get("fp32", 0.0) else "fp32"]
        return [*chosen, "fp8"] if wide and "fp8" in rates else chosen
    if asked not in rates:
        raise InputError(
            f"train.precision = {asked!r} is not accepted on {device.name}: its rates are known for {', '.join(rates)}"
        )
    return [asked]


def resolved(run: RunSpec, layout: dict[str, Any], devices: int, software: str) -> RunSpec:
    """The run with every choice of its layout made."""
    chosen = {
        name: layout[name]
        for name in (
            "data", "tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_stages", "schedule",
            "zero_stage", "sequence_parallel", "recompute", "recompute_share",
        )
    }  # fmt: skip
    chosen["shard"] = max(1, layout["shards"] // layout["context"]) if layout["zero_stage"] else 1
    values = run.model_dump()
    values["parallel"] = chosen
    values["train"] |= {"micro_batch": layout["micro_batch"], "precision": layout["precision"]}
    values["cluster"] |= {"gpus": devices}
    values["software"] = run.software if run.software.endswith(".toml") else software
    return validate(RunSpec, values, where=run.name)


def waterfall(model: ModelSpec, seq_len: int, best: Candidate) -> tuple[Loss, ...]:
    """What takes a step from the device's peak to its MFU: shares of the step's time that is not model FLOPs at peak.

    They and the MFU add up to 1. What products and attention take beyond the time that their FLOPs need at peak is
    their loss, uneven stages included. So is what a vision tower takes beyond its own, the other stages that have none
    included; where the slowest stage has none, its FLOPs are counted with the products.
    """
    flop = forward_flop_per_token(model, seq_len)
    attention = model.layers * attention_flop_per_token(model, seq_len) / flop
    vision = vision_flop_per_sequence(model) / seq_len / flop if best.reasons["vision"] else 0.0
    ideal = {"matmul": 1.0 - attention - vision, "attention": attention, "vision": vision}
    ideal = {reason: best.mfu * share for reason, share in ideal.items()}
    return tuple(
        Loss(reason, LOSSES[reason], seconds / best.step_time_s - ideal.get(reason, 0.0))
        for reason, seconds in best.reasons.items()
    )


def why_slower(best: Candidate, other: Candidate) -> str:
    """In a sentence: what differs between two layouts, and what that costs and saves."""
    seconds = {name: other.reasons[name] - best.reasons[name] for name in best.reasons}
    total = other.step_time_s - best.step_time_s
    named = [name for name in seconds if abs(seconds[name]) >= max(0.05 * abs(total), 1e-3 * best.step_time_s)]
    costs = sorted((name for name in named if seconds[name] > 0), key=lambda name: -seconds[name])[:3]
    saves = sorted((name for name in named if seconds[name] < 0), key=lambda name: seconds[name])[:2]
    text = ", ".join(f"{LOSSES[name]} +{100 * seconds[name] / best.step_time_s:.1f} %" for name in costs)
    if not text:
        text = "equal within a thousandth"
    if saves:
        text += "; less " + ", ".join(
            f"{LOSSES[name]} {100 * seconds[name] / best.step_time_s:.1f} %" for name in saves
        )
    return text


def memory_by_stage(setting: Setting, global_batch: int, layout: Layouts) -> dict[str, dict[str, float]]:
    """Bytes on a device of each kind of stage, by component, of one layout."""
    micro_batches = np.maximum(1, global_batch // (layout.data * layout.micro_batch))
    found = stages_memory(setting, layout, deal_layers(setting.model.layers, layout), micro_batches)
    pipeline = int(layout.pipeline[0])
    kinds = ("first",) if pipeline == 1 else ("first", "last") if pipeline == 2 else ("first", "middle", "last")
    return {kind: dict(zip(MEMORY, found[kind][:, 0].tolist(), strict=True)) for kind in kinds}


def refusal(run: RunSpec, setting: Setting, space: Space) -> str:
    """Why no layout of a space serves, and what would: one sentence."""
    global_batch, cluster = run.train.global_batch, run.cluster
    for name, values in space.accepted.items():
        if name == "precision":
            continue
        freed = search(setting, global_batch, replace(space.without(name), least_devices=1))
        if len(freed.distinct.layouts):
            better = candidate(freed.distinct, 0)
            value = _stated(name, values[0])
            return (
                f"{_KEYS.get(name, 'parallel.' + name)} = {value} leaves no layout that fits {cluster.gpus} x "
                f"{setting.device.name}; with 'auto' it is {_stated(name, _chosen(better, name))}"
            )
    tried = search(setting, global_batch, replace(space, least_devices=1))
    what = f"{run.model.name} ({run.model.parameters.total / 1e9:,.1f} billion parameters)"
    if not len(tried.least_memory.layouts):
        return (
            f"no layout of {what} divides {cluster.gpus} devices and train.global_batch = {global_batch}: a batch with "
            f"more divisors, such as {_rounder(global_batch)}, is accepted"
        )
    needed, limit = float(tried.least_memory.memory_bytes[0]), space.memory_limit
    return (
        f"{what} doesn't fit {cluster.gpus} x {setting.device.name} at any layout: the leanest needs "
        f"{needed / 2**30:,.1f} GiB a device, {(needed - limit) / 2**30:,.1f} GiB more than there are; "
        + _what_would_fit(run, setting, space, needed)
    )


_KEYS = {"micro_batch": "train.micro_batch", "shards": "parallel.shard"}


def _chosen(found: Candidate, name: str) -> Any:
    if name == "shards":
        return found.layout["shards"] // found.layout["context"]
    return found.layout[name]


def _stated(name: str, value: Any) -> str:
    names = {"recompute": RECOMPUTE, "schedule": SCHEDULES, "precision": PRECISIONS}
    return repr(names[name][value] if name in names and isinstance(value, int) else value)


def _rounder(batch: int) -> int:
    """The next batch that is a power of two, or three times one."""
    power = 1 << (batch - 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= batch else power


def _what_would_fit(run: RunSpec, setting: Setting, space: Space, needed: float) -> str:
    """More devices, up to 64 times as many, or more memory."""
    global_batch = run.train.global_batch
    if setting.device.kind == "gpu" and run.cluster.network is not None:
        for factor in (2, 4, 8, 16, 32, 64):
            more = space.most_devices * factor
            wider = replace(space, most_devices=more, least_devices=1 + more // 2)
            if len(search(setting, global_batch, wider).distinct.layouts):
                return f"{more} of them hold it"
    return f"devices of {needed / 2**30:,.0f} GiB hold it"


def _alternatives(evaluation: Evaluation, top: int) -> tuple[Alternative, ...]:
    best = candidate(evaluation, 0)
    found: list[Alternative] = []
    for index in range(1, len(evaluation.layouts)):
        if len(found) == top:
            break
        other = candidate(evaluation, index)
        if any(_same(other.layout, kept.candidate.layout) for kept in found) or _same(other.layout, best.layout):
            continue
        found.append(Alternative(other, other.step_time_s / best.step_time_s - 1.0, why_slower(best, other)))
    return tuple(found)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in GROUP)


def _frontier(run: RunSpec, device: DeviceSpec, evaluation: Evaluation) -> tuple[Point, ...]:
    """The layouts that no other beats in time, cost and number of devices at once."""
    devices = evaluation.layouts.devices
    cost = np.array([
        _usd(run, device, int(count), float(step))
        for count, step in zip(devices, evaluation.step_time_s, strict=True)
    ])  # fmt: skip
    front = np.flatnonzero(pareto(evaluation.step_time_s, cost, devices.astype(np.float64)))
    points = []
    for index in front[np.argsort(devices[front])]:
        found = candidate(evaluation, int(index))
        seconds = run.train.steps * found.step_time_s
        spent = run_cost(run.cluster, device, int(devices[index]), seconds)
        points.append(Point(int(devices[index]), seconds / 86400.0, spent.rent_usd or spent.owned_usd, found))
    return tuple(points)


def _usd(run: RunSpec, device: DeviceSpec, devices: int, step_s: float) -> float:
    spent = run_cost(run.cluster, device, devices, run.train.steps * step_s)
    return spent.rent_usd or spent.owned_usd or spent.device_hours


def _sensitivity(
    setting: Setting, cluster: ClusterSpec, global_batch: int, found: Found, limit: float
) -> tuple[Sensitivity, ...]:
    """What a tenth more of each resource buys: with the best layout, and with the then best of all close ones."""
    best, step = found.distinct.layouts.take(np.array([0])), float(found.distinct.step_time_s[0])
    results = []
    for resource, changed, memory in _enriched(setting, cluster, limit):
        same = evaluate(changed, global_batch, best, memory)
        every = evaluate(changed, global_batch, found.close, memory)
        times = np.where(every.fits, every.step_time_s, np.inf)
        index = int(np.argmin(times))
        if times[index] >= float(same.step_time_s[0]):
            every, index = same, 0
        results.append(Sensitivity(
            resource=resource,
            same_layout=1.0 - float(same.step_time_s[0]) / step,
            searched=1.0 - float(every.step_time_s[index]) / step,
            layout=every.layouts.row(index),
        ))  # fmt: skip
    return tuple(results)


def _enriched(setting: Setting, cluster: ClusterSpec, limit: float) -> Iterator[tuple[str, Setting, float]]:
    """The setting with a tenth more of each resource in turn, and the memory there then is."""
    more, device = 1.1, setting.device

    def changed(machines: ClusterSpec, **fields: Any) -> Setting:
        richer = device.model_copy(update=fields)
        kernels = kernels_for(richer)
        network = fabric(machines, kernels, setting.calibration)
        return replace(setting, device=richer, kernels=kernels, fabric=network)

    yield "memory", setting, limit * more
    yield "memory bandwidth", changed(cluster, memory_bandwidth_bytes=device.memory_bandwidth_bytes * more), limit
    rates = {name: rate * more for name, rate in device.peak_flops.items()}
    yield "FLOPs", changed(cluster, peak_flops=rates), limit
    if device.scale_up_bandwidth_bytes is not None and cluster.scale_up_domain > 1:
        yield "NVLink", changed(cluster, scale_up_bandwidth_bytes=device.scale_up_bandwidth_bytes * more), limit
    if cluster.network is not None and cluster.gpus > cluster.gpus_per_node:
        faster = {"nic_bandwidth_bytes": cluster.network.nic_bandwidth_bytes * more}
        wider = cluster.model_copy(update={"network": cluster.network.model_copy(update=faster)})
        yield "network", changed(wider), limit


def _assumptions(run: RunSpec, device: DeviceSpec, software: SoftwareSpec) -> tuple[Assumption, ...]:
    """What the plan stands on, with its source: device, network, software, prices, calibration."""
    sources: list[tuple[str, catalog.Kind, str | None]] = [
        ("device", "hardware", device.name),
        ("cluster", "clusters", run.cluster.preset),
        ("software", "software", software.name),
        ("prices", "prices", device.name),
        ("prices", "prices", "rules"),
        ("planner", "calibration", "planner"),
    ]
    found = []
    for subject, kind, name in sources:
        if name is None or name not in catalog.names(kind):
            continue
        entry = catalog.entry(kind, name)
        for dotted, value in _leaves(entry.values):
            fact = entry.provenance.of(dotted)
            found.append(Assumption(f"{subject} {name}", dotted, str(value), fact.certainty, fact.source))
    return tuple(found)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield prefix + key, value


def _notes(run: RunSpec, setting: Setting, devices: int, best: Candidate) -> tuple[str, ...]:
    """What a reader should know before believing the plan."""
    notes = []
    if not setting.kernels.measured:
        notes.append(
            f"no kernel of {setting.device.name} has been measured: a roofline with typical efficiencies stands in"
        )
    if devices < run.cluster.gpus:
        notes.append(
            f"{run.cluster.gpus - devices:,} of {run.cluster.gpus:,} devices stay idle: no layout of all of them is "
            "faster with this batch"
        )
    if run.cluster.device == "local" and setting.device.kind == "cpu":
        if hardware_file().is_file():
            notes.append(f"measured by {catalog.entry('hardware', str(hardware_file())).provenance.source}")
        else:
            notes.append("this machine has not been measured: modelworks bench does it")
    if run.model.vision is not None:
        notes.append(_vision_note(run, run.model.vision))
    if best.memory_bytes > 0.95 * setting.device.memory_bytes:
        notes.append("the memory is filled to more than 95 %: expect the allocator to struggle")
    return tuple(notes)


def _vision_note(run: RunSpec, vision: VisionSpec) -> str:
    """What a vision tower is asked to do, and how it is laid out."""
    seq_len = run.train.seq_len
    share = vision_flop_per_sequence(run.model) / seq_len / forward_flop_per_token(run.model, seq_len)
    return (
        f"vision: {vision.images} x {vision.tiles} tiles a sequence make {vision.tokens_per_sequence:,} of its "
        f"{seq_len:,} tokens; the tower of {run.model.parameters.vision / 1e9:,.2f} billion parameters stands on the "
        f"first stage, takes {share:.1%} of the FLOPs, is split by tensor and data parallelism and repeated by context "
        "parallelism"
    )
