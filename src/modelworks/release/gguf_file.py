"""Reads a GGUF file whose numbers are not believed before they are checked.

A GGUF file is a magic number, two counts, key-value metadata, a description of each tensor, and the tensors' bytes.
Every count, length and offset in it is held against the file's size before anything is allocated or read, and the
tensors stay on the disk (memory-mapped) until one is asked for.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from modelworks.spec.errors import InputError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 20
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 64


class _BrokenError(Exception):
    """The bytes can't be those of a whole GGUF file."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file describes it."""

    shape: tuple[int, ...]
    """As PyTorch counts: the slowest dimension first."""
    kind: gguf.GGMLQuantizationType
    offset: int
    """Of its bytes in the file."""
    size: int
    """Of its bytes."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata, and its tensors on demand."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The network's family, such as `llama`."""
        return str(self.metadata.get("general.architecture", ""))

    def values(self, name: str) -> np.ndarray:
        """A tensor in fp32, dequantised."""
        stored = self.tensors[name]
        mapped = np.memmap(self.path, np.uint8, "r", stored.offset, (stored.size,))
        if stored.kind == gguf.GGMLQuantizationType.F32:
            return np.array(mapped).view(np.float32).reshape(stored.shape)
        rows = mapped.reshape(*stored.shape[:-1], -1) if stored.shape else mapped
        if stored.kind == gguf.GGMLQuantizationType.F16:
            return np.array(rows).view(np.float16).astype(np.float32).reshape(stored.shape)
        return gguf.quants.dequantize(np.ascontiguousarray(rows), stored.kind).astype(np.float32, copy=False)


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's metadata and the places of its tensors.

    Raises
    ------
    InputError
        If there is no such file, it isn't GGUF, or it is truncated, damaged or of absurd dimensions.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            metadata, tensors = _parse(_Reader(file, size))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _BrokenError as error:
        raise InputError(f"{path}: is not a whole GGUF file: {error}") from None
    return GgufFile(path, metadata, tensors)


class _Reader:
    """Takes numbers and strings, never beyond the file's end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise _BrokenError("it ends inside its header")
        return self.file.read(count)

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _BrokenError(f"its metadata has a value of the unknown type {kind}")
        inner, length = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            return np.frombuffer(self.take(length * struct.calcsize(_SCALARS[inner])), _SCALARS[inner]).tolist()
        if inner != _STRING or length > (self.size - self.file.tell()) // 8:
            raise _BrokenError(f"its metadata has an array of {length} values of type {inner}")
        return [self.string() for _ in range(length)]


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if reader.size < 24 or reader.take(4) != b"GGUF":
        raise _BrokenError("it doesn't begin with the letters GGUF")
    version, count, entries = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in (2, 3):
        raise _BrokenError(f"its version is {version}; 2 and 3 are accepted")
    if max(count, entries) > _MOST_ENTRIES:
        raise _BrokenError(f"it claims {count} tensors and {entries} metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    described = [_description(reader) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise _BrokenError(f"its alignment is {alignment!r}")
    start = -(-reader.file.tell() // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in described:
        stored = StoredTensor(shape, kind, start + offset, _size(name, shape, kind))
        if stored.offset + stored.size > reader.size:
            raise _BrokenError(f"{name} ends at byte {stored.offset + stored.size} and the file at {reader.size}")
        if name in tensors:
            raise _BrokenError(f"{name} is there twice")
        tensors[name] = stored
    return metadata, tensors


def _description(reader: _Reader) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name, dimensions = reader.string(), reader.number("<I")
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise _BrokenError(f"a tensor's name is {name[:_LONGEST_NAME]!r}")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise _BrokenError(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = reader.number("<I"), reader.number("<Q")
    try:
        return name, shape, gguf.GGMLQuantizationType(kind), offset
    except ValueError:
        raise _BrokenError(f"{name} is of the unknown type {kind}") from None


def _size(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise _BrokenError(f"{name} has rows of {shape[-1]} and {kind.name} has blocks of {block}")
    return prod(shape) // block * block_bytes
