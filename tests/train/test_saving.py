"""Checkpoints in the background: the step's own state, one at a time, and no failure that goes unheard."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modelworks.model import checkpoint
from modelworks.spec.errors import OperationError
from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer, train
from modelworks.train.ranks import Ranks
from modelworks.train.record import RunRecord
from modelworks.train.saving import Saving
from modelworks.train.session import open_run
from modelworks.train.view import NoView

MakeSpec = Callable[..., RunSpec]


class Gate:
    """Holds a save in the air until it is let go on."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.passed = 0

    def __call__(self) -> None:
        assert self._open.wait(60)
        self.passed += 1

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


def _begin(saving: Saving, step: int, tensors: dict[str, torch.Tensor], flush: Callable[[], None]) -> None:
    saving.save(step, tensors, lambda: tensors, {"tokens": step}, flush)


def _load(folder: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loaded = {key: torch.zeros_like(tensor) for key, tensor in like.items()}
    checkpoint.load(folder, loaded)
    return loaded


def test_a_checkpoint_holds_the_state_of_its_step_though_training_goes_on(tmp_path: Path, gate: Gate) -> None:
    saving = Saving(tmp_path, 2, Ranks(), asynchronous=True)
    weights = {"model.a": torch.arange(1000.0), "optimizer.a/step": torch.tensor(7.0)}
    expected = {key: tensor.clone() for key, tensor in weights.items()}
    _begin(saving, 7, weights, gate)
    for tensor in weights.values():
        tensor.add_(1.0)
    assert checkpoint.folders(tmp_path) == []
    gate.open()
    saving.finish()
    loaded = _load(checkpoint.folder_of(tmp_path, 7), expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_the_next_save_waits_for_the_one_in_the_air(tmp_path: Path, gate: Gate) -> None:
    saving = Saving(tmp_path, 5, Ranks(), asynchronous=True)
    weights = {"model.a": torch.ones(10)}
    _begin(saving, 1, weights, gate)
    second = threading.Thread(target=_begin, args=(saving, 2, weights, gate))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert gate.passed == 0
    gate.open()
    second.join(30)
    saving.finish()
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(tmp_path)] == [2, 1]


def test_a_save_that_is_not_asynchronous_is_on_the_disk_when_it_returns(tmp_path: Path) -> None:
    saving = Saving(tmp_path, 5, Ranks(), asynchronous=False)
    _begin(saving, 3, {"model.a": torch.ones(10)}, lambda: None)
    assert checkpoint.newest_good(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("notice", ["at the next step", "at the next save", "at the end"])
def test_a_failure_in_the_background_reaches_the_loop(tmp_path: Path, notice: str) -> None:
    saving = Saving(tmp_path, 5, Ranks(), asynchronous=True)
    weights = {"model.a": torch.ones(10)}
    (tmp_path / "checkpoints").write_text("no folder")
    _begin(saving, 1, weights, lambda: None)

    def go_on() -> None:
        if notice == "at the next save":
            _begin(saving, 2, weights, lambda: None)
        elif notice == "at the end":
            saving.finish()
        else:
            for _ in range(3000):
                saving.look()
                time.sleep(0.01)

    with pytest.raises(OperationError, match="the checkpoint of step 1 cannot be written"):
        go_on()
    saving.finish()  # It is told once.


def test_tensors_that_come_later_are_saved_as_well(tmp_path: Path) -> None:
    saving = Saving(tmp_path, 5, Ranks(), asynchronous=True)
    weights = {"model.a": torch.ones(10)}
    _begin(saving, 1, weights, lambda: None)
    weights["optimizer.a/step"] = torch.tensor(2.0)
    _begin(saving, 2, weights, lambda: None)
    saving.finish()
    assert float(_load(checkpoint.folder_of(tmp_path, 2), weights)["optimizer.a/step"]) == 2.0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_leaves_the_same_checkpoints_either_way(make_spec: MakeSpec, asynchronous: bool, tmp_path: Path) -> None:
    losses: dict[bool, Any] = {}
    for way in (asynchronous, False):
        spec = make_spec(f"run-{way}", sections={"checkpoint": {"every_steps": 10, "asynchronous": way}})
        with open_run(spec, folder=tmp_path / f"{way}-{len(losses)}") as session:
            train(session)
        record = RunRecord(session.folder)
        assert [path.name for path in record.checkpoints()] == ["step-00000030", "step-00000040"]
        losses[way] = [row["loss"] for row in record.metrics()]
        trainer_state = checkpoint.read_state(record.checkpoints()[-1])
        assert trainer_state["step"] == 40
    assert len({tuple(values) for values in losses.values()}) == 1


def test_a_checkpoint_taken_while_steps_are_made_is_the_synchronous_one_to_the_bit(
    make_spec: MakeSpec, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    with open_run(spec) as session:
        trainer = Trainer(session, NoView())
        for _ in range(5):
            trainer.one_step()
        expected = {key: tensor.clone() for key, tensor in trainer._tensors().items()}
        monkeypatch.setattr(trainer.log, "flush_to_disk", gate)
        trainer._save()
        for _ in range(5):
            trainer.one_step()
        gate.open()
        trainer.close()
    loaded = _load(checkpoint.newest_good(session.folder), expected)
    assert checkpoint.newest_good(session.folder).name == "step-00000005"
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
