"""What every engine can do with a run: show what it would submit, submit it, say where it stands, stop it.

An engine is a module's class without state of its own; what it must remember is in the run's folder
(`launch.submission`). Whatever a cluster's tool answers that isn't an answer becomes an `OperationError` with the
tool's words.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from modelworks.launch.submission import Submission
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.run import RunSpec

JobState = Literal["waiting", "running", "stopped", "ended", "failed", "gone"]
"""`waiting` for machines (at first or between attempts); `stopped` by whoever asked for it; `gone`: the engine no
longer knows the job."""


@dataclass(frozen=True)
class Job:
    """Where a job stands, and in the engine's words."""

    state: JobState
    words: str


class Engine(Protocol):
    """One kind of cluster."""

    name: str

    def render(self, spec: RunSpec, folder: Path) -> str:
        """What would be submitted."""

    def submit(self, spec: RunSpec, folder: Path) -> Submission:
        """Give the run to the cluster; its folder holds ``run.toml``."""

    def job(self, folder: Path, submission: Submission) -> Job:
        """Where the run's job stands."""

    def stop(self, folder: Path, submission: Submission) -> None:
        """Ask the run to save and stop, or withdraw it where it hasn't begun."""

    def log(self, folder: Path, submission: Submission, lines: int) -> str:
        """The last lines that the run has printed."""


def answer(
    command: list[str],
    timeout_s: float = 60.0,
    given: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a cluster's tool prints, `given` its input.

    Raises
    ------
    InputError
        If the tool isn't installed here.
    OperationError
        If it fails, with its last line.
    """
    if shutil.which(command[0]) is None:
        raise InputError(f"{command[0]} is not installed here; it is needed to talk to the cluster")
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise OperationError(f"{command[0]} didn't answer within {timeout_s:.0f} s") from None
    if done.returncode:
        words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise OperationError(f"{' '.join(command[:2])} failed: {words[-1] if words else f'code {done.returncode}'}")
    return done.stdout


def log_tail(path: Path, lines: int) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""
