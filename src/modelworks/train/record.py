"""What a run has left in its folder, for those who look at it: lists, status, metrics, stopping.

Three ideas: everything is read from plain files, so that looking at a run needs neither PyTorch nor the process that
trains it; a process is known by its id and its start time together, so that a reused id is never mistaken for ours;
metrics are read on from where the last reading ended.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import signal
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import psutil

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.fields import nearest, validate
from modelworks.spec.home import ENGINE_FILE, runs_folder, write_atomically
from modelworks.spec.run import RunSpec

State = Literal["preparing", "running", "finished", "stopped", "failed", "crashed"]
"""`crashed` is never written: it is how a run shows whose process is gone without having said why."""
LOCK = ".lock"
"""The file in a run's folder that the process which trains there holds locked."""
STARTUP_S = 60.0
"""How long a run may be without a status before it counts as crashed."""
ACTIVE: tuple[State, ...] = ("preparing", "running")


@dataclass(frozen=True)
class Status:
    """Where a run stands; the content of ``status.json``. Times are Unix seconds."""

    state: State
    pid: int | None = None
    process_started: float | None = None
    """When the process began, as the system states it: with `pid` it names one process for ever."""
    host: str | None = None
    """The machine that the process runs on."""
    started: float | None = None
    updated: float | None = None
    step: int = 0
    steps: int | None = None
    tokens: int = 0
    loss: float | None = None
    validation_bpb: float | None = None
    reward: float | None = None
    """What the network's replies were worth in the last step, where it learns from rewards."""
    tokens_per_s: float | None = None
    mfu: float | None = None
    eta_s: float | None = None
    message: str | None = None
    released: bool = False
    served_as: str | None = None
    """The name under which the chat offers the released model."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @property
    def active(self) -> bool:
        """Whether a process is at work on the run."""
        return self.state in ACTIVE

    @property
    def here(self) -> bool:
        """Whether that process is, or was, on this machine."""
        return self.host in (None, platform.node())


class RunRecord:
    """One run's folder, read.

    Raises
    ------
    InputError
        On construction, if there is no such run; the nearest name is given.
    """

    def __init__(self, run: str | Path) -> None:
        path = Path(run)
        if isinstance(run, str) and path.name == run:
            path = runs_folder() / run
        self.folder = path
        if not (path / "run.toml").is_file():
            known = [record.name for record in list_runs()]
            raise InputError(f"there is no run {str(run)!r}; {nearest(path.name, known)}")

    @staticmethod
    def exists(name: str) -> bool:
        """Whether there is a run of that name."""
        return (runs_folder() / name / "run.toml").is_file()

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.folder.name

    @property
    def on_engine(self) -> bool:
        """Whether the run was given to an engine, which alone knows whether it is at work."""
        return (self.folder / ENGINE_FILE).exists()

    def spec(self) -> RunSpec:
        """The spec that the run was started with."""
        text = (self.folder / "run.toml").read_text(encoding="utf-8")
        return validate(RunSpec, tomllib.loads(text), where=str(self.folder / "run.toml"))

    def status(self) -> Status:
        """Where the run stands now; a run whose process is gone without a last word is `crashed`. What is trained on
        another machine, or on an engine, is taken at its word."""
        status = read_status(self.folder)
        if status is None and self.on_engine:
            return Status("preparing")
        if status is None:
            begun = (self.folder / "run.toml").stat().st_mtime
            return Status("preparing" if time.time() - begun < STARTUP_S else "crashed", started=begun)
        if not status.here or self.on_engine:
            return status
        if status.active and _process(status) is None:
            # The process may have written its last word between our reading and our looking for it.
            status = read_status(self.folder) or status
        if status.active and _process(status) is None:
            message = "the process is gone; the run can be resumed"
            return Status(**{**status.as_dict(), "state": "crashed", "message": message, "eta_s": None})
        return status

    def metrics(self) -> list[dict[str, Any]]:
        """All logged steps."""
        rows, _ = MetricsReader(self.folder).read()
        return rows

    def plan(self) -> dict[str, Any] | None:
        """What was predicted before the run began, if it was."""
        return _read_json(self.folder / "plan.json")

    def log(self, lines: int = 20) -> str:
        """The last lines that a run in the background printed."""
        path = self.folder / "train.log"
        if not path.is_file():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def checkpoints(self) -> list[Path]:
        """The folders of committed checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def stop(self, wait_s: float = 0.0) -> bool:
        """Ask the run's process to save and stop.

        Parameters
        ----------
        wait_s
            How long to wait until it has.

        Returns
        -------
        bool
            Whether the process has ended (within `wait_s`).

        Raises
        ------
        OperationError
            If the run isn't at work, or its process may not be signalled.
        """
        status = self.status()
        process = _process(status)
        if self.on_engine:
            raise OperationError(f"run {self.name} was given to an engine: modelworks runs stop {self.name}")
        if not status.here:
            raise OperationError(f"run {self.name} is trained by process {status.pid} on {status.host}: stop it there")
        if not status.active or process is None:
            raise OperationError(f"run {self.name} is not at work: it is {status.state}")
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            raise OperationError(f"run {self.name} belongs to another user (process {process.pid})") from None
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(wait_s)
            return True
        return False


