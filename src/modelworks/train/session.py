"""One process's hold on a run's folder: the lock, the spec, and the status that others read.

`open_run` makes or reopens the folder and keeps every other process out of it. Whatever ends the work inside, an
error or a signal, becomes the run's last status, so that a run never looks alive when it isn't.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import dumps
from modelworks.spec.home import runs_folder, write_atomically
from modelworks.spec.run import RunSpec
from modelworks.train.interrupt import Interrupt, Interrupted, ParentInterrupt
from modelworks.train.record import LOCK, RunRecord, Status, own_process, parent_process, read_status, write_status

logger = logging.getLogger(__name__)
_STATUS_EVERY_S = 1.0
_MAY_CHANGE = {
    "train": {
        "tokens",
        "max_time",
        "micro_batch",
        "log_every",
        "trace_steps",
        "validate_every",
        "validation_tokens",
        "compile",
    },
    "checkpoint": None,
    "guard": None,
    "release": None,
    "cluster": None,
    "parallel": None,
    "launch": None,
}
"""What a resume may change: fields of a section, or (None) the whole section."""


class RunSession:
    """A run that this process holds.

    Attributes
    ----------
    folder, spec
        The run's folder and its spec.
    resume
        Whether there is an earlier part to go on from.
    interrupt
        The signals that ask this process to stop.
    status
        What was last reported.
    pulse
        Told that the work goes on, and how many seconds until it is told again at the latest.
    """

    def __init__(
        self, folder: Path, spec: RunSpec, resume: bool, interrupt: Interrupt, process: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.spec, self.resume, self.interrupt = folder, spec, resume, interrupt
        self.pulse: Callable[[float], None] = lambda patience_s: None
        earlier = read_status(folder) if resume else None
        self.status = replace(
            earlier or Status("preparing"),
            state="preparing",
            started=time.time(),
            message=None,
            released=False,
            served_as=None,
            eta_s=None,
            **(process or own_process()),
        )
        self._written = 0.0
        self.report()

    def reread(self) -> None:
        """Take over the status that the run's own processes have written meanwhile."""
        self.status = read_status(self.folder) or self.status

    def report(self, **changes: Any) -> None:
        """Change the status; it is written when its state or message changes, and otherwise once a second at most.

        Raises
        ------
        OperationError
            If it can't be written, such as on a full disk.
        """
        before, self.status = self.status, replace(self.status, **changes)
        news = (before.state, before.message) != (self.status.state, self.status.message)
        if news or time.monotonic() - self._written >= _STATUS_EVERY_S:
            try:
                write_status(self.folder, self.status)
            except OSError as error:
                raise OperationError(f"the run's folder {self.folder} cannot be written: {error.strerror}") from error
            self._written = time.monotonic()

    def report_end(self, state: str, message: str) -> None:
        """The last status of a run that didn't finish; on a full disk it is only logged."""
        try:
            self.report(state=state, message=message, eta_s=None)
        except OperationError as error:
            logger.warning("%s", error)


@contextlib.contextmanager
def open_run(spec: RunSpec, resume: bool = False, folder: Path | None = None) -> Iterator[RunSession]:
    """Hold a run's folder while training in it.

    Parameters
    ----------
    spec
        The run; its name is that of the folder.
    resume
        Go on with a run that was begun; it may be given more tokens or time, and other checkpoints and releases.
    folder
        Where the run is kept, if not in the home folder.

    Raises
    ------
    InputError
        If the run exists and `resume` is off, if there is none to resume, or if `spec` is another run's.
    OperationError
        If another process is training in the folder.
    """
    folder = folder or runs_folder() / spec.name
    if resume and not (folder / "run.toml").is_file():
        raise InputError(f"--resume: there is no run {folder.name!r} to go on with in {folder.parent}")
    # Signals are ours before the first status is written: who reads it may ask the run to stop at once.
    with _locked(folder), Interrupt() as interrupt:
        _check(folder, spec, resume)
        write_atomically(folder / "run.toml", dumps(spec))
        session = RunSession(folder, spec, resume, interrupt)
        try:
            yield session
        except Interrupted as stop:
            if session.status.active:
                session.report_end("stopped", str(stop))
            raise
        except BaseException as error:
            if session.status.active:
                session.report_end("failed", str(error) or type(error).__name__)
            raise


class MemberSession(RunSession):
    """A hold on the run's folder for one of several processes, which another process has opened for them.

    The status names that other process, their parent; the first process alone writes it. Signals are noted from the
    beginning, since the parent ends what doesn't listen; a parent that is gone asks to stop as well.
    """

    def __init__(self, folder: Path, spec: RunSpec, resume: bool, first: bool) -> None:
        self._first = first
        interrupt = ParentInterrupt()
        super().__init__(folder, spec, resume, interrupt, parent_process())

    def report(self, **changes: Any) -> None:
        """Change the status, which the first process also writes."""
        if self._first:
            super().report(**changes)
        else:
            self.status = replace(self.status, **changes)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        status = read_status(folder)
        process = f" (process {status.pid})" if status and status.pid else ""
        raise OperationError(
            f"run {folder.name} is being trained by another process{process}; stop it first: "
            f"modelworks runs stop {folder.name}"
        ) from None
    except OSError as error:
        raise OperationError(f"the run's folder {folder} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _check(folder: Path, spec: RunSpec, resume: bool) -> None:
    """Refuse to mix two runs. A run without a checkpoint has nothing to lose and may be begun anew."""
    has_checkpoint = any((folder / "checkpoints").glob("step-*"))
    if has_checkpoint and not resume:
        raise InputError(
            f"name = {folder.name!r} is taken by a run in {folder}; go on with it by --resume, or give another name, "
            f"such as --set name={folder.name}-2"
        )
    if has_checkpoint:
        refuse_changes(RunRecord(folder).spec(), spec)


def refuse_changes(before: RunSpec, now: RunSpec) -> None:
    """Refuse to go on with a run under a spec that would have given other weights."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for section, values in new.items():
        may_change = _MAY_CHANGE.get(section, set())
        if section == "adapter" and (values is None) != (old[section] is None):
            raise InputError("--resume: [adapter] differs from the run's; what is trained may not change")
        if may_change is None or not isinstance(values, dict):
            continue
        for field, value in values.items():
            if field not in may_change and value != old[section][field]:
                raise InputError(
                    f"--resume: {section}.{field} = {value!r} differs from the run's {old[section][field]!r}; only "
                    "train.tokens, train.max_time, what is logged and validated, [checkpoint], [guard], [launch] and "
                    "[release] may change"
                )
