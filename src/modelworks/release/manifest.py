"""What an import wrote, file by file with its SHA-256, so that a copy can be checked without what it was made of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelworks.release.huggingface import Progress
from modelworks.release.json_file import read_json
from modelworks.spec.errors import InputError, OperationError

NAME = "manifest.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checked:
    """A folder whose files are those that its manifest lists."""

    files: int
    bytes: int
    source: dict[str, Any]
    """What they were made of, as the importer noted it."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**asdict(self), "passed": True}


def write_manifest(folder: Path, source: dict[str, Any], progress: Progress | None = None) -> Path:
    """List all files of a folder that is otherwise finished.

    Parameters
    ----------
    folder
        Where; its files lie beside one another.
    source
        What they were made of, in plain values without paths of this machine.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    listed = {}
    for done, file in enumerate(files):
        if progress is not None:
            progress("checksums", done, len(files))
        listed[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    path = folder / NAME
    path.write_text(json.dumps({"format": 1, "source": source, "files": listed}, indent=2) + "\n", encoding="utf-8")
    return path


def source_of(kind: str, name: str, files: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """What a manifest says of the files that an import read: their names and sizes."""
    return {"kind": kind, "name": name, "files": dict(files)}


def check_manifest(folder: Path, progress: Progress | None = None) -> Checked:
    """Read every byte of an imported folder and compare it with its manifest; files beside those are passed over.

    Raises
    ------
    InputError
        If there is no manifest, or it is damaged.
    OperationError
        Naming the file that is missing, has another size or another SHA-256.
    """
    path = folder / NAME
    if not path.is_file():
        raise InputError(
            f"{folder}: has no {NAME}, which import writes: reference logits (--logits FILE.npz) are accepted"
        )
    values = read_json(path)
    listed = values.get("files")
    if not isinstance(listed, dict) or not listed or not all(_is_entry(name, entry) for name, entry in listed.items()):
        raise InputError(f"{path}: is damaged: its table 'files' gives bytes and sha256 of each file")
    for done, (name, entry) in enumerate(listed.items()):
        if progress is not None:
            progress("checksums", done, len(listed))
        file = folder / name
        if not file.is_file():
            raise OperationError(f"{file}: is missing, and {NAME} lists it")
        if file.stat().st_size != entry["bytes"]:
            raise OperationError(f"{file}: has {file.stat().st_size} bytes, and {NAME} says {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise OperationError(f"{file}: is damaged: its SHA-256 is not the one in {NAME}")
    source = values.get("source")
    sizes = sum(int(entry["bytes"]) for entry in listed.values())
    return Checked(len(listed), sizes, source if isinstance(source, dict) else {})


def _is_entry(name: str, entry: Any) -> bool:
    if Path(name).name != name or not isinstance(entry, dict):
        return False
    size, digest = entry.get("bytes"), entry.get("sha256")
    return type(size) is int and isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
