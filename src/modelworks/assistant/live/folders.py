"""Folders as sources: those that the operator allows, and in them what is no link, not hidden and not too large."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelworks.spec.errors import InputError
from modelworks.spec.home import home

MOST_LOOKED_AT = 20_000
"""Files of a folder."""
LARGEST_FILE = 32 << 20
"""Bytes."""


@dataclass(frozen=True)
class Found:
    """A file in a folder."""

    path: Path
    name: str
    """From the folder on."""
    modified: float
    version: str


def allowed_folder(given: str, allowed: Sequence[str] | None) -> Path:
    """A folder that may be a source, without links in its path.

    Parameters
    ----------
    given
        As a person has named it.
    allowed
        The folders in which it must be; None if any may be.

    Raises
    ------
    InputError
        If it isn't there or may not be used. Of a folder that may not be used nothing is told, not even whether it is.
    """
    path = Path(os.path.realpath(given)) if "\0" not in given else Path()
    roots = [Path(os.path.realpath(root)) for root in allowed or ()]
    if not Path(given).is_absolute() or (allowed is not None and not any(path.is_relative_to(root) for root in roots)):
        accepted = ", ".join(allowed) if allowed else "none on this server" if allowed is not None else "a whole path"
        raise InputError(f"the folder {given[:200]!r} is not accepted; allowed is: {accepted}")
    if path.is_relative_to(_own()):
        raise InputError(f"the folder {given[:200]!r} is not accepted: the server's own data is in it")
    if not path.is_dir():
        raise InputError(f"there is no folder {given[:200]!r}")
    return path


def files_of(folder: Path, most: int) -> list[Found]:
    """The files in a folder that were changed last, the latest first."""
    found = []
    for looked_at, one in enumerate(_files(folder)):
        if looked_at >= MOST_LOOKED_AT:
            break
        found.append(one)
    return sorted(found, key=lambda one: (-one.modified, one.name))[:most]


def content_of(file: Found) -> bytes:
    """A file's bytes, through no link, also if somebody has put one in its place or on the way to it meanwhile.

    Raises
    ------
    InputError
        If it can't be read.
    """
    kept = os.O_NOFOLLOW | os.O_CLOEXEC
    on_the_way = kept | os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)
    *folders, name = file.path.parts[1:]
    try:
        place = os.open(file.path.anchor, on_the_way)
        try:
            for folder in folders:
                inner = os.open(folder, on_the_way, dir_fd=place)
                os.close(place)
                place = inner
            handle = os.open(name, kept | os.O_RDONLY | os.O_NONBLOCK, dir_fd=place)
        finally:
            os.close(place)
        with os.fdopen(handle, "rb") as opened:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise InputError(f"{file.name} is no file any more")
            return opened.read(LARGEST_FILE)
    except OSError as error:
        raise InputError(f"{file.name} can't be read: {error.strerror}") from None


def _own() -> Path:
    """Where the server keeps its data, which is nobody's source."""
    return Path(os.path.realpath(home()))


def _files(folder: Path) -> Iterator[Found]:
    own = _own()
    for where, folders, names in os.walk(folder, followlinks=False):
        kept = (name for name in folders if not name.startswith(".") and Path(where) / name != own)
        folders[:] = sorted(kept)
        for name in sorted(names):
            path = Path(where) / name
            try:
                about = path.lstat()
            except OSError:
                continue
            regular = (about.st_mode & 0o170000) == 0o100000
            if regular and not name.startswith(".") and 0 < about.st_size <= LARGEST_FILE:
                shown = str(path.relative_to(folder)).encode("utf-8", "replace").decode()
                yield Found(path, shown, about.st_mtime, f"{about.st_mtime_ns} {about.st_size}")
