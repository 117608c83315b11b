"""Reads the head of a GGUF file, whose numbers are not believed before they are checked.

A GGUF file is a magic number, two counts, key-value metadata, a description of each tensor, and the tensors' bytes.
llama.cpp trusts much of that. Here every count, length and offset is held against the file's size before anything is
allocated or read, so a file that was cut short, is damaged or isn't GGUF is refused in one sentence. The tensors' bytes
stay on the disk.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from modelworks.spec.errors import InputError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 20
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 64


class _BrokenError(Exception):
    """The bytes can't be the head of a whole GGUF file."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the file describes it."""

    shape: tuple[int, ...]
    """As PyTorch counts: the slowest dimension first."""
    kind: int
    """How its numbers are stored: a value of ``gguf.GGMLQuantizationType``."""
    offset: int
    """Of its bytes in the file."""
    size: int
    """Of its bytes."""


@dataclass(frozen=True)
class GgufHeader:
    """What the head of a GGUF file says."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    bytes: int
    """The file's size."""

    @property
    def architecture(self) -> str:
        """The network's family, such as ``llama`` or ``grok``."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def kind(self) -> str:
        """What the file holds: ``model``, or ``adapter`` for the changes of a fine-tune."""
        return str(self.metadata.get("general.type", "model"))

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def context(self) -> int:
        """Tokens that the network was trained to attend to."""
        return self._number("context_length", 2048)

    @property
    def chat_template(self) -> str:
        """The Jinja template of its conversations; empty if it has none."""
        return str(self.metadata.get("tokenizer.chat_template", ""))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of key and value cache for one token in 16-bit floats."""
        heads = self._number("attention.head_count", 1)
        width = self._number("attention.key_length", self._number("embedding_length") // max(heads, 1))
        return 2 * 2 * self._number("block_count") * self._number("attention.head_count_kv", heads) * width

    def _number(self, key: str, otherwise: int = 0) -> int:
        """A whole number among the architecture's own keys, such as ``block_count``."""
        value = self.metadata.get(f"{self.architecture}.{key}", otherwise)
        return value if isinstance(value, int) else otherwise


def read_gguf_header(path: Path, arrays: bool = True) -> GgufHeader:
    """Read a GGUF file's metadata and the places of its tensors.

    Parameters
    ----------
    path
        The file.
    arrays
        Whether arrays in the metadata, such as a vocabulary, are read; else each stands as its length, which is much
        faster.

    Raises
    ------
    InputError
        If there is no such file, it isn't GGUF, or it is truncated, damaged or of absurd dimensions.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            metadata, tensors = _parse(_Reader(file, size, arrays))
    except OSError as error:
        raise InputError(f"cannot read the model file {path}: {error.strerror or error}") from None
    except _BrokenError as broken:
        raise InputError(f"{path} is not a whole GGUF file: {broken}") from None
    return GgufHeader(path, metadata, tensors, size)


class _Reader:
    """Takes numbers and strings, never beyond the file's end."""

    def __init__(self, file: BinaryIO, size: int, arrays: bool) -> None:
        self.file, self.size, self.arrays = file, size, arrays

    def take(self, count: int) -> bytes:
        self._hold(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self._hold(count)
        self.file.seek(count, 1)

    def _hold(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise _BrokenError("it ends inside its header")

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        raise _BrokenError(f"its metadata has a value of the unknown type {kind}")

    def _array(self) -> Any:
        kind, length = self.number("<I"), int(self.number("<Q"))
        if kind in _SCALARS:
            count = length * struct.calcsize(_SCALARS[kind])
            if self.arrays:
                return np.frombuffer(self.take(count), _SCALARS[kind]).tolist()
            self.skip(count)
            return length
        # A string is at least the eight bytes of its length.
        if kind != _STRING or length > (self.size - self.file.tell()) // 8:
            raise _BrokenError(f"its metadata has an array of {length} values of type {kind}")
        if self.arrays:
            return [self.string() for _ in range(length)]
        for _ in range(length):
            self.skip(self.number("<Q"))
        return length


def _parse(reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if reader.size < 24 or reader.take(4) != b"GGUF":
        raise _BrokenError("it does not begin with the letters GGUF")
    version, count, entries = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in (2, 3):
        raise _BrokenError(f"its version is {version}; 2 and 3 are accepted")
    if max(count, entries) > _MOST_ENTRIES or count == 0:
        raise _BrokenError(f"it claims {count} tensors and {entries} metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    sizes = _block_sizes()
    described = [_description(reader, sizes) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise _BrokenError(f"its alignment is {alignment!r}")
    start = -(-reader.file.tell() // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in described:
        block, block_bytes = sizes[kind]
        stored = GgufTensor(shape, kind, start + offset, prod(shape) // block * block_bytes)
        if stored.offset + stored.size > reader.size:
            raise _BrokenError(f"{name} ends at byte {stored.offset + stored.size:,} and the file at {reader.size:,}")
        if name in tensors:
            raise _BrokenError(f"{name} is there twice")
        tensors[name] = stored
    return metadata, tensors


def _description(reader: _Reader, sizes: dict[int, tuple[int, int]]) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = reader.string(), reader.number("<I")
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise _BrokenError(f"a tensor's name is {name[:_LONGEST_NAME]!r}")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise _BrokenError(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = reader.number("<I"), reader.number("<Q")
    if kind not in sizes:
        raise _BrokenError(f"{name} is of the unknown type {kind}")
    if shape[-1] % sizes[kind][0]:
        raise _BrokenError(f"{name} has rows of {shape[-1]} and its type has blocks of {sizes[kind][0]}")
    return name, shape, kind, offset


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Elements and bytes of one block, per type of tensor."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
