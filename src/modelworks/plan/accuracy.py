"""The planner held against runs that others measured: one prediction, one error for each.

A run that cannot be represented (`measured_runs`) is kept with the reason and counts as a failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from modelworks.plan.layout import joined
from modelworks.plan.measured_runs import Represented, Unrepresentable, number, prefix, represent
from modelworks.plan.planner import Candidate, candidate, setting_for
from modelworks.plan.step import evaluate
from modelworks.spec.errors import InputError
from modelworks.spec.software import CalibrationSpec


@dataclass(frozen=True)
class RunResult:
    """One measured run beside its prediction."""

    run_id: str
    source: str
    gpu: str
    predicted_s: float | None
    measured_s: float
    error: float | None
    """Predicted over measured, less one."""
    predicted_gib: float | None
    measured_gib: float | None
    filled: tuple[str, ...]
    """What the row left blank, and with what it was filled."""
    failure: str | None
    reasons: Mapping[str, float] | None = None
    """The predicted step's seconds by reason."""


@dataclass(frozen=True)
class Summary:
    """The errors of one source; fractions of the measured step time."""

    n: int
    failed: int
    mape: float | None
    """Mean absolute error; a failed run counts as 1."""
    median: float | None
    p90: float | None
    bias: float | None
    """Mean signed error of those that were predicted."""
    memory_mape: float | None = None


def predict_runs(
    rows: list[dict[str, str]],
    calibration: CalibrationSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunResult]:
    """Predict every run; `progress` is called with how many are done and how many there are.

    Runs of one model on one cluster are evaluated together, as candidates of one evaluation.
    """
    found: dict[int, RunResult] = {}
    together: dict[tuple[str, ...], list[tuple[int, Represented, tuple[str, ...]]]] = {}
    for index, row in enumerate(rows):
        filled: list[str] = []
        try:
            run = represent(row, filled)
        except (Unrepresentable, InputError) as reason:
            found[index] = _result(row, tuple(filled), failure=str(reason))
        else:
            together.setdefault(run.key, []).append((index, run, tuple(filled)))
    for group in together.values():
        first = group[0][1]
        setting = setting_for(first.model, first.seq_len, first.cluster, first.device, first.software, calibration)
        batches = np.array([run.global_batch for _, run, _ in group])
        steps = evaluate(setting, batches, joined([run.layout for _, run, _ in group]))
        for position, (index, _, filled_in) in enumerate(group):
            found[index] = _result(rows[index], filled_in, predicted=candidate(steps, position))
        if progress is not None:
            progress(len(found), len(rows))
    return [found[index] for index in range(len(rows))]


def summaries(results: list[RunResult]) -> dict[str, Summary]:
    """Errors per source, in the order of the list."""
    return {
        source: summary([result for result in results if result.source == source])
        for source in dict.fromkeys(result.source for result in results)
    }


def summary(results: list[RunResult]) -> Summary:
    """The errors of some runs."""
    errors = np.array([result.error for result in results if result.error is not None])
    absolute = np.concatenate([np.abs(errors), np.ones(len(results) - len(errors))])
    memory = [abs(r.predicted_gib / r.measured_gib - 1) for r in results if r.predicted_gib and r.measured_gib]
    return Summary(
        n=len(results),
        failed=len(results) - len(errors),
        mape=float(absolute.mean()) if len(absolute) else None,
        median=float(np.median(absolute)) if len(absolute) else None,
        p90=float(np.quantile(absolute, 0.9)) if len(absolute) else None,
        bias=float(errors.mean()) if len(errors) else None,
        memory_mape=float(np.mean(memory)) if memory else None,
    )


def as_json(results: list[RunResult]) -> dict[str, Any]:
    """The contract of ``accuracy --json``."""
    return {
        "sources": {source: asdict(found) for source, found in summaries(results).items()},
        "runs": [
            {
                "run_id": r.run_id,
                "gpu": r.gpu,
                "predicted_s": r.predicted_s,
                "measured_s": r.measured_s,
                "error": r.error,
                "predicted_gib": r.predicted_gib,
                "measured_gib": r.measured_gib,
                "filled": list(r.filled),
                "failure": r.failure,
            }
            for r in results
        ],
    }


def table(results: list[RunResult], worst: int = 10) -> Group:
    """For the terminal: errors per source and device, the worst runs with their largest reasons, the failures."""
    shown = Table("source", "device", "runs", "failed", "mean error", "median", "90 %", "bias", "memory")
    for source in dict.fromkeys(result.source for result in results):
        for device in dict.fromkeys(result.gpu for result in results if result.source == source):
            found = summary([r for r in results if r.source == source and r.gpu == device])
            errors = (found.mape, found.median, found.p90)
            shown.add_row(
                source,
                device,
                str(found.n),
                str(found.failed or ""),
                *("" if error is None else f"{error:.1%}" for error in errors),
                "" if found.bias is None else f"{found.bias:+.1%}",
                "" if found.memory_mape is None else f"{found.memory_mape:.1%}",
            )
    predicted = [result for result in results if result.error is not None]
    far = Table("worst predicted", "measured", "predicted", "error", "of which")
    for result in sorted(predicted, key=lambda r: -abs(r.error or 0.0))[:worst]:
        largest = sorted((result.reasons or {}).items(), key=lambda item: -item[1])[:3]
        reasons = ", ".join(f"{reason} {seconds:.3g} s" for reason, seconds in largest)
        far.add_row(
            result.run_id, f"{result.measured_s:.4g} s", f"{result.predicted_s:.4g} s", f"{result.error:+.1%}", reasons
        )
    parts: list[RenderableType] = [shown, far]
    failures = [result for result in results if result.failure is not None]
    parts += [f"not represented: {result.run_id}: {result.failure}" for result in failures]
    blanks = Counter(filled for result in results for filled in result.filled)
    if blanks:
        common = ", ".join(f"{what} ({count})" for what, count in blanks.most_common(8))
        parts.append(f"filled where the list is blank: {common}" + (", ..." if len(blanks) > 8 else ""))
    return Group(*parts)


def _result(
    row: Mapping[str, str],
    filled: tuple[str, ...],
    predicted: Candidate | None = None,
    failure: str | None = None,
) -> RunResult:
    measured = float(row["step_time_s"])
    return RunResult(
        run_id=row["run_id"],
        source=prefix(row["run_id"]),
        gpu=row["gpu"],
        predicted_s=predicted.step_time_s if predicted else None,
        measured_s=measured,
        error=predicted.step_time_s / measured - 1 if predicted else None,
        predicted_gib=predicted.memory_bytes / 2**30 if predicted else None,
        measured_gib=number(row, "memory_gib"),
        filled=filled,
        failure=failure,
        reasons=predicted.reasons if predicted else None,
    )