class MetricsReader:
    """Reads ``metrics.jsonl`` on from where the last reading ended.

    A resume cuts the file back to its checkpoint's step. The reader notices, since the last line that it has read no
    longer stands where it stood, and begins anew.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._offset = 0
        self._last = b""

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The steps logged since the last call, and whether the file was cut back (these rows are then all rows)."""
        try:
            with self._path.open("rb") as file:
                restarted = not self._still_there(file)
                if restarted:
                    self._offset, self._last = 0, b""
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            restarted, self._offset, self._last = self._offset > 0, 0, b""
            return [], restarted
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self._offset += len(whole)
            self._last = whole[whole[:-1].rfind(b"\n") + 1 :]
        return [json.loads(line) for line in whole.splitlines()], restarted

    def _still_there(self, file: Any) -> bool:
        file.seek(self._offset - len(self._last))
        return bool(file.read(len(self._last)) == self._last)


def list_runs() -> list[RunRecord]:
    """All runs on this machine, the newest first."""
    found = sorted(runs_folder().glob("*/run.toml"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [RunRecord(path.parent) for path in found]


def read_status(folder: Path) -> Status | None:
    """``status.json`` as it was written, or nothing if there is none."""
    values = _read_json(folder / "status.json")
    if values is None:
        return None
    known = {field.name for field in fields(Status)}
    return Status(**{key: value for key, value in values.items() if key in known})


def write_status(folder: Path, status: Status) -> None:
    """Write ``status.json`` atomically, stamped with the time.

    Raises
    ------
    OSError
        If the disk is full or the folder is gone.
    """
    values = {**status.as_dict(), "updated": time.time()}
    write_atomically(folder / "status.json", json.dumps(values, indent=1) + "\n")


def own_process() -> dict[str, Any]:
    """This process's identity, as fields of a `Status`."""
    return _identity(psutil.Process())


def parent_process() -> dict[str, Any]:
    """The identity of the process that started this one, as fields of a `Status`."""
    parent = multiprocessing.parent_process()  # A fork server between the two doesn't count.
    return _identity(psutil.Process(os.getppid() if parent is None else parent.pid))


def _identity(process: psutil.Process) -> dict[str, Any]:
    return {"pid": process.pid, "process_started": process.create_time(), "host": platform.node()}


def _process(status: Status) -> psutil.Process | None:
    """The living process that wrote a status."""
    if status.pid is None or status.process_started is None:
        return None
    try:
        process = psutil.Process(status.pid)
        same = abs(process.create_time() - status.process_started) < 2.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
