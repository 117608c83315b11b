"""Reads a pickle that holds an array, and refuses every other pickle without running anything in it.

A pickle is a program: it may name any function and call it. Two ideas keep this one harmless. The names that it may
use are looked up in a table of a dozen, and everything else is refused by name. And what the table holds is never
NumPy's own function but a stand-in of ours, made anew for each file, that checks its arguments and does nothing but
describe an array; the array itself is built by us at the end, from bytes whose number must fit its shape.

A file of the release has up to three gigabytes. It is mapped and not read: the array is a view into the file.
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from modelworks.spec.errors import InputError

_NUMPY_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_EXTENSION_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
_QUANTIZED = "QuantizedWeight8bit"
_QUANTIZED_MODULES = ("__main__", "model")
"""Grok-1's release names its class as one of the program that wrote it."""


class QuantizedTensor(NamedTuple):
    """A weight in eight bits: value = weight * scales, where each row of `scales` holds for an equal block of rows."""

    weight: np.ndarray
    """(..., rows, columns) int8"""
    scales: np.ndarray
    """(..., blocks, columns), with `blocks` a divisor of `rows`."""


_VIEWED_BYTES = 1 << 20
"""From this length on, bytes are views into the mapped file."""


class RefusedPickleError(InputError):
    """The pickle names or does something that an array's pickle never does."""


def read_array(path: Path) -> np.ndarray | QuantizedTensor:
    """Read one file of Grok-1's released format; large arrays are read-only views into the mapped file.

    Raises
    ------
    InputError
        If the file is missing, truncated or damaged, or holds anything but an array or a quantised weight;
        nothing of what it asks for is then done.
    """
    try:
        with path.open("rb") as file:
            return _finished(_RestrictedUnpickler(_MappedFile(file.fileno())).load())
    except RefusedPickleError as error:
        raise InputError(f"{path}: refused: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise InputError(
            f"{path}: damaged or truncated, not a pickled array ({error or type(error).__name__})"
        ) from None


