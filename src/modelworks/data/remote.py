"""Files on other machines: any URL that fsspec knows (``s3://``, ``gs://``, ``memory://``, ``file://``, ...).

A file is sent or fetched whole, and again if the network breaks off; what can't get better by waiting (no such file, no
permission, no space) isn't tried again. What is fetched is written under a hidden name and renamed, so a file that is
there is whole.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec  # type: ignore[import-untyped]
import tenacity

from modelworks.spec.errors import InputError, OperationError

Result = TypeVar("Result")
_GIVE_UP_S = 300
"""How long a transfer is tried again."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError)
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_url(text: str) -> bool:
    """Whether a text is a URL and not the path of a local file."""
    return "://" in text


def file_system(url: str, field: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL that stands in a field of a spec, and the path in it.

    Raises
    ------
    InputError
        If its protocol isn't known, or needs a package that isn't installed.
    """
    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _EXTRAS.get(protocol)
        hint = f"pip install {package}" if package else str(error)
        raise InputError(f"{field} = {url!r} needs a package that isn't installed: {hint}") from None
    except ValueError as error:
        raise InputError(f"{field} = {url!r} is not accepted: {error}") from None
    return system, str(path).rstrip("/")


def patiently(work: Callable[[], Result], what: str) -> Result:
    """Do something with a file system, and again for a while if it fails in a way that may pass.

    Raises
    ------
    OperationError
        If it still fails; `what` and the reason are its words.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(_GIVE_UP_S),
        wait=tenacity.wait_exponential(multiplier=0.5, max=30) + tenacity.wait_random(0, 1),
        retry=tenacity.retry_if_exception(_may_pass),
        reraise=True,
    )
    try:
        return retrying(work)
    except Exception as error:  # every file system has errors of its own
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise OperationError(f"{what}: {reason.splitlines()[0] if reason else type(error).__name__}") from error


def send(system: fsspec.AbstractFileSystem, local: Path, remote: str) -> None:
    """Copy a local file to a file system, and compare the size; errors as of `patiently`."""

    def once() -> None:
        system.makedirs(remote.rpartition("/")[0], exist_ok=True)
        system.put_file(str(local), remote)
        system.invalidate_cache()
        arrived, size = system.size(remote), local.stat().st_size
        if arrived is not None and arrived != size:
            raise OSError(f"{arrived} of {size} bytes arrived")

    patiently(once, f"{local} cannot be copied to {remote}")


def fetch(system: fsspec.AbstractFileSystem, remote: str, local: Path) -> None:
    """Copy a file of a file system to this machine, whole or not at all; errors as of `patiently`."""
    local.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{local.name}.", dir=local.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        patiently(lambda: system.get_file(remote, name), f"{remote} cannot be fetched")
        temporary.replace(local)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def staged(url: str, folder: Path) -> list[tuple[Path, list[Any]]]:
    """The files that a URL or a pattern of URLs stands for, fetched, and what tells each from another version of it.

    A file that was fetched before and hasn't changed is not fetched again.

    Raises
    ------
    InputError
        If there are none.
    OperationError
        If the file system can't be reached.
    """
    system, path = file_system(url, "data.files")

    def names() -> list[str]:
        if glob.has_magic(path):
            return sorted(system.glob(path))
        return sorted(system.find(path)) if system.isdir(path) else [path] if system.exists(path) else []

    found = patiently(names, f"data.files: {url} cannot be listed")
    if not found:
        raise InputError(f"data.files: {url!r} doesn't exist")
    files = []
    for name in found:
        identity = [system.unstrip_protocol(name), system.size(name), str(system.ukey(name))]
        version = hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
        local = folder / version / name.rpartition("/")[2]
        if not local.exists():
            fetch(system, name, local)
        files.append((local, identity))
    return files


def _may_pass(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return isinstance(error, Exception) and not isinstance(error, _FINAL) and not full
