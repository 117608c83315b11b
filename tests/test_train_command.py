"""A run's plan beside its measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelworks.spec.errors import OperationError
from modelworks.spec.files import dumps, run_from
from modelworks.spec.home import runs_folder
from modelworks.train.record import RunRecord
from modelworks.train_command import compare

TOKENS_PER_STEP = 512 * 32


@pytest.fixture
def run(home: Path) -> Path:
    folder = runs_folder() / "compared"
    folder.mkdir(parents=True)
    fields = {"name": "compared", "model": {"preset": "grok-tiny"}, "train": {"seq_len": 512, "global_batch": 32}}
    (folder / "run.toml").write_text(dumps(run_from(fields)))
    (folder / "plan.json").write_text(json.dumps({"step_time_s": 1.0, "tokens_per_s": TOKENS_PER_STEP, "mfu": 0.4}))
    return folder


def log(folder: Path, step_times: list[float]) -> None:
    rows = [
        {"step": step, "loss": 1.0, "step_time_s": taken, "tokens_per_s": TOKENS_PER_STEP / taken, "mfu": 0.4 / taken}
        for step, taken in enumerate(step_times, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_measurement_is_the_median_steps_whatever_the_first_took_and_while_the_machine_slept(run: Path) -> None:
    log(run, [60.0, 2.0, 2.0, 3600.0, 2.5, 1.5])
    compared = compare(RunRecord("compared"))
    assert compared["step_time_s"] == {"planned": 1.0, "measured": 2.0, "ratio": 2.0}
    assert compared["tokens_per_s"]["ratio"] == pytest.approx(0.5)
    assert compared["mfu"]["measured"] == pytest.approx(0.2)


def test_a_run_with_nothing_to_compare_says_what_is_missing(run: Path) -> None:
    log(run, [60.0])
    with pytest.raises(OperationError, match="has not logged two steps"):
        compare(RunRecord("compared"))
    (run / "plan.json").unlink()
    with pytest.raises(OperationError, match=r"no plan\.json"):
        compare(RunRecord("compared"))
