"""The models that can be served: one folder each, ``NAME.gguf`` and ``model.json``, whole or absent. The eyes of a
model that sees stand beside them, in ``mmproj-NAME.gguf``.

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
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from modelworks.serve.errors import UnknownModelError
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.gguf_header import GgufHeader, read_gguf_header
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
    adapts: str | None = None
    """Of a LoRA adapter: the stored model that it changes."""
    adapts_sha256: str | None = None
    """That model's checksum; after it has been replaced, the adapter doesn't fit."""
    eyes_bytes: int = 0
    """Of the file of its eyes; 0 for a model that takes text only."""
    eyes_sha256: str | None = None
    title: str = ""
    """What people are shown instead of the name; empty where that says enough."""


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

    def eyes(self, model: ServedModel) -> Path | None:
        """The file of a model's eyes; None where it takes text only."""
        return self.folder / model.name / f"mmproj-{model.name}.gguf" if model.eyes_bytes else None

    def add(
        self,
        name: str,
        gguf_path: Path,
        *,
        source: str,
        license: str = "unknown",  # noqa: A002
        context: int | None = None,
        eyes: Path | None = None,
    ) -> ServedModel:
        """Store a GGUF file (linked where the file system allows, else copied), replacing a model of that name.

        With `eyes`, the file of its vision tower and connector, it takes images.

        Raises
        ------
        InputError
            If the name can't be a folder's, a file is not a whole GGUF file, or the eyes don't fit the model.
        OperationError
            If it can't be written.
        """
        check_name(name)
        header = read_gguf_header(gguf_path, arrays=False)
        if header.kind == "adapter":
            raise InputError(f"{gguf_path} is an adapter: modelworks models adapt NAME {gguf_path.name} --to MODEL")
        if header.architecture == "clip":
            raise InputError(
                f"{gguf_path} holds the eyes of a model: its decoder's file is accepted, with --eyes this one"
            )
        if eyes is not None:
            check_eyes(read_gguf_header(eyes, arrays=False), header)
        about = {"source": source, "license": license, "context": context or header.context}
        return self._add(name, gguf_path, eyes, **about)

    def add_adapter(
        self,
        name: str,
        gguf_path: Path,
        base: str,
        *,
        source: str,
        license: str = "unknown",  # noqa: A002
        title: str = "",
    ) -> ServedModel:
        """Store a LoRA adapter of a stored model, to be asked for by a name of its own; people are shown the title.

        Raises
        ------
        InputError
            If the name can't be a folder's or is the model's own, there is no such model, or the file is not an adapter
            that fits it.
        OperationError
            If it can't be written.
        """
        check_name(name)
        model = self.get(base)
        if model.adapts is not None or name == base:
            raise InputError(f"{base!r} is not a model that {name!r} could adapt: another stored model is accepted")
        check_adapter(read_gguf_header(gguf_path, arrays=False), read_gguf_header(self.path(base), arrays=False))
        about = {"source": source, "license": license, "context": model.context, "title": title}
        return self._add(name, gguf_path, None, adapts=base, adapts_sha256=model.sha256, **about)

    def adapters(self, base: ServedModel) -> builtins.list[ServedModel]:
        """The adapters that fit a model as it is now."""
        return [one for one in self.list() if one.adapts == base.name and one.adapts_sha256 == base.sha256]

    def base(self, model: ServedModel) -> ServedModel:
        """The model whose weights answer: of an adapter the one that it changes, else itself.

        Raises
        ------
        InputError
            If that is gone or was replaced.
        """
        if model.adapts is None:
            return model
        base = self._read(self.folder / model.adapts)
        if base is None or base.sha256 != model.adapts_sha256:
            what = "is gone" if base is None else "was replaced"
            raise InputError(f"the model {model.adapts} that {model.name} adapts {what}: remove {model.name}")
        return base

    def _add(self, name: str, gguf_path: Path, eyes: Path | None, **about: Any) -> ServedModel:
        with self._writing(), self._new_folder(name) as folder:
            file = folder / f"{name}.gguf"
            link_or_copy(gguf_path, file)
            if eyes is not None:
                seeing = folder / f"mmproj-{name}.gguf"
                link_or_copy(eyes, seeing)
                about |= {"eyes_bytes": seeing.stat().st_size, "eyes_sha256": sha256(seeing)}
            size, now = file.stat().st_size, int(time.time())
            model = ServedModel(name=name, sha256=sha256(file), bytes=size, created=now, **about)
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
            needed = {field.name for field in fields(ServedModel) if field.default is MISSING}
            known = {
                field.name: content[field.name]
                for field in fields(ServedModel)
                if field.name in needed | content.keys()
            }
            model = ServedModel(**known)
            whole = (folder / f"{model.name}.gguf").stat().st_size == model.bytes and model.name == folder.name
            if model.eyes_bytes:
                whole = whole and (folder / f"mmproj-{model.name}.gguf").stat().st_size == model.eyes_bytes
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


def check_adapter(adapter: GgufHeader, base: GgufHeader) -> None:
    """Raise `InputError` unless a LoRA adapter has a pair of matrices for tensors of the model, and nothing else."""
    if adapter.kind != "adapter" or adapter.metadata.get("adapter.type") != "lora":
        raise InputError(f"{adapter.path} is not a LoRA adapter: its general.type is {adapter.kind!r}")
    if adapter.architecture != base.architecture:
        made_for = f"{adapter.architecture!r} and not {base.architecture!r}"
        raise InputError(f"{adapter.path} does not fit: it was made for the architecture {made_for}")
    for name, tensor in adapter.tensors.items():
        changed, _, side = name.rpartition(".")
        pair = [adapter.tensors.get(f"{changed}.lora_{other}") for other in "ab"]
        there = base.tensors.get(changed)
        if side not in {"lora_a", "lora_b"} or there is None or None in pair:
            raise InputError(f"{adapter.path} does not fit: the model has no matrix that {name[:80]} could change")
        down, up = (each.shape for each in pair if each is not None)
        if (
            len(there.shape) == 2
            and changed != "token_embd.weight"
            and (up[0], down[-1], up[-1]) != (*there.shape, down[0])
        ):
            raise InputError(
                f"{adapter.path} does not fit: {name} is {tensor.shape} for a matrix of {there.shape} in the model"
            )


def check_eyes(eyes: GgufHeader, model: GgufHeader) -> None:
    """Raise `InputError` unless a file holds eyes whose tokens are as wide as the model's."""
    if eyes.architecture != "clip" or eyes.metadata.get("clip.has_vision_encoder") is not True:
        raise InputError(f"{eyes.path} holds no eyes: a GGUF file of the architecture 'clip' is accepted")
    made_for, width = (
        eyes.metadata.get("clip.vision.projection_dim"),
        model.metadata.get(f"{model.architecture}.embedding_length"),
    )
    if made_for != width:
        raise InputError(f"{eyes.path} does not fit: its tokens are {made_for} wide and the model's {width}")


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
