"""Copies of a run's checkpoints elsewhere (`checkpoint.to`), made in the background while the run goes on.

Three ideas. Checkpoints are committed on this machine as ever; a thread looks for the newest one, links its files so
that rotation can't take them away, and sends them, the manifest last: a copy without a manifest doesn't exist. Sending
never delays a step, and a copy that fails is a warning, not the end of the run; only the last one must succeed. A run
that is resumed where it has never been fetches the newest copy that is whole, and then goes on as from its own.

::

    TO/NAME/run.toml, tokenizer.json, data.json, plan.json, metrics.jsonl
    TO/NAME/checkpoints/step-00000040/...
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from modelworks.data.remote import fetch, file_system, patiently, send
from modelworks.model import checkpoint
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.run import RunSpec
from modelworks.train.record import LOCK

logger = logging.getLogger(__name__)
_LOOK_S = 1.0
_MANIFEST = "manifest.json"
_RUN_FILES = ("run.toml", "tokenizer.json", "data.json", "plan.json", "metrics.jsonl")
_OUTBOX = ".outbox"


class Copies:
    """The copies of one run's checkpoints; as a context manager it makes them.

    Parameters
    ----------
    spec
        The run; its ``checkpoint.to`` must be set.
    folder
        The run's folder on this machine.

    Raises
    ------
    InputError
        If the URL can't be used here.
    """

    def __init__(self, spec: RunSpec, folder: Path) -> None:
        assert spec.checkpoint.to is not None
        self._folder, self._keep = folder, spec.checkpoint.keep
        self._system, base = file_system(spec.checkpoint.to, "checkpoint.to")
        self._base = f"{base}/{spec.name}"
        self._url = f"{spec.checkpoint.to.rstrip('/')}/{spec.name}"
        self._sent: Path | None = None
        self._tried: Path | None = None
        self._end, self._thread = threading.Event(), threading.Thread(target=self._run, name="copies", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if kind is None:
            self._thread.join()
        shutil.rmtree(self._folder / _OUTBOX, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps of the copies that are whole, newest first."""

        def manifests() -> list[str]:
            self._system.invalidate_cache()
            return list(self._system.glob(f"{self._base}/checkpoints/step-*/{_MANIFEST}"))

        names = [path.split("/")[-2] for path in patiently(manifests, f"{self._url} cannot be listed")]
        return sorted((checkpoint.step_of(Path(name)) for name in names), reverse=True)

    def refuse_taken(self) -> None:
        """Refuse to begin a run anew where another of its name has its copies."""
        if steps := self.steps():
            raise InputError(
                f"name is taken by a run whose checkpoint of step {steps[0]} is in {self._url}; go on with it by "
                "--resume, or give another name"
            )

    def fetch(self) -> int | None:
        """Bring the newest copy to this machine, if it is newer than what is here.

        Returns
        -------
        int or None
            Its step; None if nothing was fetched.

        Raises
        ------
        OperationError
            If the copies can't be reached.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._folder / LOCK, timeout=0):
                return self._fetch()
        except Timeout:  # whoever trains there has what is newest
            return None

    def finish(self) -> None:
        """Send the newest checkpoint, if it hasn't been sent yet.

        Raises
        ------
        OperationError
            If it can't be sent.
        """
        self._end.set()
        self._thread.join()
        newest = checkpoint.folders(self._folder)
        if newest and newest[0] != self._sent:
            self._send(newest[0])

    def _run(self) -> None:
        while not self._end.wait(_LOOK_S):
            newest = checkpoint.folders(self._folder)
            if newest and newest[0] not in (self._sent, self._tried):
                try:
                    self._send(newest[0])
                except OperationError as error:
                    logger.warning("%s; the next checkpoint will be tried", error)
                    self._tried = newest[0]

    def _send(self, folder: Path) -> None:
        """Copy one checkpoint, and let go of the oldest copies."""
        outbox = self._folder / _OUTBOX
        shutil.rmtree(outbox, ignore_errors=True)
        outbox.mkdir()
        try:
            for file in folder.iterdir():
                os.link(file, outbox / file.name)
        except FileNotFoundError:  # rotated away meanwhile: there is a newer one
            return
        target = f"{self._base}/checkpoints/{folder.name}"
        for name in _RUN_FILES:
            if (self._folder / name).exists():
                # A copy, since metrics grow while they are sent.
                shutil.copyfile(self._folder / name, outbox / f".{name}")
                send(self._system, outbox / f".{name}", f"{self._base}/{name}")
        for file in sorted(outbox.iterdir()):
            if file.name != _MANIFEST and not file.name.startswith("."):
                send(self._system, file, f"{target}/{file.name}")
        send(self._system, outbox / _MANIFEST, f"{target}/{_MANIFEST}")
        shutil.rmtree(outbox)
        self._sent = folder
        for step in self.steps()[self._keep :]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        old = f"{self._base}/checkpoints/{checkpoint.folder_of(self._folder, step).name}"

        def manifest_first() -> None:
            if self._system.exists(f"{old}/{_MANIFEST}"):
                self._system.rm_file(f"{old}/{_MANIFEST}")
            if self._system.exists(old):
                self._system.rm(old, recursive=True)

        patiently(manifest_first, f"{old} cannot be removed")

    def _fetch(self) -> int | None:
        here = -1
        if checkpoint.folders(self._folder):
            try:
                here = checkpoint.step_of(checkpoint.newest_good(self._folder))
            except OperationError as error:
                logger.warning("%s; a copy is looked for in %s", error, self._url)
        for step in self.steps():
            if step <= here:
                return None
            try:
                self._fetch_step(step)
            except OperationError as error:
                logger.warning("%s; an older copy is looked for", error)
                continue
            for name in _RUN_FILES:
                if name != "run.toml" or not (self._folder / name).exists():
                    self._fetch_if_there(name)
            return step
        return None

    def _fetch_step(self, step: int) -> None:
        target = checkpoint.folder_of(self._folder, step)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        source = f"{self._base}/checkpoints/{target.name}"
        try:
            fetch(self._system, f"{source}/{_MANIFEST}", temporary / _MANIFEST)
            for name in _names(temporary / _MANIFEST):
                fetch(self._system, f"{source}/{name}", temporary / name)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one
            temporary.rename(target)
            checkpoint.verify(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            raise

    def _fetch_if_there(self, name: str) -> None:
        remote = f"{self._base}/{name}"
        if patiently(lambda: bool(self._system.exists(remote)), f"{remote} cannot be looked for"):
            fetch(self._system, remote, self._folder / name)


def _names(manifest: Path) -> list[str]:
    """The files that a manifest lists; none of them may lead out of its folder.

    Raises
    ------
    OperationError
        If it isn't a manifest.
    """
    try:
        files: dict[str, Any] = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OperationError(f"{manifest.parent.name}: the copy's manifest cannot be read") from None
    for name in files:
        if Path(name).name != name or name in (".", ".."):
            raise OperationError(f"{manifest.parent.name}: the copy's manifest names {name!r}, which is no file of it")
    return list(files)
