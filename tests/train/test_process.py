"""The train command as a process: killed, stopped, out of disk, and two at once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modelworks.model import checkpoint
from modelworks.model.decoder import Decoder
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec
from modelworks.train.record import RunRecord

pytestmark = pytest.mark.slow
MakeSpec = Callable[..., RunSpec]
WriteSpec = Callable[[RunSpec], Path]
TIMING = {"time_s", "step_time_s", "reasons", "tokens_per_s", "mfu"}


class Command:
    """Starts `modelworks train` and ends what it started."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def __call__(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "modelworks", "train", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


@pytest.fixture
def command() -> Iterator[Command]:
    starter = Command()
    yield starter
    starter.close()


def _wait_for_step(name: str, step: int, process: subprocess.Popen[str]) -> None:
    metrics = runs_folder() / name / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _weights(spec: RunSpec, step: int) -> dict[str, torch.Tensor]:
    decoder = Decoder(spec.model)
    checkpoint.load_weights(runs_folder() / spec.name / "checkpoints" / f"step-{step:08d}", decoder)
    return decoder.state_dict()


def _rows(name: str) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row.keys() - TIMING} for row in RunRecord(name).metrics()]


def test_forty_steps_equal_twenty_then_kill_9_then_a_resume(
    make_spec: MakeSpec, write_spec: WriteSpec, command: Command
) -> None:
    whole, parts = (make_spec(name, sections={"checkpoint": {"every_steps": 7}}) for name in ("whole", "parts"))
    process = command(write_spec(parts))
    _wait_for_step("parts", 20 + random.randint(0, 12), process)
    process.kill()
    process.wait()
    assert RunRecord("parts").status().state == "crashed"

    resumed = command(write_spec(parts), "--resume", "--json")
    output, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert json.loads(output)["step"] == 40
    uninterrupted = command(write_spec(whole))
    uninterrupted.communicate(timeout=120)
    assert _rows("parts") == _rows("whole")
    expected = _weights(whole, 40)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(parts, 40).items())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(
    make_spec: MakeSpec, write_spec: WriteSpec, command: Command, number: signal.Signals, code: int
) -> None:
    spec = make_spec(tokens=10_000_000, sections={"checkpoint": {"every_steps": 10_000}})
    process = command(write_spec(spec))
    _wait_for_step("tiny", 3, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    record = RunRecord("tiny")
    status = record.status()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert (status.state, status.step) == ("stopped", len(record.metrics()))
    assert checkpoint.newest_good(record.folder).name == f"step-{status.step:08d}"
    assert "--resume" in output


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_last_checkpoint(
    make_spec: MakeSpec, write_spec: WriteSpec, command: Command
) -> None:
    # Steps of a few seconds, so that the first Ctrl-C has to wait for one.
    spec = make_spec(tokens=10_000_000, global_batch=512, micro_batch=4, validate_every=0)
    spec = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"every_steps": 1})})
    process = command(write_spec(spec))
    _wait_for_step("tiny", 2, process)
    while not (runs_folder() / "tiny" / "checkpoints" / "step-00000002").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    record = RunRecord("tiny")
    assert (record.status().state, record.status().message) == ("stopped", "stopped by SIGINT")
    assert checkpoint.newest_good(record.folder).name == "step-00000002"


def test_two_processes_cannot_train_one_run_and_the_first_does_not_notice(
    make_spec: MakeSpec, write_spec: WriteSpec, command: Command
) -> None:
    spec = make_spec(tokens=10_000_000)
    first = command(write_spec(spec))
    _wait_for_step("tiny", 1, first)
    second = command(write_spec(spec), "--resume")
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"being trained by another process (process {first.pid})" in errors
    assert RunRecord("tiny").status().state == "running"
    assert RunRecord("tiny").stop(wait_s=60)
    assert first.wait(timeout=60) == 0


def test_a_full_disk_is_said_and_the_last_checkpoint_stands(
    make_spec: MakeSpec, write_spec: WriteSpec, command: Command, home: Path
) -> None:
    disk = runs_folder() / "tiny"
    disk.mkdir(parents=True)
    # A checkpoint takes about 1.4 MB: there is room for one and not for a second beside it.
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.decode().strip()}")
    try:
        process = command(write_spec(make_spec(sections={"checkpoint": {"every_steps": 5}})))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "the checkpoint of step 10 cannot be written: the disk is full" in errors
        assert "Traceback" not in errors
        record = RunRecord("tiny")
        assert record.status().state == "failed"
        assert "disk is full" in (record.status().message or "")
        assert checkpoint.newest_good(record.folder).name == "step-00000005"
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-00000005"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
