"""An output folder that is whole or absent: it is built under a hidden name beside its place and then renamed.

What takes hours to build can go on where it was interrupted: the hidden folder of such work bears the work's own key,
stays when the work ends badly, and is found by the next attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from modelworks.spec.errors import InputError, OperationError


def refuse_existing(target: Path) -> None:
    """Raise an `InputError` if there is something at `target` already (an empty folder is nothing)."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists already and is not overwritten; give another place, or remove it first")


@contextmanager
def staged_folder(target: Path, replace: bool = False, key: str | None = None) -> Iterator[Path]:
    """A temporary folder that takes its place at `target` when the block ends well, and vanishes when it doesn't.

    Parameters
    ----------
    target
        Where the folder shall be; parents are made.
    replace
        Whether a folder that stands there gives way.
    key
        What the content depends on. Where it is given, the temporary folder stays when the block ends badly, and is
        given to the next one with this key, with all that it holds.

    Raises
    ------
    InputError
        If something stands at `target` and isn't to be replaced, or another process is at work on it with this key.
    OperationError
        If the folder can't be written, such as on a full disk.
    """
    target = target.expanduser().absolute()
    if not replace:
        refuse_existing(target)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if key is None:
                temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
                stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            else:
                temporary = target.parent / f".{target.name}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.part"
                stack.enter_context(_alone(temporary.with_suffix(".lock"), target))
                temporary.mkdir(exist_ok=True)
        except OSError as error:
            raise OperationError(f"{target} cannot be written: {error.strerror or error}") from None
        try:
            yield temporary
        except InputError:  # what was refused is built of something else next time
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except OSError as error:
            raise OperationError(f"{target} cannot be written: {error.strerror or error}") from error
        try:
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(0o644)  # let others read it
                    flush(path)
            temporary.chmod(0o755)
            _take_place(temporary, target)
        except OSError as error:
            raise OperationError(f"{target} cannot be written: {error.strerror or error}") from error


@contextmanager
def _alone(lock: Path, target: Path) -> Iterator[None]:
    try:
        with FileLock(lock, blocking=False):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise InputError(f"{target} is being written by another process; wait for it, or end it") from None


def flush(file: Path) -> None:
    """Bring a file's content to the disk, so that a rename never comes before it."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(temporary: Path, target: Path) -> None:
    if not target.is_dir():
        temporary.rename(target)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
