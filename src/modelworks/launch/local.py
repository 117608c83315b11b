"""Runs on this machine, in the background: `python -m modelworks train` in a session of its own.

The process outlives the one that started it, gives way to whatever else the machine does (nice 10), and prints into
``train.log`` in the run's folder. `start` returns when the run has reported itself, so that a run which can't begin
is an error here and not a silent absence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import dumps
from modelworks.spec.home import runs_folder, write_atomically
from modelworks.spec.run import RunSpec

_NICE = 10
_STARTUP_S = 60.0


def start(spec: RunSpec, threads: int | None = None, wait_s: float = _STARTUP_S) -> int:
    """Train a new run in the background.

    Parameters
    ----------
    spec
        The run; paths in it must be absolute.
    threads
        Threads it computes with; all processors if unset.
    wait_s
        How long to wait for its first report.

    Returns
    -------
    int
        The process's id.

    Raises
    ------
    InputError
        If the run's name is taken.
    OperationError
        If the process ends before it has reported itself; with its last words.
    """
    folder = runs_folder() / spec.name
    if (folder / "status.json").exists():
        raise InputError(f"name = {spec.name!r} is taken by a run in {folder}; resume it, or give another name")
    write_atomically(folder / "run.toml", dumps(spec))
    return _launch(folder, [], threads, wait_s)


def resume(name: str, threads: int | None = None, wait_s: float = _STARTUP_S) -> int:
    """Go on with a run in the background; parameters and errors as of `start`."""
    folder = runs_folder() / name
    if not (folder / "run.toml").is_file():
        raise InputError(f"there is no run {name!r} to go on with in {folder.parent}")
    return _launch(folder, ["--resume"], threads, wait_s)


def _launch(folder: Path, options: list[str], threads: int | None, wait_s: float) -> int:
    command = [sys.executable, "-m", "modelworks", "train", str(folder / "run.toml"), *options]
    # Unbuffered, so that the log can be followed and holds the last words of a run that is killed.
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    try:
        with (folder / "train.log").open("ab") as log:
            process = subprocess.Popen(
                ["nice", "-n", str(_NICE), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise OperationError(f"run {folder.name} cannot be started: {error.strerror}") from error
    deadline = time.monotonic() + wait_s
    while _reporting_process(folder / "status.json") != process.pid:
        if process.poll() is not None:
            raise OperationError(f"run {folder.name} ended at once: {_last_words(folder / 'train.log')}")
        if time.monotonic() > deadline:
            process.terminate()
            raise OperationError(f"run {folder.name} did not report itself within {wait_s:.0f} s and was ended")
        time.sleep(0.05)
    return process.pid


def _reporting_process(status: Path) -> int | None:
    """The process that last wrote a run's status."""
    try:
        pid = json.loads(status.read_text(encoding="utf-8")).get("pid")
    except (OSError, ValueError):
        return None
    return pid if isinstance(pid, int) else None


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
