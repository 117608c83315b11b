"""An output folder that is whole or absent: it is built under a hidden name beside its place and then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelworks.spec.errors import InputError, OperationError


def refuse_existing(target: Path) -> None:
    """Raise an `InputError` if there is something at `target` already (an empty folder is nothing)."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists already and is not overwritten; give another place, or remove it first")


@contextmanager
def staged_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that takes its place at `target` when the block ends well, and vanishes when it doesn't.

    Parameters
    ----------
    target
        Where the folder shall be; parents are made.
    replace
        Whether a folder that stands there gives way.

    Raises
    ------
    InputError
        If something stands at `target` and isn't to be replaced.
    OperationError
        If the folder can't be written, such as on a full disk.
    """
    target = target.expanduser().absolute()
    if not replace:
        refuse_existing(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise OperationError(f"{target} cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o755)
        _take_place(temporary, target)
    except OSError as error:
        raise OperationError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _flush(folder: Path) -> None:
    """Bring every file to the disk, so that the rename never comes before the content, and let others read it."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
