"""What the train command decides before a run, and a run's plan beside its measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modelworks.model import checkpoint
from modelworks.plan.ranking import ranked
from modelworks.plan.step import REASONS
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import device_spec, dumps, run_from
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec
from modelworks.train.layout import layout
from modelworks.train.record import RunRecord
from modelworks.train.refusals import refuse_unsupported
from modelworks.train.waits import MEASURED
from modelworks.train_command import _PLANNED, LAID_OUT, _last_commit, compare, with_layout

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


def _on(processes: int, batch: int = 8, compiled: object = "auto", **parallel: object) -> RunSpec:
    size = dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), processes)
    return run_from(
        {
            "name": "laid-out",
            "model": {"preset": "grok-tiny"},
            "train": {"seq_len": 512, "global_batch": batch, "compile": compiled},
            "parallel": parallel,
            "cluster": {"preset": "local"} | size,
        }
    )


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(2, {}), (4, {}), (4, {"tensor": 2}), (4, {"data": 2, "zero_stage": 3}), (2, {"expert": 2})],
)
def test_open_degrees_become_the_planners_numbers_and_stated_ones_stay(
    home: Path, processes: int, parallel: dict[str, int]
) -> None:
    spec = _on(processes, **parallel)
    chosen = with_layout(spec).parallel
    numbers = {name: getattr(chosen, name) for name in LAID_OUT}
    assert "auto" not in numbers.values()
    assert parallel.items() <= numbers.items()
    assert layout(with_layout(spec), processes).processes == processes
    # None that train can do is faster by the plan.
    best = next(one for one in ranked(spec, device_spec("local")) if _can_train(one, spec))
    assert {name: getattr(best.parallel, name) for name in LAID_OUT} == numbers


def _can_train(laid_out: RunSpec, spec: RunSpec) -> bool:
    try:
        refuse_unsupported(spec.model_copy(update={"parallel": laid_out.parallel}), spec.cluster.gpus)
    except InputError:
        return False
    return True


def test_a_batch_that_replicas_cannot_share_is_laid_out_otherwise(home: Path) -> None:
    chosen = with_layout(_on(4, batch=2)).parallel
    assert chosen.data in (1, 2)
    with pytest.raises(InputError, match=r"train\.global_batch = 2 is not accepted on 4"):
        layout(_on(4, batch=2), 4)


def test_a_run_that_the_planner_has_no_layout_for_is_data_parallel_with_a_sentence(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = device_spec("local").model_copy(update={"memory_bytes": 400_000_000})
    monkeypatch.setattr("modelworks.train_command.device_spec", lambda name: tiny)
    chosen = with_layout(_on(2)).parallel
    assert (chosen.data, chosen.shard, chosen.tensor, chosen.zero_stage) == (2, 2, 1, 1)
    assert "the planner has no layout for this run" in caplog.text
    assert "doesn't fit" in caplog.text


def test_what_no_layout_mends_is_refused_in_the_users_own_terms(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"train\.compile = true is not accepted with parallel\.tensor = 2"):
        with_layout(_on(2, compiled=True, tensor=2))
    assert not caplog.text


def test_a_resumed_run_keeps_its_layout_unless_its_processes_change(home: Path) -> None:
    begun = _on(4, tensor=2, data=2, expert=2, expert_tensor=2, zero_stage=2)
    folder = runs_folder() / "laid-out"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(dumps(begun), encoding="utf-8")
    kept = with_layout(_on(4), resume=True).parallel
    assert (kept.tensor, kept.expert, kept.zero_stage) == (2, 2, 2)
    assert layout(with_layout(_on(2), resume=True), 2).processes == 2
    assert with_layout(_on(4), resume=False).parallel != kept


def test_measured_reasons_stand_beside_the_planned_ones(run: Path) -> None:
    log(run, [1.0, 1.0, 1.0])
    plan = json.loads((run / "plan.json").read_text())
    parts = [part for parts in _PLANNED.values() for part in parts]
    assert sorted(parts) == sorted(REASONS)
    plan["best"] = {"reasons": {reason: 0.01 * (1 + index) for index, reason in enumerate(REASONS)}}
    (run / "plan.json").write_text(json.dumps(plan))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["reasons"] = dict.fromkeys(MEASURED, 0.5)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared = compare(RunRecord("compared"))["reasons"]
    assert tuple(compared) == MEASURED
    assert sum(values["planned"] for values in compared.values()) == pytest.approx(
        sum(plan["best"]["reasons"].values())
    )
    assert compared["optimizer"]["ratio"] == pytest.approx(0.5 / plan["best"]["reasons"]["optimizer"])


def test_a_checkpoint_of_an_earlier_step_is_progress_where_a_later_one_is_damaged(run: Path) -> None:
    record = RunRecord("compared")
    before = _last_commit(record)
    for step in (40, 20):
        checkpoint.save(run, step, {"model.one": torch.zeros(1)}, {})
        after = _last_commit(record)
        assert after > before
        before = after


def test_the_process_that_holds_a_run_starts_without_what_only_its_workers_need(
    loaded: Callable[..., list[str]],
) -> None:
    code = (
        "import modelworks.train_command, modelworks.train.preparing, modelworks.train.result\n"
        "import modelworks.launch.elastic, modelworks.launch.meeting"
    )
    assert loaded(code, "torch._dynamo", "torch.distributed.tensor") == []
