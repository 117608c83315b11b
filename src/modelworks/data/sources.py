"""Where text comes from: the Python standard library, files, Hugging Face datasets.

A source names its inputs before it reads them (so that what was prepared can be found again, and a missing file is
said at once), and then is a stream of records in an order that is always the same.
"""

from __future__ import annotations

import ast
import glob
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelworks.data.records import ACCEPTED, Document, Record, is_measured, kind_of, read_file, record_from
from modelworks.data.remote import is_url, staged
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import data_folder
from modelworks.spec.run import DataSpec

_NOT_TEXT = {"__pycache__", "site-packages", "dist-packages", "lib-dynload", "encodings"}
"""Folders of the standard library that hold no text of its own; `encodings` is generated tables."""
_TOPICS = Path("pydoc_data") / "topics.py"


@dataclass(frozen=True)
class Source:
    """A source's inputs, known before any is read."""

    spec: DataSpec
    files: list[Path] = field(default_factory=list)
    """In the order in which they are read."""
    fetched: dict[Path, list[Any]] = field(default_factory=dict)
    """Of those that come from elsewhere: what tells each from another version of it."""

    @property
    def measured_bytes(self) -> int | None:
        """About how many bytes of text there are, where the files' sizes tell."""
        if not self.files or not all(is_measured(path) for path in self.files):
            return self.spec.max_bytes
        total = sum(path.stat().st_size for path in self.files)
        return min(total, self.spec.max_bytes or total)

    def fingerprint(self) -> list[list[Any]]:
        """What changes when an input does: path, size and time of change of each file, or what its file system says."""
        return [self.fetched.get(path) or _version(path) for path in self.files]

    def records(self) -> Iterator[Record]:
        """Every record of the source.

        Raises
        ------
        InputError
            If a dataset isn't there, or lacks the split.
        OperationError
            If an input breaks off.
        """
        if self.spec.source.startswith("hf:"):
            yield from _dataset_records(self.spec)
            return
        for path in self.files:
            try:
                if self.spec.source == "stdlib" and path.parts[-2:] == _TOPICS.parts:
                    yield from _topics(path)
                else:
                    yield from read_file(path, self.spec.text_field)
            except OSError as error:
                raise OperationError(f"{path} cannot be read: {error.strerror or error}") from None


def open_source(spec: DataSpec) -> Source:
    """Find a source's inputs.

    Raises
    ------
    InputError
        If a file, folder or pattern matches nothing, or is of a kind that isn't read.
    """
    if spec.source == "stdlib":
        return Source(spec, standard_library())
    if spec.source in ("files", "dialogues", "pairs", "tasks", "pictures"):
        found: dict[Path, list[Any] | None] = {}
        for given in spec.files:
            found |= _fetched(given) if is_url(given) else dict.fromkeys(_matching(given))
        if spec.source != "files":
            for path in found:
                if kind_of(path) not in ("jsonl", "json"):
                    raise InputError(f"data.files: {str(path)!r} holds no {spec.source}; jsonl and json are accepted")
        return Source(spec, list(found), {path: version for path, version in found.items() if version is not None})
    local = Path(dataset_name(spec)[0])
    return Source(spec, sorted(path for path in local.rglob("*") if path.is_file()) if local.is_dir() else [])


def standard_library() -> list[Path]:
    """The standard library's sources and documentation on this machine, tests left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    documentation = Path(f"/usr/share/doc/python{sys.version_info.major}.{sys.version_info.minor}")
    found = [path for suffix in (".py", ".rst") for path in folder.rglob(f"*{suffix}") if _is_text_of(path, folder)]
    if documentation.is_dir():
        found += [path for path in documentation.rglob("*") if path.name.endswith((".rst", ".rst.gz", ".rst.txt"))]
    return sorted(path for path in found if path.is_file())


def dataset_name(spec: DataSpec) -> tuple[str, str | None]:
    """Name and configuration of a dataset written ``hf:NAME`` or ``hf:NAME:CONFIGURATION``."""
    name, _, configuration = spec.source.removeprefix("hf:").partition(":")
    return name, configuration or None


def _is_text_of(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    skipped = any(part in _NOT_TEXT or "test" in part or part.startswith("config-") for part in parts[:-1])
    return not skipped and not parts[-1].startswith(("test_", "_sysconfigdata"))


def _topics(path: Path) -> Iterator[Record]:
    """The language reference, which the library carries as one dictionary of topics."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            for topic in ast.literal_eval(value).values():
                yield Document(topic, topic.encode("utf-8"))


def _matching(given: str) -> list[Path]:
    """The files that a path, a folder or a pattern of `data.files` stands for, sorted."""
    path = Path(given).expanduser()
    if path.is_dir():
        candidates = sorted(inner for inner in path.rglob("*") if not _is_hidden(inner.relative_to(path)))
    elif path.exists():
        if kind_of(path) is None:
            raise InputError(f"data.files: {given!r} is of a kind that isn't read; accepted are {ACCEPTED}")
        candidates = [path]
    else:
        # Path.glob takes no absolute pattern.
        candidates = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        if not candidates:
            raise InputError(f"data.files: {given!r} doesn't exist")
    found = [inner.absolute() for inner in candidates if inner.is_file() and kind_of(inner) is not None]
    if not found:
        raise InputError(f"data.files: {given!r} holds nothing that is read; accepted are {ACCEPTED}")
    return found


def _fetched(url: str) -> dict[Path, list[Any] | None]:
    """The files that a URL of `data.files` stands for, fetched to this machine."""
    files = staged(url, data_folder() / "fetched")
    found: dict[Path, list[Any] | None] = {path: version for path, version in files if kind_of(path) is not None}
    if not found:
        raise InputError(f"data.files: {url!r} holds nothing that is read; accepted are {ACCEPTED}")
    return found


def _version(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _dataset_records(spec: DataSpec) -> Iterator[Record]:
    import datasets  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetNotFoundError, DatasetsError  # type: ignore[import-untyped]

    name, configuration = dataset_name(spec)
    where = f"data.source = {spec.source!r}"
    try:
        stream = datasets.load_dataset(name, configuration, split=spec.split, streaming=True)
        for row, values in enumerate(stream, start=1):
            yield record_from(values, spec.text_field, name, row)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise InputError(f"{where} is not accepted: no such dataset can be reached ({_first_line(error)})") from None
    except ValueError as error:
        raise InputError(f"{where} with data.split = {spec.split!r} is not accepted: {_first_line(error)}") from None
    except (OSError, DatasetsError) as error:
        raise OperationError(f"{where} broke off: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
