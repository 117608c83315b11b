"""The models that can be served: one folder each, ``NAME.gguf`` and ``model.json``, whole or absent.

A model is put together in a hidden folder and takes its place by a rename. A crash at any moment leaves the old model
or the new one; what it was putting together is swept away by the next writer. Writers exclude each other by a lock
file, readers need none.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock

from modelworks.serve.errors import UnknownModelError
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.gguf_header import read_gguf_header
from modelworks.spec.home import models_folder

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class ServedModel:
    """One model of the store, as its ``model.json`` says."""

    name: str
    source: str
    """Where its weights come from: a run, a package, a repository."""
    sha256: str
    bytes: int
    context: int
    """Tokens that it was trained to attend to."""
    license: str
    created: int
    """Unix time at which it was stored."""


class Store:
    """The served models under one folder.

    Parameters
    ----------
    folder : Path, optional
        ``models_folder()`` if not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or models_folder()

    def list(self) -> builtins.list[ServedModel]:
        """All whole models, by name."""
        found = (self._read(path.parent) for path in self.folder.glob("[!.]*/model.json"))
        return sorted((model for model in found if model), key=lambda model: model.name)

    def get(self, name: str) -> ServedModel:
        """The model of that name.

        Raises
        ------
        UnknownModelError
            If there is none.
        """
        model = self._read(self.folder / name) if _NAME.fullmatch(name) else None
        if model is None:
            raise UnknownModelError(name, [model.name for model in self.list()])
        return model

    def path(self, name: str) -> Path:
        """The GGUF file of the model of that name."""
        return self.folder / self.get(name).name / f"{name}.gguf"

    def add(
        self,
        name: str,
        gguf_path: Path,
        *,
        source: str,
        license: str = "unknown",  # noqa: A002
        context: int | None = None,
    ) -> ServedModel:
        """Store a GGUF file (linked where the file system allows, else copied), replacing a model of that name.

        Raises
        ------
        InputError
            If the name can't be a folder's, or the file is not a whole GGUF file.
        OperationError
            If it can't be written.
        """
        check_name(name)
        header = read_gguf_header(gguf_path, arrays=False)
        with self._writing(), self._new_folder(name) as folder:
            file = folder / f"{name}.gguf"
            link_or_copy(gguf_path, file)
            model = ServedModel(
                name, source, sha256(file), header.bytes, context or header.context, license, int(time.time())
            )
            (folder / "model.json").write_text(json.dumps(asdict(model), indent=2) + "\n")
            self._commit(folder, name)
        return model

    def remove(self, name: str) -> None:
        """Remove a model.

        Raises
        ------
        UnknownModelError
            If there is none of that name.
        """
        with self._writing():
            self.get(name)
            grave = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            (self.folder / name).rename(grave / name)
            shutil.rmtree(grave)

    def pull(self, name: str, progress: Progress | None = None) -> ServedModel:
        """Fetch a model that `serve/sources.toml` knows, unless it is here; see `serve.download`."""
        from modelworks.serve.download import pull

        return pull(self, name, progress)

    def _read(self, folder: Path) -> ServedModel | None:
        try:
            content = json.loads((folder / "model.json").read_text())
            model = ServedModel(**{field.name: content[field.name] for field in fields(ServedModel)})
            whole = (folder / f"{model.name}.gguf").stat().st_size == model.bytes and model.name == folder.name
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return model if whole else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._sweep()
                yield
        except OSError as error:
            raise OperationError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    def _sweep(self) -> None:
        """Undo what a killed writer left: a model moved aside comes back, half-made folders go."""
        for aside in self.folder.glob(".replaced-*"):
            place = self.folder / aside.name.removeprefix(".replaced-")
            if place.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(place)
        for half in self.folder.glob(".new-*"):
            shutil.rmtree(half)

    @contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=f".new-{name}-", dir=self.folder))
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, folder: Path, name: str) -> None:
        for file in folder.iterdir():
            _flush(file)
        place, aside = self.folder / name, self.folder / f".replaced-{name}"
        if place.exists():
            place.rename(aside)
        folder.rename(place)
        _flush(self.folder)
        shutil.rmtree(aside, ignore_errors=True)


def check_name(name: str) -> None:
    """Raise `InputError` unless the name can stand for a model: letters, digits, dot, dash, underscore."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"a model can't be named {name!r}: up to 64 letters, digits, dots, dashes and underscores are accepted"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file into place, or copy it where links can't reach (another file system, no permission)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
