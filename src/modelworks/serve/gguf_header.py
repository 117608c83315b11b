"""Reads the head of a GGUF file and checks that the file is whole, before llama.cpp maps it.

A GGUF file is a magic number, two counts, key-value metadata, one description per tensor, and the tensors' bytes.
llama.cpp trusts much of that; a file that was cut short, or isn't GGUF, is refused here in one sentence instead.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from modelworks.spec.errors import InputError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 20
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Header:
    """What the head of a GGUF file says."""

    metadata: dict[str, Any]
    """Key-value pairs; an array stands as its length."""
    tensors: int
    parameters: int
    """Elements of all tensors."""
    bytes: int
    """The file's size."""

    @property
    def architecture(self) -> str:
        """The network's family, such as ``llama`` or ``grok``."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str, otherwise: int = 0) -> int:
        """A whole number among the architecture's own keys, such as ``block_count``."""
        value = self.metadata.get(f"{self.architecture}.{key}", otherwise)
        return value if isinstance(value, int) else otherwise

    @property
    def context(self) -> int:
        """Tokens that the network was trained to attend to."""
        return self.number("context_length", 2048)

    @property
    def chat_template(self) -> str:
        """The Jinja template of its conversations; empty if it has none."""
        return str(self.metadata.get("tokenizer.chat_template", ""))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of key and value cache for one token in 16-bit floats."""
        heads = self.number("attention.head_count", 1)
        width = self.number("attention.key_length", self.number("embedding_length") // max(heads, 1))
        return 2 * 2 * self.number("block_count") * self.number("attention.head_count_kv", heads) * width


class _BrokenError(Exception):
    """The bytes at hand can't be the head of a whole GGUF file."""


class _Reader:
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

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise _BrokenError("it ends inside its header")
        self.file.seek(count, 1)

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < _MOST_DIMENSIONS:
            return self.array_length(depth)
        raise _BrokenError(f"its metadata has a value of unknown type {kind}")

    def array_length(self, depth: int) -> int:
        kind, length = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            for _ in range(length):
                if kind == _STRING:
                    self.skip(self.number("<Q"))
                else:
                    self.value(kind, depth + 1)
        return int(length)


def read_header(path: Path) -> Header:
    """Read a GGUF file's head and check every tensor's place against the file's size.

    Raises
    ------
    InputError
        If there is no such file, it is not GGUF, or it is damaged or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _parse(_Reader(file, size))
    except OSError as error:
        raise InputError(f"cannot read the model file {path}: {error.strerror}") from None
    except _BrokenError as broken:
        raise InputError(f"{path} is not a whole GGUF file: {broken}") from None


def _parse(reader: _Reader) -> Header:
    if reader.size < 24 or reader.take(4) != b"GGUF":
        raise _BrokenError("it does not begin with the letters GGUF")
    version, tensors, entries = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
    if version not in {2, 3}:
        raise _BrokenError(f"its version is {version}; 2 and 3 are accepted")
    if max(tensors, entries) > _MOST_ENTRIES or tensors == 0:
        raise _BrokenError(f"it claims {tensors} tensors and {entries} metadata entries")
    metadata = {}
    for _ in range(entries):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    parameters, end = _tensors(reader, tensors)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _BrokenError(f"its alignment is {alignment!r}")
    start = -(-reader.file.tell() // alignment) * alignment
    if start + end > reader.size:
        raise _BrokenError(f"its tensors need {start + end:,} bytes and it has {reader.size:,}: it was cut short")
    return Header(metadata, tensors, parameters, reader.size)


def _tensors(reader: _Reader, count: int) -> tuple[int, int]:
    """The tensors' elements, and where the last one ends after the start of the data."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    parameters = end = 0
    for _ in range(count):
        name, dimensions = reader.string(), reader.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise _BrokenError(f"tensor {name!r} has {dimensions} dimensions")
        elements = prod(reader.number("<Q") for _ in range(dimensions))
        kind, offset = reader.number("<I"), reader.number("<Q")
        if kind not in sizes:
            raise _BrokenError(f"tensor {name!r} is of unknown type {kind}")
        block, block_bytes = sizes[kind]
        parameters += elements
        end = max(end, offset + elements // block * block_bytes)
    return parameters, end
