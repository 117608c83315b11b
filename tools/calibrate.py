"""Fit the planner's global parameters on measured runs: `python tools/calibrate.py RUNS.csv [--write]`.

Two stages, each a robust least-squares fit of the logarithm of predicted over measured step times. The runs on A100,
whose kernels are not fused, decide what a host takes to launch kernels, how fast memory streams and what a network
reaches; the runs on H100 decide the rest. No parameter belongs to a model or a run, and each is fitted on at least ten
runs. Cross-validation over five folds says how well runs are predicted that a fit has not seen; folds are whole groups
of runs that differ in nothing but the number of replicas, so that no near copy of a run helps to predict it.

Needs SciPy, which the product doesn't.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from modelworks.plan.layout import joined
from modelworks.plan.measured_runs import prefix, read_runs, represent
from modelworks.plan.planner import calibration_spec, setting_for
from modelworks.plan.step import evaluate
from modelworks.spec.software import CalibrationSpec

FOLDS = 5
ROBUST_FROM = 0.06
"""Errors beyond this count less than their square."""


@dataclass(frozen=True)
class Parameter:
    """One global parameter: where it stands, its range, its start."""

    name: str
    start: float
    low: float
    high: float
    where: tuple[str, ...]
    """("calibration", field), ("sustained", device, precisions...), or ("software", names..., field).
    Further precisions keep H100's ratio to the first."""


@dataclass(frozen=True)
class Stage:
    name: str
    chosen: Callable[[dict[str, str]], bool]
    parameters: tuple[Parameter, ...]


MEGATRON_CORE = ("megatron-core", "megatron-core-2024")
STAGES = (
    Stage(
        "A100",
        lambda row: row["gpu"].startswith("A100") and not re.search("zero3|titan", row["run_id"]),
        (
            Parameter("A100 sustained", 1.0, 0.5, 1.3, ("sustained", "a100-80gb", "bf16")),
            Parameter("memory efficiency", 0.9, 0.5, 1.0, ("calibration", "memory_efficiency")),
            Parameter("InfiniBand efficiency", 0.7, 0.3, 1.0, ("calibration", "infiniband_efficiency")),
            Parameter("launch, Megatron-DeepSpeed", 3.5e-5, 1e-6, 1e-4, ("software", "megatron-deepspeed", "launch_s")),
            Parameter("host, Megatron-DeepSpeed", 4e-3, 0.0, 0.1, ("software", "megatron-deepspeed", "step_host_s")),
            Parameter("socket skew", 2e-4, 0.0, 2e-3, ("software", "megatron-deepspeed", "socket_skew_s")),
        ),
    ),
    Stage(
        "H100",
        lambda row: row["gpu"].startswith("H100") and prefix(row["run_id"]) in ("dgxc", "mcore"),
        (
            Parameter("H100 sustained, bf16", 0.9, 0.5, 1.3, ("sustained", "h100-sxm", "bf16")),
            Parameter("H100 sustained, fp8", 0.9, 0.5, 1.3, ("sustained", "h100-sxm", "fp8")),
            Parameter("cast", 4.0, 2.0, 8.0, ("calibration", "cast_bytes")),
            Parameter("attention backward", 3.0, 2.5, 4.0, ("calibration", "attention_backward")),
            Parameter("jitter", 0.003, 0.0, 0.01, ("calibration", "jitter_per_doubling")),
            Parameter("overlap slowdown", 0.2, 0.0, 1.0, ("calibration", "overlap_slowdown")),
            Parameter("all-to-all", 0.7, 0.3, 1.0, ("calibration", "all_to_all_efficiency")),
            Parameter("pipeline exposure", 0.2, 0.0, 1.0, ("calibration", "pipeline_exposure")),
            Parameter("tensor overlap", 0.5, 0.0, 1.0, ("software", *MEGATRON_CORE, "tensor_overlap_forward")),
            Parameter(
                "tensor overlap, backward", 0.5, 0.0, 1.0, ("software", *MEGATRON_CORE, "tensor_overlap_backward")
            ),
            Parameter("element-wise traffic", 1.3, 1.0, 4.0, ("software", *MEGATRON_CORE, "stream_factor")),
            Parameter("expert host", 4e-4, 0.0, 5e-3, ("software", *MEGATRON_CORE, "expert_host_s")),
        ),
    ),
    Stage(
        "B200",
        lambda row: row["gpu"].startswith("B200"),
        (Parameter("B200 sustained", 0.8, 0.3, 1.3, ("sustained", "b200", "bf16")),),
    ),
    Stage(
        "H100 of 500 W",
        lambda row: row["gpu"].startswith("H100-9"),
        (Parameter("H100 of 500 W sustained", 0.8, 0.3, 1.3, ("sustained", "h100-hbm2e", "bf16", "fp8")),),
    ),
)


