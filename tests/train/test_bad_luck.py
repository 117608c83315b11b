"""What goes wrong around a run's processes: one hangs, is corrupted, late, of another version; the disk is full."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelworks.launch.elastic import Processes
from modelworks.model import checkpoint
from modelworks.spec.files import dumps
from modelworks.spec.home import runs_folder
from modelworks.spec.run import RunSpec
from modelworks.train.loop import train
from modelworks.train.preparing import prepare_data
from modelworks.train.record import RunRecord
from modelworks.train.session import open_run
from modelworks.train.view import NoView
from modelworks.train.watchdog import Watchdog
from modelworks.train.worker import FINAL_CODES, PRELOADED

pytestmark = pytest.mark.slow
MakeSpec = Callable[..., RunSpec]
WriteSpec = Callable[[RunSpec], Path]
HANG_S = 10.0
"""On a busy machine a process may seem to hang that doesn't; that costs a restart, and changes no number."""
WORKER = """
import os, signal, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
from modelworks.train import worker

def at_step(wanted, act):
    from modelworks.train.loop import Trainer
    original = Trainer.one_step
    def one_step(trainer):
        if trainer.step == wanted:
            act(trainer)
        return original(trainer)
    Trainer.one_step = one_step
"""
"""A worker that something happens to: what stands between this and its last line."""


def _spec(make_spec: MakeSpec, name: str, processes: int, **sections: Any) -> RunSpec:
    cluster = {"preset": "local", "gpus": processes, "gpus_per_node": processes, "scale_up_domain": processes}
    given = {"cluster": cluster, "checkpoint": {"every_steps": 5}, "guard": {"hang": HANG_S}, **sections}
    return make_spec(name, given, micro_batch=1)


def _train_with(spec: RunSpec, code: str, folder: Path) -> Processes:
    """Train a run on processes of which some meet with an accident."""
    script, pulses = folder / f"{spec.name}.py", folder / f"{spec.name}-pulses"
    script.write_text(f"{WORKER}{code}\nsys.exit(worker.main(sys.argv[1:]))\n")
    pulses.mkdir()
    with open_run(spec) as session:
        prepare_data(session, NoView())
        record = RunRecord(session.folder)
        work = Processes(
            [str(script), str(session.folder), "--pulse", str(pulses)],
            spec.cluster.gpus,
            session.folder / "processes",
            FINAL_CODES,
            lambda: float(len(record.checkpoints())),
            Watchdog(pulses, spec.cluster.gpus, HANG_S),
            preload=PRELOADED,
        )
        deadline = time.monotonic() + 240
        try:
            while not work.wait(0.1):
                assert time.monotonic() < deadline
        finally:
            work.kill()
        session.reread()
    return work


def _losses(name: str) -> list[float]:
    return [row["loss"] for row in RunRecord(name).metrics()]


_UNDISTURBED: list[float] = []


@pytest.fixture
def undisturbed(make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of a run on two processes to which nothing happens; trained once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not _UNDISTURBED:
        assert _train_with(_spec(make_spec, "undisturbed", 2), "", tmp_path).failure is None
        _UNDISTURBED.extend(_losses("undisturbed"))
    return _UNDISTURBED


@pytest.mark.parametrize(
    ("accident", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "process 1 has given no sign of life for"),
        ("time.sleep(600)", " has been in one step for"),
    ],
)
def test_a_process_that_hangs_is_found_and_the_run_ends_as_if_nothing_had_been(
    make_spec: MakeSpec,
    tmp_path: Path,
    undisturbed: list[float],
    caplog: pytest.LogCaptureFixture,
    accident: str,
    words: str,
) -> None:
    code = f"if rank == 1 and attempt == 0:\n    at_step(17, lambda trainer: {accident})"
    work = _train_with(_spec(make_spec, "hung", 2), code, tmp_path)
    assert work.failure is None
    assert work.restarts >= 1
    assert words in caplog.text
    assert _losses("hung") == undisturbed


