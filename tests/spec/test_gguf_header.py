"""A GGUF file's head says what the format's own library wrote into it, and a broken one is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelworks.spec.errors import InputError
from modelworks.spec.gguf_header import read_gguf_header

gguf = pytest.importorskip("gguf")
TOKENS = ["a", "bc", "def", "ü"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small GGUF file, written by the format's own library."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_chat_template("{{ messages }}")
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0, 0.0])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("token_embd.weight", np.arange(4096, dtype=np.float32).reshape(32, 128))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("output.weight", gguf.quants.quantize(np.ones((4, 64), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_says_what_the_formats_own_reader_says(file: Path) -> None:
    header, reader = read_gguf_header(file), gguf.GGUFReader(file)
    assert {name: (tensor.offset, tensor.size) for name, tensor in header.tensors.items()} == {
        tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    }
    assert header.tensors["token_embd.weight"].shape == (32, 128)
    assert header.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    own = {key: value for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == {key: value.contents() for key, value in own.items()}
    assert (header.architecture, header.context, header.chat_template) == ("llama", 77, "{{ messages }}")


def test_the_cache_of_a_token_holds_keys_and_values_of_every_layer(file: Path) -> None:
    layers, kv_heads, head_width, bytes_per_number = 3, 2, 64 // 8, 2
    assert read_gguf_header(file).kv_bytes_per_token == 2 * layers * kv_heads * head_width * bytes_per_number


def test_without_arrays_each_stands_as_its_length_and_the_rest_is_the_same(file: Path) -> None:
    whole, brief = read_gguf_header(file), read_gguf_header(file, arrays=False)
    lengths = {key: len(value) if isinstance(value, list) else value for key, value in whole.metadata.items()}
    assert brief.metadata == lengths
    assert brief.tensors == whole.tensors


@pytest.mark.parametrize("arrays", [True, False])
def test_every_truncation_is_refused(file: Path, arrays: bool) -> None:
    content = file.read_bytes()
    for length in range(len(content)):
        if length > 1500 and length % 501:
            continue
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match="is not a whole GGUF file"):
            read_gguf_header(file, arrays)


@pytest.mark.parametrize("arrays", [True, False])
def test_one_damaged_byte_is_refused_or_makes_no_difference_to_the_places(file: Path, arrays: bool) -> None:
    content = file.read_bytes()
    generator = np.random.default_rng(5)
    for place in range(900):
        damaged = bytearray(content)
        damaged[place] ^= int(generator.integers(1, 256))
        file.write_bytes(damaged)
        try:
            header = read_gguf_header(file, arrays)
        except InputError:
            continue
        assert all(tensor.offset + tensor.size <= len(content) for tensor in header.tensors.values())


def field(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dimensions))
    return head + struct.pack(f"<{len(dimensions)}Q", *dimensions) + struct.pack("<IQ", kind, offset)


def head(*, tensors: int = 1, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


HUGE = 1 << 62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "other version": (head(version=1) + tensor("x", [8]), "version is 1"),
    "no tensors": (head(tensors=0), "claims 0 tensors"),
    "countless tensors": (head(tensors=HUGE), "claims"),
    "countless entries": (head(entries=HUGE), "claims"),
    "endless key": (head(entries=1) + struct.pack("<Q", HUGE), "ends inside"),
    "endless string": (head(entries=1) + field("k", 8, struct.pack("<Q", HUGE)), "ends inside"),
    "endless numbers": (head(entries=1) + field("k", 9, struct.pack("<IQ", 4, HUGE)), "ends inside"),
    "endless strings": (head(entries=1) + field("k", 9, struct.pack("<IQ", 8, HUGE)), "array of"),
    "array of arrays": (head(entries=1) + field("k", 9, struct.pack("<IQ", 9, 1)), "array of"),
    "unknown value": (head(entries=1) + field("k", 99, b""), "unknown type 99"),
    "alignment of zero": (
        head(entries=1) + field("general.alignment", 4, struct.pack("<I", 0)) + tensor("x", [8]),
        "alignment is 0",
    ),
    "endless tensor": (head() + tensor("x", [HUGE, HUGE]), "ends at byte"),
    "far offset": (head() + tensor("x", [8], offset=HUGE), "ends at byte"),
    "five dimensions": (head() + tensor("x", [1, 1, 1, 1, 1]), "5 dimensions"),
    "no dimensions": (head() + tensor("x", []), "0 dimensions"),
    "unknown tensor": (head() + tensor("x", [8], kind=9999), "unknown type 9999"),
    "torn block": (head() + tensor("x", [33], kind=8), "blocks of 32"),
    "unprintable name": (head() + tensor("x\n", [8]), "name is"),
    "twice": (head(tensors=2) + tensor("x", [8]) + tensor("x", [8]), "twice"),
}


@pytest.mark.parametrize("arrays", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_head_is_refused_by_what_is_wrong_with_it(tmp_path: Path, kind: str, arrays: bool) -> None:
    content, sentence = HOSTILE[kind]
    path: Any = tmp_path / "hostile.gguf"
    path.write_bytes(content + bytes(256))
    with pytest.raises(InputError, match=sentence):
        read_gguf_header(path, arrays)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the model file .*nowhere\.gguf"):
        read_gguf_header(tmp_path / "nowhere.gguf")
