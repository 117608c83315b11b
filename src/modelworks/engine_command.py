"""Runs on engines, for the commands: submitting one, and a record that also asks the engine.

`EngineRecord` is a `RunRecord` whose status is the file's word where the run is at work and the engine's where it
isn't: a run that waits for machines, or whose job is gone, can't say so itself. Whoever shows runs takes them from
`record_of` and `all_records` and needn't know where they are trained.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from modelworks.launch.engine import Job
from modelworks.launch.engines import engine
from modelworks.launch.submission import Submission, read_submission
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import dumps
from modelworks.spec.home import ENGINE_FILE, runs_folder, write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train.record import RunRecord, Status, list_runs, read_status

_LOOK_S = 1.0


class EngineRecord(RunRecord):
    """The record of a run that was given to an engine."""

    def __init__(self, folder: Path, submission: Submission) -> None:
        super().__init__(folder)
        self._engine, self._submission = engine(submission.engine), submission

    def status(self) -> Status:
        """Where the run stands: by its own word while it works, else by its engine's."""
        known = read_status(self.folder)
        submission = read_submission(self.folder) or self._submission
        status = known or Status("preparing", started=submission.submitted)
        if status.state == "finished" and known is not None and not _newer(submission, status):
            return status
        try:
            job = self._engine.job(self.folder, submission)
        except (InputError, OperationError) as error:
            return replace(status, message=f"{self._engine.name} cannot be asked: {error}")
        return _combined(status, known is not None, job, submission)

    def log(self, lines: int = 20) -> str:
        """The last lines that the run printed, wherever it did."""
        return self._engine.log(self.folder, self._submission, lines)

    def stop(self, wait_s: float = 0.0) -> bool:
        """Ask the run to save and stop; as `RunRecord.stop`."""
        if not (status := self.status()).active:
            raise OperationError(f"run {self.name} is not at work: it is {status.state}")
        self._engine.stop(self.folder, read_submission(self.folder) or self._submission)
        deadline = time.monotonic() + wait_s
        while (active := self.status().active) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return not active


def _newer(submission: Submission, status: Status) -> bool:
    """Whether the run was submitted after it last spoke."""
    return status.updated is not None and submission.submitted > status.updated


def _combined(status: Status, spoke: bool, job: Job, submission: Submission) -> Status:
    if job.state == "waiting":
        return replace(status, state="preparing", message=job.words, eta_s=None)
    if job.state == "running":
        # Between attempts the file still has the last one's end.
        if status.active and spoke:
            return status if status.message else replace(status, message=job.words)
        return replace(status, state="preparing", message=job.words, eta_s=None)
    if spoke and not status.active and not _newer(submission, status):
        return status
    if job.state == "ended" and not submission.stop:
        return replace(status, state="finished", message=job.words, eta_s=None)
    if job.state == "stopped" or submission.stop:
        return replace(status, state="stopped", message=job.words, eta_s=None)
    return replace(status, state="crashed", message=f"{job.words}; the run can be resumed", eta_s=None)


def record_of(run: str) -> RunRecord:
    """The record of a run, which asks its engine where it has one; errors as of `RunRecord`."""
    return _with_engine(RunRecord(run))


def all_records() -> list[RunRecord]:
    """All runs known here, the newest first."""
    return [_with_engine(record) for record in list_runs()]


def _with_engine(record: RunRecord) -> RunRecord:
    submission = read_submission(record.folder)
    return record if submission is None else EngineRecord(record.folder, submission)


def render(spec: RunSpec, on: str) -> str:
    """What `submit` would submit."""
    return engine(on).render(spec, runs_folder() / spec.name)


def submit(spec: RunSpec, on: str, resume: bool) -> Submission:
    """Give a run to an engine.

    Raises
    ------
    InputError
        If the run exists and `resume` is off, or there is none to resume, or the engine's tools are missing.
    OperationError
        If it is at work already, or the engine refuses it.
    """
    folder = runs_folder() / spec.name
    exists = (folder / "run.toml").is_file()
    if resume and not exists:
        raise InputError(f"--resume: there is no run {spec.name!r} to go on with in {folder.parent}")
    if exists and not resume and ((folder / "status.json").exists() or read_submission(folder)):
        raise InputError(
            f"name = {spec.name!r} is taken by a run in {folder}; go on with it by --resume, or give another name"
        )
    if exists and resume and (status := record_of(spec.name).status()).active:
        raise OperationError(f"run {spec.name} is {status.state} ({status.message}); stop it first")
    chosen = engine(on)
    if resume:
        from modelworks.train.session import refuse_changes

        refuse_changes(RunRecord(folder).spec(), spec)
    write_atomically(folder / "run.toml", dumps(spec))
    try:
        return chosen.submit(spec, folder)
    except (InputError, OperationError):
        _leave_nothing(folder, exists)
        raise


def take_back(run: str) -> None:
    """Let a run that an engine has had be trained on this machine.

    Raises
    ------
    OperationError
        If the engine is still at it.
    """
    folder = runs_folder() / run
    submission = read_submission(folder)
    if submission is None:
        return
    if (status := record_of(run).status()).active:
        raise OperationError(f"run {run} is {status.state} ({status.message}); stop it first")
    (folder / ENGINE_FILE).unlink()


def resume_run(run: str) -> str:
    """Go on with a run where it was trained before; returns in words where that is."""
    record = RunRecord(run)
    submission = read_submission(record.folder)
    if submission is None:
        from modelworks.launch import local

        return f"process {local.resume(record.name)}"
    return f"{submission.engine}'s job {submit(record.spec(), submission.engine, resume=True).job}"


def _leave_nothing(folder: Path, existed: bool) -> None:
    """Take back what a submission that failed has written."""
    if not existed:
        (folder / "run.toml").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
