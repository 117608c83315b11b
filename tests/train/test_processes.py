"""The train command on several processes: one is killed, all are asked to stop, the input is bad."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelworks.model import checkpoint
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec
from modelworks.train.record import RunRecord

pytestmark = pytest.mark.slow
MakeSpec = Callable[..., RunSpec]
WriteSpec = Callable[[RunSpec], Path]


@pytest.fixture
def train() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `modelworks train`; what is still at work afterwards is ended, its children as well."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "modelworks", "train", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()


def _wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _set(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def _step(name: str) -> int:
    metrics = runs_folder() / name / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _has_checkpoint(name: str) -> bool:
    return bool(list((runs_folder() / name / "checkpoints").glob("step-*")))


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if " modelworks.train.worker " in child.cmdline()[0]]


def _losses(name: str) -> list[float]:
    return [row["loss"] for row in RunRecord(name).metrics()]


def test_a_run_whose_processes_are_killed_again_and_again_ends_as_if_nothing_had_been(
    make_spec: MakeSpec, write_spec: WriteSpec, train: Callable[..., subprocess.Popen[str]]
) -> None:
    sections = {"checkpoint": {"every_steps": 5, "keep": 2}}
    whole, killed = (make_spec(name, sections, micro_batch=1) for name in ("whole", "killed"))
    process = train(write_spec(killed), "--nproc", "2", "--json")
    for victim, step in ((1, 8), (0, 17), (1, 28)):
        _wait_for(lambda step=step: _step("killed") >= step and _has_checkpoint("killed"), process)
        workers = _workers(process)
        workers[min(victim, len(workers) - 1)].kill()
        _wait_for(lambda workers=workers: not any(w.is_running() for w in workers), process)
        _wait_for(lambda: len(_workers(process)) == 2, process)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert json.loads(output)["step"] == 40
    assert errors.count("SIGKILL") == 3
    undisturbed = train(write_spec(whole), "--nproc", "2")
    _, errors = undisturbed.communicate(timeout=180)
    assert undisturbed.returncode == 0, errors
    assert _losses("killed") == _losses("whole")
    assert RunRecord("killed").status().state == "finished"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_all_processes_and_another_number_goes_on(
    make_spec: MakeSpec,
    write_spec: WriteSpec,
    train: Callable[..., subprocess.Popen[str]],
    number: signal.Signals,
    code: int,
) -> None:
    spec = make_spec(tokens=10_000_000, micro_batch=1, sections={"checkpoint": {"every_steps": 10_000}})
    path = write_spec(spec)
    process = train(path, "--nproc", "2")
    _wait_for(lambda: _step("tiny") >= 3, process)
    workers = _workers(process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    record = RunRecord("tiny")
    status = record.status()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "--resume" in output
    assert (status.state, status.step) == ("stopped", len(record.metrics()))
    assert checkpoint.newest_good(record.folder).name == f"step-{status.step:08d}"
    assert not any(worker.is_running() for worker in workers)

    tokens = (status.step + 4) * spec.train.tokens_per_step
    resumed = train(path, "--set", f"train.tokens={tokens}", "--nproc", "4", "--resume", "--json")
    output, errors = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, errors
    assert json.loads(output)["step"] == status.step + 4
    assert [row["step"] for row in record.metrics()] == list(range(1, status.step + 5))


def test_runs_stop_stops_every_process(
    make_spec: MakeSpec, write_spec: WriteSpec, train: Callable[..., subprocess.Popen[str]]
) -> None:
    process = train(write_spec(make_spec(tokens=10_000_000)), "--nproc", "2")
    _wait_for(lambda: _step("tiny") >= 2, process)
    record = RunRecord("tiny")
    assert record.status().pid == process.pid
    stopper = subprocess.Popen(
        [sys.executable, "-m", "modelworks", "runs", "stop", "tiny", "--json"], stdout=subprocess.PIPE, text=True
    )
    process.communicate(timeout=120)
    stopped: dict[str, Any] = json.loads(stopper.communicate(timeout=60)[0])
    assert (stopped["ended"], stopped["state"]) == (True, "stopped")
    assert process.returncode == 0


def test_processes_whose_parent_is_killed_save_and_end(
    make_spec: MakeSpec, write_spec: WriteSpec, train: Callable[..., subprocess.Popen[str]]
) -> None:
    process = train(write_spec(make_spec(tokens=10_000_000)), "--nproc", "2")
    _wait_for(lambda: _step("tiny") >= 2, process)
    workers = _workers(process)
    assert len(workers) == 2
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    record = RunRecord("tiny")
    assert record.status().state in ("stopped", "crashed")
    assert len(record.metrics()) == int(checkpoint.newest_good(record.folder).name.removeprefix("step-"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nproc", "0"], "--nproc 0 is not accepted"),
        (["--nproc", "3"], "train.global_batch = 4 is not accepted on 3"),
        (["--nproc", "2", "--set", "parallel.data=4"], "doesn't divide into"),
        (
            ["--nproc", "4", *_set("parallel.data=4", "train.micro_batch=4")],
            "train.micro_batch = 4 times parallel.data = 4",
        ),
        (["--nproc", "2", "--set", "parallel.shard=3"], "parallel.shard = 3 is not accepted"),
        (["--nproc", "2", "--set", "data.files=[]"], "data.files"),
        (
            ["--nproc", "2", *_set("train.compile=true", "parallel.tensor=2")],
            "train.compile = true is not accepted with",
        ),
        (
            ["--nproc", "4", *_set("parallel.pipeline=2", "parallel.data=2", "train.micro_batch=2")],
            "train.global_batch = 4 is not accepted with parallel.pipeline = 2",
        ),
        (
            ["--nproc", "2", *_set("parallel.pipeline=2", "parallel.schedule=interleaved")],
            "parallel.schedule = 'interleaved' is not accepted with parallel.pipeline = 2",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_starts_no_process(
    make_spec: MakeSpec,
    write_spec: WriteSpec,
    typed: Callable[..., subprocess.CompletedProcess[str]],
    options: list[str],
    sentence: str,
) -> None:
    ended = typed("train", write_spec(make_spec()), *options)
    assert ended.returncode == 2, ended.stderr
    assert sentence in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert not list(runs_folder().glob("*/processes"))