def forget_pages(array: np.ndarray) -> None:
    """Let the memory go that holds what was read of a mapped array; it is read anew when it is looked at again."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class _MappedFile:
    """A file as an unpickler reads it, whose long reads are views."""

    def __init__(self, handle: int) -> None:
        self._content = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        self._at = 0

    def read(self, count: int) -> Any:
        """The next bytes, fewer at the file's end."""
        begin, self._at = self._at, min(self._at + max(count, 0), len(self._content))
        if self._at - begin < _VIEWED_BYTES:
            return self._content[begin : self._at]
        return memoryview(self._content)[begin : self._at]

    def readline(self) -> bytes:
        """The bytes up to the next newline."""
        end = self._content.find(b"\n", self._at)
        return bytes(self.read((len(self._content) if end < 0 else end + 1) - self._at))

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _Name:
    """Something that the pickle may name but not call: `numpy.ndarray`, a class of `ml_dtypes`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> Any:
        raise RefusedPickleError(f"it calls {self.name}, which an array's pickle doesn't do")


class _Function:
    """A function that the pickle may call: one of ours, without attributes that a pickle could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _DType:
    """A dtype being described."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags): only plain little-endian ones.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", "|", "="):
            raise RefusedPickleError("it describes a dtype that isn't little-endian")
        if any(part is not None for part in state[2:5]):
            raise RefusedPickleError("it describes a dtype with fields or subarrays")


@dataclass(slots=True)
class _Array:
    """An array being described: its shape, its dtype and its bytes."""

    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] | None = None
    fortran: bool = False
    content: bytes | bytearray | memoryview = b""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedPickleError("it describes an array in a way that NumPy doesn't")
        _, shape, dtype, fortran, content = state
        self.describe(shape, dtype, fortran is True, content)

    def describe(self, shape: Any, dtype: Any, fortran: bool, content: Any) -> None:
        if not isinstance(dtype, _DType) or not isinstance(content, (bytes, bytearray, memoryview)):
            raise RefusedPickleError("it describes an array of Python objects")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise RefusedPickleError("it describes an array whose shape isn't made of whole numbers")
        self.shape, self.dtype, self.fortran, self.content = shape, dtype.dtype, fortran, content

    def build(self) -> np.ndarray:
        if self.shape is None or self.dtype is None:
            raise RefusedPickleError("it describes an array without content")
        needed = prod(self.shape) * self.dtype.itemsize
        if len(self.shape) > 8 or needed != len(self.content):
            raise RefusedPickleError(
                f"an array of shape {self.shape} takes {needed} bytes and it holds {len(self.content)}"
            )
        flat = np.frombuffer(self.content, dtype=self.dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


# The unpickler written in Python keeps its memo in a dictionary; the one in C allocates as far as the file tells it to.
class _RestrictedUnpickler(pickle._Unpickler):
    def __init__(self, file: _MappedFile) -> None:
        super().__init__(file)
        # A class of its own for each file, so that nothing a file does to it is seen by the next.
        self.quantized: type = type(_QUANTIZED, (), {})
        self._known = self._table()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name, or a refusal."""
        try:
            return self._known[module, name]
        except KeyError:
            raise RefusedPickleError(
                f"it names {module}.{name}; only NumPy arrays, ml_dtypes' numbers and {_QUANTIZED} are accepted"
            ) from None

    def load_view(self) -> None:
        """A bytearray of the pickle, which nothing here changes, as a view too."""
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # type: ignore[attr-defined]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_view}  # type: ignore[dict-item]

    def persistent_load(self, _: Any) -> Any:
        """References to objects outside of the file are not for arrays."""
        raise RefusedPickleError("it refers to an object outside of the file")

    def load(self) -> Any:
        """The array or the quantised weight, as described."""
        return _Described(super().load(), self.quantized)

    def _table(self) -> dict[tuple[str, str], Any]:
        array = _Name("numpy.ndarray")
        known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): array,
            ("numpy", "dtype"): _Function(_describe_dtype),
            ("_codecs", "encode"): _Function(_encode),
        }
        for core in ("numpy.core", "numpy._core"):
            known[f"{core}.multiarray", "_reconstruct"] = _Function(lambda kind, *_: _empty(kind, array))
            known[f"{core}.multiarray", "scalar"] = _Function(_scalar)
            known[f"{core}.numeric", "_frombuffer"] = _Function(_from_buffer)
        known |= {("ml_dtypes", name): _Name(name) for name in _EXTENSION_DTYPES}
        known |= {(module, _QUANTIZED): self.quantized for module in _QUANTIZED_MODULES}
        return known


class _Described(NamedTuple):
    content: Any
    quantized: type


def _finished(described: _Described) -> np.ndarray | QuantizedTensor:
    """The array that was described, checked."""
    content, quantized = described
    if isinstance(content, _Array):
        return content.build()
    if type(content) is not quantized:
        raise RefusedPickleError(f"it holds a {type(content).__name__} and not an array or a {_QUANTIZED}")
    parts = vars(content)
    if set(parts) != {"weight", "scales"} or not all(isinstance(part, _Array) for part in parts.values()):
        raise RefusedPickleError(f"its {_QUANTIZED} doesn't have the arrays weight and scales")
    return QuantizedTensor(parts["weight"].build(), parts["scales"].build())


def _describe_dtype(code: Any, *_: Any) -> _DType:
    if isinstance(code, _Name) and code.name in _EXTENSION_DTYPES:
        return _DType(np.dtype(getattr(ml_dtypes, code.name)))
    if isinstance(code, str) and code in _NUMPY_DTYPES:
        return _DType(np.dtype(code))
    raise RefusedPickleError(f"it describes the dtype {code!r:.40}; numbers of {', '.join(_NUMPY_DTYPES)} are accepted")


def _empty(kind: Any, array: _Name) -> _Array:
    if kind is not array:
        raise RefusedPickleError("it makes an array of a class that isn't numpy.ndarray")
    return _Array()


def _scalar(dtype: Any, content: Any) -> _Array:
    scalar = _Array()
    scalar.describe((), dtype, False, content)
    return scalar


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.describe(shape, dtype, order == "F", content)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """How a pickle of protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedPickleError("it encodes something that isn't an array's bytes")
    return text.encode("latin1")