def test_a_process_whose_weights_are_corrupted_is_named_and_all_start_again_from_before(
    make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
def flip(trainer):
    import torch
    from modelworks.train.parallelize import local
    weights = local(next(trainer.decoder.parameters())).detach()
    weights.view(torch.int32).flatten()[5] ^= 1
if rank == 2 and attempt == 0:
    at_step(17, flip)
"""
    shared = {"parallel": {"zero_stage": 0}, "guard": {"hang": HANG_S, "agreement_every": 4}}
    assert _train_with(_spec(make_spec, "sound", 4, **shared), "", tmp_path).failure is None
    work = _train_with(_spec(make_spec, "corrupted", 4, **shared), code, tmp_path)
    assert work.failure is None
    assert "at step 20 process 2 holds other weights than the majority" in caplog.text
    assert _losses("corrupted") == _losses("sound")


@pytest.mark.parametrize(
    "accident",
    [
        "if rank == 1: time.sleep(8)",
        "import datetime; skew = {0: -86400.0, 1: 3 * 3600.0}[rank]; now = time.time; time.time = lambda: now() + skew",
    ],
    ids=["joins late", "clocks apart"],
)
def test_a_late_process_and_clocks_apart_make_no_difference(
    make_spec: MakeSpec, tmp_path: Path, undisturbed: list[float], accident: str
) -> None:
    work = _train_with(_spec(make_spec, "odd", 2), accident, tmp_path)
    assert work.failure is None
    assert _losses("odd") == undisturbed


def test_processes_of_unequal_software_are_refused_in_a_sentence(make_spec: MakeSpec, tmp_path: Path) -> None:
    code = "if rank == 1:\n    import torch\n    torch.__version__ = '2.12.0'"
    work = _train_with(_spec(make_spec, "unequal", 2), code, tmp_path)
    assert work.failure is not None
    assert (work.failure.rank, work.failure.exit_code) == (1, 2)
    assert work.failure.last_words.startswith("process 1 has Modelworks ")
    assert "PyTorch 2.12.0" in work.failure.last_words
    assert work.failure.last_words.endswith("the same on every node is accepted")


def test_a_rendezvous_port_in_use_is_said(make_spec: MakeSpec) -> None:
    spec = _spec(make_spec, "port", 2)
    folder = runs_folder() / "port"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(dumps(spec))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ended = subprocess.run(
            [sys.executable, "-m", "modelworks.train.worker", str(folder)],
            env={**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ended.returncode == 3
    words = f"the processes can't meet at 127.0.0.1:{port}: the port is in use by another program"
    assert ended.stderr.splitlines()[-1] == words


def test_a_checkpoint_of_another_model_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec("mine", tokens=10 * 128)
    with open_run(spec) as session:
        train(session)
    other = make_spec("other", {"model": {"hidden": 32}}, tokens=10 * 128)
    with open_run(other) as session:
        train(session)
    for path in RunRecord("mine").checkpoints():
        shutil.rmtree(path)
    shutil.copytree(RunRecord("other").checkpoints()[-1], RunRecord("mine").folder / "checkpoints" / "step-00000010")
    mine = tmp_path / "mine.toml"
    mine.write_text(dumps(spec))
    ended = subprocess.run(
        [sys.executable, "-m", "modelworks", "train", str(mine), "--resume", "--set", "train.tokens=2560"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "doesn't fit this run" in " ".join(ended.stderr.split())


@contextlib.contextmanager
def _disk(folder: Path, options: str) -> Iterator[None]:
    """A small disk under a folder."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")


class Command:
    """`modelworks train` on two processes."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelworks", "train", str(path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def close(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def command(write_spec: WriteSpec) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(spec: RunSpec, *arguments: str) -> Command:
        started.append(Command(write_spec(spec), *arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


def _saved(name: str, count: int = 1) -> bool:
    return len(list((runs_folder() / name / "checkpoints").glob("step-*"))) >= count


def test_a_disk_that_fills_up_behind_the_steps_ends_the_run_in_a_sentence_and_frees_it_again(
    make_spec: MakeSpec, command: Callable[..., Command]
) -> None:
    spec = _spec(make_spec, "full", 2)
    folder = runs_folder() / "full"
    # A checkpoint takes about 1.4 MB: there is room for one and not for a second beside it.
    with _disk(folder, "size=2500k"):
        one = command(spec)
        _, errors = one.process.communicate(timeout=120)
        assert one.process.returncode == 1
        assert "cannot be written" in errors
        assert "Traceback" not in errors
        assert RunRecord("full").status().state == "failed"
        assert checkpoint.newest_good(folder).name == "step-00000005"
        assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_folder_that_cannot_be_written_is_said(
    make_spec: MakeSpec, command: Callable[..., Command], when: str
) -> None:
    spec = make_spec("closed", {"checkpoint": {"every_steps": 5}}, tokens=10_000_000)
    folder = runs_folder() / "closed"
    checkpoints = str(folder / "checkpoints")
    with _disk(folder, "size=20m" if when == "meanwhile" else "size=20m,ro"):
        one = command(spec)
        if when == "meanwhile":
            one.wait_for(lambda: _saved("closed"))
            _mount("--bind", checkpoints, checkpoints)
            _mount("-o", "remount,bind,ro", checkpoints)
        _, errors = one.process.communicate(timeout=120)
        assert one.process.returncode == 1
        assert "cannot be written: Read-only file system" in " ".join(errors.split())
        assert "Traceback" not in errors
        if when == "meanwhile":
            assert checkpoint.newest_good(folder)
            subprocess.run(["umount", "-l", checkpoints], check=True)


def test_a_request_to_end_while_a_checkpoint_is_in_the_air_saves_the_last_step_in_time(
    make_spec: MakeSpec, command: Callable[..., Command]
) -> None:
    spec = make_spec(
        "asked",
        {"checkpoint": {"every_steps": 1}, "cluster": _spec(make_spec, "asked", 2).cluster.model_dump()},
        tokens=10_000_000,
    )
    one = command(spec)
    one.wait_for(lambda: _saved("asked", 2))
    asked = time.monotonic()
    one.process.send_signal(signal.SIGTERM)
    _, errors = one.process.communicate(timeout=60)
    assert time.monotonic() - asked < 30.0
    assert one.process.returncode == 0, errors
    record = RunRecord("asked")
    assert (record.status().state, record.status().step) == ("stopped", len(record.metrics()))
    assert checkpoint.newest_good(record.folder).name == f"step-{record.status().step:08d}"
    assert not list((record.folder / "checkpoints").glob(".*"))
