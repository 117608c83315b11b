"""A plan: the layout that a run gets, what it takes, and what else was considered.

`setting_for` puts together what a step is evaluated on: model, device, its kernels, the network, the software's traits.
`step_of` evaluates one run as its spec lays it out; `plan` (in `search`) tries all layouts where the spec says "auto".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelworks.plan.block import Setting
from modelworks.plan.collectives import fabric
from modelworks.plan.kernels import kernels_for
from modelworks.plan.memory import MEMORY
from modelworks.plan.step import REASONS, Evaluation
from modelworks.spec import catalog
from modelworks.spec.fields import validate
from modelworks.spec.hardware import ClusterSpec, DeviceSpec
from modelworks.spec.model import ModelSpec
from modelworks.spec.software import CalibrationSpec, SoftwareSpec

DEFAULT_SOFTWARE = "megatron-core"
"""Whose traits a plan for GPUs assumes if the run doesn't say."""


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
) -> Setting:
    """What steps of a model on a cluster are evaluated on."""
    calibration = calibration or calibration_spec()
    kernels = kernels_for(device)
    return Setting(
        model, seq_len, device, kernels, fabric(cluster, kernels, calibration), software, calibration
    )
