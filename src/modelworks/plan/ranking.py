"""A run's layouts in the order of their step time, for a trainer that takes the first one that it can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from modelworks.plan.planner import candidate, refusal, resolved, setting_for, software_name, software_spec, space_for
from modelworks.plan.search import search
from modelworks.spec.errors import InputError
from modelworks.spec.files import device_spec
from modelworks.spec.hardware import DeviceSpec
from modelworks.spec.run import RunSpec


def ranked(
    run: RunSpec, device: DeviceSpec | None = None, *, idle: bool = False, wide: bool = False
) -> Iterator[RunSpec]:
    """The run in each distinct layout that fits its devices, fastest first, every choice made; then again with 1F1B.

    Processes that share one processor share its memory.

    Parameters
    ----------
    run
        Choices that it states are kept; those that are `auto` are searched.
    device
        Instead of the one that the run's cluster names.
    idle
        Whether some devices may stay idle, as in a plan.
    wide
        As for a plan.

    Raises
    ------
    InputError
        If no layout divides what it must or fits the memory.
    """
    device = device or device_spec(run.cluster.device)
    software, devices = software_spec(software_name(run, device)), run.cluster.gpus
    setting = setting_for(run.model, run.train.seq_len, run.cluster, device, software, train=run.train)
    space = space_for(run, setting, wide)
    if not idle:
        space = replace(space, least_devices=devices)
    if device.kind == "cpu":
        space = replace(space, memory_limit=space.memory_limit / devices)
    found = search(setting, run.train.global_batch, space)
    if not len(found.distinct.layouts):
        raise InputError(refusal(run, setting, space))
    for index in range(len(found.distinct.layouts)):
        used = int(found.distinct.layouts.devices[index])
        yield resolved(run, candidate(found.distinct, index).layout, used, software.name)
    if run.parallel.schedule == "auto" and run.parallel.virtual_stages in ("auto", 1):
        # A distinct layout came with its best schedule, which may be one that asks more of the batch.
        simpler = run.parallel.model_copy(update={"schedule": "1f1b", "virtual_stages": 1})
        yield from ranked(run.model_copy(update={"parallel": simpler}), device, idle=idle, wide=wide)
