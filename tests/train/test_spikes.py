"""Losses that leap or are no number: stopped, skipped, rolled back, alike after a resume."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from processes import together

from modelworks.model import checkpoint
from modelworks.model.decoder import Losses
from modelworks.spec.errors import OperationError
from modelworks.spec.files import run_from
from modelworks.spec.run import GuardSpec, RunSpec
from modelworks.train.loop import Trainer, train
from modelworks.train.ranks import Ranks
from modelworks.train.record import RunRecord
from modelworks.train.session import MemberSession, open_run
from modelworks.train.spikes import Rollback, Spikes

MakeSpec = Callable[..., RunSpec]


def _fed(spec: GuardSpec, losses: list[float]) -> Spikes:
    spikes = Spikes(spec)
    for step, loss in enumerate(losses):
        assert spikes.judge(step, loss, 1.0, "") is None
    return spikes


STEADY = [2.0 + 0.1 * math.sin(step) for step in range(40)]
"""Median 2.0; the median absolute deviation of a sine's values is sin(pi/4) times its height: 0.0707."""


@pytest.mark.parametrize(("loss", "odd"), [(2.0 + 5.5 * 0.1048, False), (2.0 + 6.5 * 0.1048, True), (-9.0, False)])
def test_a_spike_is_so_many_robust_deviations_above_the_median(loss: float, odd: bool) -> None:
    spikes = _fed(GuardSpec(on_spike="skip", spike_deviations=6.0, spike_window=40), STEADY)
    assert (spikes.judge(40, loss, 1.0, "") is not None) == odd


def test_a_spike_does_not_become_what_the_next_is_measured_by() -> None:
    spec = GuardSpec(on_spike="skip", spike_deviations=6.0, spike_window=40, spike_limit=40)
    spikes = _fed(spec, STEADY)
    assert all(spikes.judge(step, 4.0, 1.0, "") for step in range(40, 70))


def test_without_a_threshold_only_what_is_no_number_is_odd() -> None:
    spikes = _fed(GuardSpec(on_spike="skip"), [*STEADY, 1e9])
    assert spikes.judge(41, math.nan, 1.0, "") is not None
    assert spikes.judge(42, 2.0, math.inf, "") is not None


def test_more_spikes_than_allowed_within_the_window_end_the_run_and_older_ones_are_forgiven() -> None:
    spec = GuardSpec(on_spike="skip", spike_limit=2, spike_window=20)
    spikes = Spikes(spec)
    for step in (0, 5, 21, 26, 42):
        assert spikes.judge(step, math.nan, 1.0, "lower the rate") is not None
    with pytest.raises(OperationError, match=r"guard\.spike_limit = 2 allows; lower the rate"):
        spikes.judge(45, math.nan, 1.0, "lower the rate")


def test_what_a_checkpoint_keeps_decides_alike() -> None:
    spec = GuardSpec(on_spike="skip", spike_deviations=6.0, spike_window=40, spike_limit=2)
    one = _fed(spec, STEADY)
    one.judge(40, math.nan, 1.0, "")
    other = Spikes(spec)
    other.load(one.state())
    for step, loss in enumerate((2.1, 2.5, 3.0), start=41):
        assert (one.judge(step, loss, 1.0, "") is None) == (other.judge(step, loss, 1.0, "") is None)
        assert one.state() == other.state()


def test_a_rollback_goes_on_behind_the_batch_that_it_fled_from() -> None:
    spec = GuardSpec(on_spike="rollback")
    fled = Spikes(spec)
    with pytest.raises(Rollback):
        fled.judge(57, math.nan, 1.0, "")
    back = Spikes(spec)
    back.rolled_back(fled, from_step=57, to_step=50, why="a spike")
    assert [back.batch(step) for step in (50, 51)] == [58, 59]
    assert [(part.first, part.last) for part in back.passed] == [(50, 57)]


