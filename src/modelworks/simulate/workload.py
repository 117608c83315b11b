"""What the simulation needs to know of the run: how long a step takes, how large its state is.

The one place where the step's time comes in. It is the scenario's own (`simulate.step_time`) where that is given, that
of the model's FLOPs at a stated MFU (`simulate.mfu`) where that is, and otherwise that of the planner's best layout.
The slowest of all ranks sets the pace of a synchronous step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from modelworks.plan.planner import plan
from modelworks.spec.errors import InputError
from modelworks.spec.files import device_spec
from modelworks.spec.flops import training_flop_per_token
from modelworks.spec.hardware import DeviceSpec, Precision
from modelworks.spec.run import RunSpec
from modelworks.spec.simulation import SimulateSpec


@dataclass(frozen=True)
class Workload:
    """A run as a simulation sees it."""

    step_time_s: float
    """Of one optimizer step on all GPUs, the wait for the slowest rank included."""
    tokens_per_step: int
    flop_per_token: float
    """Model FLOPs, forward and backward."""
    checkpoint_bytes: float
    peak_flops: float
    """Of all GPUs, dense, in the run's precision."""
    slowest_rank: float
    """Step time of the slowest rank over the mean."""
    tokens: int
    """The run's budget."""

    @property
    def tokens_per_s(self) -> float:
        """While nothing fails."""
        return self.tokens_per_step / self.step_time_s

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the peak would do in the time."""
        return self.tokens_per_s * self.flop_per_token / self.peak_flops


def workload(run: RunSpec) -> Workload:
    """The run's step on its whole cluster.

    Raises
    ------
    InputError
        If the device has no rate for the run's precision.
    """
    simulate, train, gpus = run.simulate, run.train, run.cluster.gpus
    device = device_spec(run.cluster.device)
    precision = precision_on(run, device)
    peak = device.peak_flops[precision] * gpus
    flop_per_token = training_flop_per_token(run.model, train.seq_len)
    tokens_per_step = simulate.tokens_per_step or train.tokens_per_step
    slowest = slowest_rank(gpus, simulate.rank_spread)
    if simulate.step_time:
        step_time_s = simulate.step_time
    elif simulate.mfu:
        step_time_s = tokens_per_step * flop_per_token / (peak * simulate.mfu) * slowest
    else:
        step_time_s = planned_step_time_s(run.model_copy(update={"simulate": SimulateSpec()})) * (
            tokens_per_step / train.tokens_per_step
        )
    return Workload(
        step_time_s=step_time_s,
        tokens_per_step=tokens_per_step,
        flop_per_token=flop_per_token,
        checkpoint_bytes=run.model.parameters.total * simulate.state.bytes_per_parameter,
        peak_flops=peak,
        slowest_rank=slowest,
        tokens=train.tokens,
    )


def planned_step_time_s(run: RunSpec) -> float:
    """The step time of the planner's best layout, waiting for the slowest rank included.

    Raises
    ------
    InputError
        If no layout of the run fits its devices.
    """
    return _planned(run.model_dump_json(exclude={"name", "data", "checkpoint", "release"}), run.cluster.device)


@lru_cache(maxsize=64)
def _planned(run: str, device: str) -> float:
    """Plans are made once for runs that are equal; the device's name stands for its file."""
    return plan(RunSpec.model_validate_json(run)).step_time_s


def precision_on(run: RunSpec, device: DeviceSpec) -> Precision:
    """The run's precision; `auto` is bf16 where the device has it."""
    if run.train.precision == "auto":
        return "bf16" if "bf16" in device.peak_flops else "fp32"
    precision: Precision = run.train.precision
    if precision not in device.peak_flops:
        known = ", ".join(device.peak_flops)
        raise InputError(f"train.precision = {precision!r} is not accepted on {device.name}: its rates are {known}")
    return precision


def slowest_rank(ranks: int, spread: float) -> float:
    """Expected step time of the slowest of `ranks` over the mean, each normal with a relative deviation `spread`.

    The expected maximum of n standard normals in Blom's approximation (Blom 1958): the quantile of
    (n - 0.375) / (n + 0.25).
    """
    from statistics import NormalDist

    if ranks == 1 or spread == 0:
        return 1.0
    return 1.0 + spread * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def duration_at_full_speed_s(work: Workload) -> float:
    """How long the token budget takes if nothing ever stops the run."""
    return math.ceil(work.tokens / work.tokens_per_step) * work.step_time_s
