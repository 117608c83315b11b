"""The reader of Grok-1's files takes arrays and the one class, and runs nothing for anybody else."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from modelworks.release.pickles import QuantizedTensor, read_array
from modelworks.spec.errors import InputError


class QuantizedWeight8bit:
    """Stands for the class of the same name in the program that wrote the release."""

    def __init__(self, weight: np.ndarray, scales: np.ndarray) -> None:
        self.weight, self.scales = weight, scales


@pytest.fixture
def released_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class, at home in `__main__` as in the release."""
    monkeypatch.setattr(QuantizedWeight8bit, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False)
    return QuantizedWeight8bit


def written(folder: Path, content: Any, protocol: int = 4) -> Path:
    path = folder / "tensor00000_000"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


class Calls:
    """Pickles as a call of a function with arguments, then perhaps a state."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Only what can be called is pickled as a function."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["int8", "float32", "float16", "bfloat16", "float8_e4m3fn", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_come_back_as_numpy_wrote_them(
    tmp_path: Path, protocol: int, dtype: str, order: str
) -> None:
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    array = np.asarray(np.arange(24).reshape(2, 3, 4) - 11, order=order).astype(kind)
    found = read_array(written(tmp_path, array, protocol))
    assert isinstance(found, np.ndarray)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found.astype(np.float64), array.astype(np.float64))


@pytest.mark.parametrize("scalar", [np.float32(1.5), ml_dtypes.bfloat16(-2.5)])
def test_a_scalar_comes_back_as_an_array_without_dimensions(tmp_path: Path, scalar: Any) -> None:
    found = read_array(written(tmp_path, scalar))
    assert isinstance(found, np.ndarray)
    assert found.shape == ()
    assert float(found) == float(scalar)


def test_a_quantised_weight_comes_back_as_weight_and_scales(tmp_path: Path, released_class: type) -> None:
    weight = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    scales = np.ones((2, 4), ml_dtypes.bfloat16)
    found = read_array(written(tmp_path, released_class(weight, scales)))
    assert isinstance(found, QuantizedTensor)
    np.testing.assert_array_equal(found.weight, weight)
    assert found.scales.dtype == scales.dtype


HOSTILE = {
    "os.system": lambda flag: Calls(os.system, f"touch {flag}"),
    "builtins.eval": lambda flag: Calls(builtins.eval, f"open({str(flag)!r}, 'w')"),
    "builtins.getattr": lambda flag: Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"touch {flag}"),
    "numpy.save": lambda flag: Calls(np.save, str(flag), np.ones(1)),
    "numpy.fromfile": lambda flag: Calls(np.fromfile, "/etc/hostname"),
    "numpy.load": lambda flag: Calls(np.load, str(flag), None, True),
    "numpy.testing runs strings": lambda flag: Calls(
        np.testing._private.utils.runstring, f"open({str(flag)!r}, 'w')", {}
    ),
    "pathlib": lambda flag: Calls(Path.touch, flag),
    "a list of harmless things": lambda flag: [1, 2, 3],
    "an array of objects": lambda flag: np.array([{}, None], dtype=object),
    "an array with fields": lambda flag: np.zeros(2, dtype=[("a", "i4")]),
    "an array of a subclass": lambda flag: np.ones(2).view(np.matrix),
    "a masked array": lambda flag: np.ma.ones(3),
    "numpy.ndarray called": lambda flag: Calls(np.ndarray, (1 << 40,)),
    "a date": lambda flag: np.zeros(2, "datetime64[s]"),
    "a string": lambda flag: np.array(["a"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_foreign_pickle_is_refused_and_runs_nothing(tmp_path: Path, what: str) -> None:
    flag = tmp_path / "was-here"
    path = written(tmp_path, HOSTILE[what](flag))
    with pytest.raises(InputError, match="refused"):
        read_array(path)
    assert not flag.exists()


RAW = {
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "an attribute of an admitted function": b"\x80\x04\x8c\x05numpy\x8c\x11dtype.__class__.x\x93.",
    "a persistent id": b"\x80\x04\x8c\x01xQ.",
    "an extension code": b"\x80\x04\x82\x01.",
    "an old-style call": b"(S'touch x'\nios\nsystem\n.",
    "an instance made by OBJ": b"(cos\nsystem\nS'touch x'\no.",
    "state for an admitted name": b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93}\x8c\x01xK\x01sb.",
    "slots for an admitted function": b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93N}\x8c\x09_functionK\x01s\x86b.",
    "state for the class itself": b"\x80\x04\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93}\x8c\x06weightK\x01sb.",
    "a class without arrays": b"\x80\x04\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93)\x81.",
    "an unknown opcode": b"\x80\x04\xff.",
    "nothing": b"",
    "a far memo": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a huge string": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    "a huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
}


@pytest.mark.parametrize("what", RAW)
def test_tricks_with_single_opcodes_are_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(InputError):
        read_array(written(tmp_path, RAW[what]))


def test_what_one_file_does_to_the_class_is_not_seen_by_the_next(tmp_path: Path, released_class: type) -> None:
    spoiled = b"\x80\x04\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93N}\x8c\x06weightK\x01s\x86b0N."
    with pytest.raises(InputError):
        read_array(written(tmp_path, spoiled))
    good = released_class(np.ones((2, 2), np.int8), np.ones((1, 2), np.float32))
    assert isinstance(read_array(written(tmp_path, good)), QuantizedTensor)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps(np.arange(6, dtype=np.float32), 4)
    for length in range(len(whole)):
        with pytest.raises(InputError):
            read_array(written(tmp_path, whole[:length]))


def test_an_array_whose_bytes_do_not_fill_its_shape_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps(np.arange(6, dtype=np.float32), 4)
    swollen = whole.replace(b"K\x06\x85", b"K\x7f\x85")
    assert swollen != whole
    with pytest.raises(InputError, match="takes 508 bytes and it holds 24"):
        read_array(written(tmp_path, swollen))