class Poison:
    """Makes the loss of one batch of a run a certain number, whenever the run comes to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batches: set[int], factor: float) -> None:
        weighted, one_step = Trainer._weighted, Trainer.one_step
        self.met: list[int] = []

        def poisoned(trainer: Trainer, losses: Losses) -> torch.Tensor:
            loss = weighted(trainer, losses)
            return loss * factor if trainer.spikes.batch(trainer.step) in batches else loss

        def noted(trainer: Trainer) -> dict[str, Any]:
            self.met.append(trainer.spikes.batch(trainer.step))
            return one_step(trainer)

        monkeypatch.setattr(Trainer, "_weighted", poisoned)
        monkeypatch.setattr(Trainer, "one_step", noted)


def _train(spec: RunSpec, resume: bool = False) -> None:
    with open_run(spec, resume) as session:
        train(session)


def _final(name: str) -> dict[str, torch.Tensor]:
    from modelworks.model.decoder import Decoder

    record = RunRecord(name)
    decoder: nn.Module = Decoder(record.spec().model)
    checkpoint.load_weights(record.checkpoints()[-1], decoder)  # type: ignore[arg-type]
    return decoder.state_dict()


def _guarded(make_spec: MakeSpec, name: str, train: dict[str, Any] | None = None, **guard: Any) -> RunSpec:
    sections = {"guard": guard, "checkpoint": {"every_steps": 10, "keep": 5}}
    return make_spec(name, sections, validate_every=0, **(train or {}))


@pytest.mark.parametrize("factor", [math.nan, 50.0])
def test_a_skipped_step_changes_nothing_and_the_data_moves_on(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    poison = Poison(monkeypatch, {24}, factor)
    deviations = 0.0 if math.isnan(factor) else 20.0
    steady = {"schedule": "constant", "warmup_fraction": 0.0}
    _train(_guarded(make_spec, "skip", steady, on_spike="skip", spike_deviations=deviations))
    rows = RunRecord("skip").metrics()
    assert poison.met == list(range(40))
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if "event" in row] == [25]
    assert "the update was dropped" in rows[24]["event"]
    assert (rows[24]["loss"] is None) == math.isnan(factor)
    # The same run without that batch, which takes one step less.
    monkeypatch.setattr(Spikes, "batch", lambda self, step: step if step < 24 else step + 1)
    _train(_guarded(make_spec, "told", steady | {"tokens": 39 * 128}))
    told = _final("told")
    assert all(torch.equal(tensor, told[name]) for name, tensor in _final("skip").items())


def test_a_rollback_trains_as_if_the_data_between_had_never_been(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, {24}, math.nan)
    _train(_guarded(make_spec, "back", on_spike="rollback", rollback_steps=8))
    assert poison.met == [*range(25), *range(25, 55)]  # From step 10 on, behind batch 24.
    record = RunRecord("back")
    rows = record.metrics()
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if "event" in row] == [11]
    assert "went back to step 10" in rows[10]["event"]
    assert checkpoint.read_state(record.checkpoints()[-1])["spikes"]["passed"][0][:2] == [10, 24]
    # The same run, told from the beginning to read that data after step 10.
    monkeypatch.setattr(Spikes, "batch", lambda self, step: step if step < 10 else step + 15)
    _train(_guarded(make_spec, "told"))
    told = _final("told")
    assert all(torch.equal(tensor, told[name]) for name, tensor in _final("back").items())


def flee(ranks: Ranks, folder: Path, spec: RunSpec, poisoned: bool) -> None:
    """Train with a batch whose gradients are no numbers on the second process alone, or told to leave it out."""
    with pytest.MonkeyPatch.context() as patch:
        if not poisoned:
            patch.setattr(Spikes, "batch", lambda self, step: step if step < 10 else step + 5)
        elif not ranks.first:
            Poison(patch, {14}, math.nan)
        train(MemberSession(folder, spec, False, ranks.first), ranks=ranks)


@pytest.mark.parametrize("parallel", [{"zero_stage": 3, "expert": 2}, {"pipeline": 2}])
def test_several_processes_go_back_together(make_spec: MakeSpec, parallel: dict[str, int]) -> None:
    """From step 14 to the checkpoint of step 10, and on behind batch 14, as a run that was told to."""
    for name in ("back", "told"):
        spec = _guarded(make_spec, name, {"tokens": 18 * 128}, on_spike="rollback", rollback_steps=2)
        among = dict.fromkeys(("gpus", "gpus_per_node", "scale_up_domain"), 2)
        spec = run_from(
            spec.model_dump(exclude_none=True) | {"parallel": parallel, "cluster": {"preset": "local"} | among}
        )
        with open_run(spec) as session:
            together(2, flee, session.folder, spec, name == "back")
    rows = RunRecord("back").metrics()
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert [row["step"] for row in rows if "event" in row] == [11]
    assert "went back to step 10" in rows[10]["event"]
    told = _final("told")
    assert all(torch.equal(tensor, told[name]) for name, tensor in _final("back").items())


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_resumed_run_decides_as_the_uninterrupted_one(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    Poison(monkeypatch, {24, 33}, math.nan)
    for name in ("whole", "parts"):
        _train(_guarded(make_spec, name, on_spike=policy))
    for path in RunRecord("parts").checkpoints():
        if checkpoint.step_of(path) > 20:
            path.rename(path.with_name(f".{path.name}.tmp"))
    _train(_guarded(make_spec, "parts", on_spike=policy), resume=True)
    keys = ("step", "loss", "event")
    whole, parts = (
        [[row.get(key) for key in keys] for row in RunRecord(name).metrics()] for name in ("whole", "parts")
    )
    assert parts == whole
    expected = _final("whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _final("parts").items())


def test_without_a_checkpoint_to_go_back_to_the_run_says_so(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {4}, math.nan)
    with pytest.raises(OperationError, match="there is no checkpoint 0 steps before or more to go back to"):
        _train(_guarded(make_spec, "early", on_spike="rollback"))
    assert RunRecord("early").status().state == "failed"


def test_a_run_that_stopped_for_a_spike_can_be_resumed_with_another_policy(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {24}, math.nan)
    with pytest.raises(OperationError, match=r"with --resume and guard\.on_spike"):
        _train(_guarded(make_spec, "stopped"))
    _train(_guarded(make_spec, "stopped", on_spike="skip"), resume=True)
    assert RunRecord("stopped").status().state == "finished"
