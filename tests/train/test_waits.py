"""What a step's time goes to: by layout, with a process that is late, and in a trace."""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from processes import together
from tiny_runs import make

from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer
from modelworks.train.ranks import Ranks
from modelworks.train.session import MemberSession, open_run
from modelworks.train.view import NoView
from modelworks.train.waits import MEASURED, Waits

LATE_S = 0.6


def steps(ranks: Ranks, folder: Path, spec: RunSpec, late: int | None) -> list[dict[str, Any]]:
    """The rows of three steps, on each of which the process `late` is slow to load its data."""
    trainer = Trainer(MemberSession(folder, spec, False, ranks.first), NoView(), ranks)
    load = trainer.data.sequences

    def slowly(*arguments: Any) -> Any:
        time.sleep(LATE_S)
        return load(*arguments)

    if ranks.rank == late:
        trainer.data.sequences = slowly  # type: ignore[method-assign]
    rows = [trainer._timed_step() for _ in range(3)]
    trainer.close()
    return rows


def run(spec: RunSpec, folder: Path, late: int | None = None) -> list[list[dict[str, Any]]]:
    with open_run(spec, folder=folder / "runs" / f"{spec.name}-{late}") as session:
        return together(spec.cluster.gpus, steps, session.folder, spec, late)


@pytest.mark.parametrize(
    ("network", "processes", "fields", "purposes"),
    [
        ("mixture", 1, {}, set()),
        ("dense", 2, {"zero_stage": 0}, {"data"}),
        ("dense", 2, {"zero_stage": 3}, {"data"}),
        ("dense", 2, {"tensor": 2}, {"tensor"}),
        ("mixture", 2, {"pipeline": 2}, {"bubble"}),
        ("dense", 2, {"context": 2, "zero_stage": 2}, {"context", "data"}),
        ("mixture", 2, {"expert": 2, "zero_stage": 1}, {"expert", "data"}),
        ("mixture", 2, {"tensor": 2, "expert": 2}, {"expert", "tensor"}),
    ],
)
def test_a_step_is_divided_among_the_exchanges_of_its_layout(
    network: str, processes: int, fields: dict[str, int], purposes: set[str], text_folder: Path, folder: Path
) -> None:
    every = run(make(network, "adamw", text_folder, processes, **fields), folder)
    for of_step in zip(*every, strict=True):
        # What the processes took on average is what their reasons add up to.
        taken = sum(row["step_time_s"] for row in of_step) / processes
        for row in of_step:
            assert sum(row["reasons"].values()) == pytest.approx(taken, rel=1e-6)
            assert tuple(row["reasons"]) == MEASURED
            assert all(seconds >= 0 for seconds in row["reasons"].values()), row["reasons"]
            found = {name for name in ("tensor", "context", "expert", "data", "bubble") if row["reasons"][name] > 0}
            assert found == purposes


def test_time_that_one_process_is_late_is_loading_for_it_and_waiting_for_the_other(
    text_folder: Path, folder: Path
) -> None:
    for rows in run(make("dense", "adamw", text_folder, 2, zero_stage=3), folder, late=1):
        for row in rows:
            # Means over two processes, of which one loads and the other waits, less what that one is late itself.
            assert row["reasons"]["host"] > 0.5 * LATE_S / 2
            assert row["reasons"]["jitter"] > 0.5 * LATE_S / 2


def test_pytorchs_functions_are_its_own_again_after_a_step_that_failed() -> None:
    before, waits = dist.all_reduce, Waits(Ranks(0, 2), {})

    def fail() -> None:
        with waits.measured(True):
            assert dist.all_reduce is not before
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert dist.all_reduce is before


def test_asked_for_steps_are_traced_on_each_process(text_folder: Path, folder: Path) -> None:
    spec = make("dense", "adamw", text_folder, 2, zero_stage=3)
    spec = spec.model_copy(update={"name": "traced", "train": spec.train.model_copy(update={"trace_steps": 1})})
    with open_run(spec, folder=folder / "runs" / "traced") as session:
        together(2, steps, session.folder, spec, None)
        written = sorted(path.name for path in (session.folder / "traces").iterdir())
        assert written == [f"step-00000002-rank-{rank}.json.gz" for rank in (0, 1)]
        with gzip.open(session.folder / "traces" / written[1]) as file:
            names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("gloo" in name or "c10d" in name for name in names)