class Runs:
    """Measured runs, evaluated together under changed parameters."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows
        groups: dict[Any, list[Any]] = {}
        for index, row in enumerate(rows):
            run = represent(row, [])
            groups.setdefault(run.key, []).append((index, run))
        self.groups = [
            (
                group[0][1],
                np.array([index for index, _ in group]),
                np.array([run.global_batch for _, run in group]),
                joined([run.layout for _, run in group]),
            )
            for group in groups.values()
        ]
        self.measured = np.array([float(row["step_time_s"]) for row in rows])
        names = [re.sub(r"-\d+(?=-(bf16|fp8))", "", row["run_id"]) for row in rows]
        _, self.family = np.unique(names, return_inverse=True)

    def errors(self, calibration: CalibrationSpec, software: dict[str, dict[str, float]]) -> np.ndarray:
        """Logarithms of predicted over measured."""
        out = np.zeros(len(self.rows))
        for run, index, batches, layout in self.groups:
            traits = run.software.model_copy(update=software.get(run.software.name, {}))
            setting = setting_for(run.model, run.seq_len, run.cluster, run.device, traits, calibration)
            out[index] = evaluate(setting, batches, layout).step_time_s
        return np.log(out / self.measured)


def changed(
    calibration: CalibrationSpec, parameters: tuple[Parameter, ...], values: np.ndarray
) -> tuple[CalibrationSpec, dict[str, dict[str, float]]]:
    """The calibration and the frameworks' traits with some parameters' values."""
    fields: dict[str, Any] = {}
    sustained = {name: dict(by) for name, by in calibration.sustained.items()}
    software: dict[str, dict[str, float]] = {}
    for parameter, value in zip(parameters, values.tolist(), strict=True):
        kind, *path = parameter.where
        if kind == "calibration":
            fields[path[0]] = value
        elif kind == "sustained":
            device, first, *others = path
            h100 = sustained["h100-sxm"]
            of_device = sustained.setdefault(device, {})
            of_device[first] = value
            of_device.update({name: value * h100[name] / h100[first] for name in others})
            if device == "h100-sxm":
                fields["sustained_default"] = dict(of_device)
        else:
            for name in path[:-1]:
                software.setdefault(name, {})[path[-1]] = value
    return calibration.model_copy(update=fields | {"sustained": sustained}), software


def fitted(runs: Runs, calibration: CalibrationSpec, parameters: tuple[Parameter, ...], seen: np.ndarray) -> np.ndarray:
    """The parameters' best values on the runs that are seen; families weigh the same, however many runs they have."""
    weights = 1.0 / np.sqrt(np.bincount(runs.family)[runs.family])
    scale = np.array([max(abs(p.start), 1e-3 * (p.high - p.low)) for p in parameters])

    def residuals(x: np.ndarray) -> np.ndarray:
        return (weights * runs.errors(*changed(calibration, parameters, x * scale)))[seen]

    found = least_squares(
        residuals,
        np.array([p.start for p in parameters]) / scale,
        bounds=(np.array([p.low for p in parameters]) / scale, np.array([p.high for p in parameters]) / scale),
        loss="soft_l1",
        f_scale=ROBUST_FROM,
        diff_step=0.02,
        max_nfev=12,
    )
    return found.x * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--write", action="store_true", help="put the values into the catalog")
    parser.add_argument("--folds", type=int, default=FOLDS)
    arguments = parser.parse_args()
    rows = read_runs(arguments.runs)
    calibration = calibration_spec()
    for stage in STAGES:
        runs = Runs([row for row in rows if stage.chosen(row)])
        everything = np.ones(len(runs.rows), dtype=bool)
        values = fitted(runs, calibration, stage.parameters, everything)
        print(f"{stage.name}: {len(runs.rows)} runs in {runs.family.max() + 1} families")
        for parameter, value in zip(stage.parameters, values, strict=True):
            at = " (at its bound)" if value <= parameter.low * 1.001 or value >= parameter.high * 0.999 else ""
            print(f"  {parameter.name:28s} {value:.5g}{at}")
        errors = np.exp(runs.errors(*changed(calibration, stage.parameters, values))) - 1
        print(f"  all runs:          mean error {np.abs(errors).mean():.1%}, bias {errors.mean():+.1%}")
        if arguments.folds > 1:
            unseen = np.zeros(len(runs.rows))
            order = np.random.default_rng(0).permutation(runs.family.max() + 1)
            for fold in range(arguments.folds):
                hidden = np.isin(runs.family, order[fold :: arguments.folds])
                part = fitted(runs, calibration, stage.parameters, ~hidden)
                unseen[hidden] = (np.exp(runs.errors(*changed(calibration, stage.parameters, part))) - 1)[hidden]
            print(f"  runs not seen:     mean error {np.abs(unseen).mean():.1%}, bias {unseen.mean():+.1%}")
        calibration, software = changed(calibration, stage.parameters, values)
        if arguments.write:
            write(calibration, software)


def write(calibration: CalibrationSpec, software: dict[str, dict[str, float]]) -> None:
    """Put fitted values into the catalog's files, leaving all else in them as it stands."""
    catalog = Path(str(files("modelworks.spec.catalog")))
    planner = catalog / "calibration" / "planner.toml"
    for name, value in calibration.model_dump().items():
        if isinstance(value, float):
            _replace(planner, "", name, value)
    tables = {f"sustained.{device}": rates for device, rates in calibration.sustained.items()}
    for table, rates in ({"sustained_default": calibration.sustained_default} | tables).items():
        for precision, rate in rates.items():
            _replace(planner, f"[{table}]", precision, rate)
    for name, traits in software.items():
        for trait, value in traits.items():
            _replace(catalog / "software" / f"{name}.toml", "", trait, value)


def _replace(file: Path, table: str, field: str, value: float) -> None:
    text = file.read_text(encoding="utf-8")
    head, table, tail = text.partition(table) if table else ("", "", text)
    tail, count = re.subn(rf"(?m)^{field} = .*$", f"{field} = {value:.4g}", tail, count=1)
    if not count:
        raise SystemExit(f"{file.name} has no line for {table} {field}")
    file.write_text(head + table + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
