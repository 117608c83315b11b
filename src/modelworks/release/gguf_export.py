"""Writes a network as a GGUF file that llama.cpp runs, one tensor in memory at a time.

The `gguf` package writes what stands before the tensors; the tensors follow piece by piece, each on a multiple of the
file's alignment. Beside a file that isn't finished stands how many of its tensors are whole, so that writing goes on
there after an interruption.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedRandom
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from modelworks.model.decoder import Decoder
from modelworks.release.gguf_network import ROPE_FACTORS, metadata_of, rope_factors, rotated_heads, to_neighbours
from modelworks.release.huggingface import Progress
from modelworks.release.layouts import TensorPlace, places
from modelworks.release.quantization import FILE_TYPES, Precision, encoded, kind_for
from modelworks.release.vocabulary import Vocabulary
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.home import write_atomically
from modelworks.spec.model import ModelSpec

Pieces = Callable[[TensorPlace, gguf.GGMLQuantizationType], Iterable[np.ndarray]]
"""A tensor's content in a format, in pieces whose bytes follow one another."""
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class Described:
    """What a GGUF file says of itself beside the network."""

    name: str
    license: str | None = None


def write_gguf(
    path: Path,
    decoder: Decoder,
    vocabulary: Vocabulary,
    precision: Precision,
    described: Described,
    progress: Progress | None = None,
) -> None:
    """Write a network with its tokenizer, without its eyes; raises as `write_tensors` does."""
    blind = decoder.spec.model_copy(update={"vision": None})
    write_tensors(path, blind, vocabulary, precision, described, pieces_of(blind, reading(decoder)), progress)


def reading(decoder: Decoder) -> Callable[[str, int | None, tuple[int, ...]], torch.Tensor]:
    """What gives a network's parameters in fp32, as `pieces_of` asks for them."""
    parameters = dict(decoder.named_parameters())

    def read(ours: str, expert: int | None, _: tuple[int, ...]) -> torch.Tensor:
        return TensorPlace("", ours, expert, ()).of(parameters).to(torch.float32)

    return read


def pieces_of(spec: ModelSpec, read: Callable[[str, int | None, tuple[int, ...]], torch.Tensor]) -> Pieces:
    """The pieces of a network's tensors, an expert at a time.

    Parameters
    ----------
    spec
        The network.
    read
        Gives a parameter, or the part of it that is an expert's, in fp32: from its name, the expert's number or None,
        and the shape.
    """
    architecture, _ = metadata_of(spec)

    def pieces(place: TensorPlace, kind: gguf.GGMLQuantizationType) -> Iterator[np.ndarray]:
        if len(place.shape) == 3:
            for expert in range(place.shape[0]):
                yield encoded(read(place.ours, expert, place.shape[1:]).numpy(), kind)
            return
        tensor = read(place.ours, None, place.shape)
        heads = rotated_heads(spec, architecture, place.ours)
        yield encoded((tensor if heads is None else to_neighbours(tensor, heads)).numpy(), kind)

    return pieces


def write_tensors(
    path: Path,
    spec: ModelSpec,
    vocabulary: Vocabulary,
    precision: Precision,
    described: Described,
    pieces: Pieces,
    progress: Progress | None = None,
) -> None:
    """Write a network whose tensors come in pieces, and its tokenizer; a file that was begun alike is gone on with.

    Raises
    ------
    InputError
        If the network has no place in llama.cpp's architectures, or the vocabulary isn't as large as the network's.
    OperationError
        If the file can't be written.
    """
    if len(vocabulary.tokens) != spec.vocab:
        raise InputError(f"the tokenizer has {len(vocabulary.tokens)} pieces and the network's vocabulary {spec.vocab}")
    listed = places(spec, "gguf")
    kinds = [kind_for(place.theirs, place.shape, precision) for place in listed]
    part, count = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.tensors")
    try:
        start = _start(path, spec, vocabulary, precision, described, [*zip(listed, kinds, strict=True)])
        whole, begin = _whole_tensors(part, count, start), len(start)
        if not whole:
            part.write_bytes(start)
        with part.open("r+b") as file:
            for done, (place, kind) in enumerate(zip(listed, kinds, strict=True), start=1):
                size = _bytes(place, kind)
                if done > whole:
                    _write_one(file, begin, size, pieces(place, kind))
                    os.fsync(file.fileno())
                    write_atomically(count, f"{done}\n")
                begin += size + -size % _ALIGNMENT
                if progress is not None:
                    progress(f"writing GGUF {precision}", done, len(listed))
        part.rename(path)
        count.unlink()
    except OSError as error:
        raise OperationError(f"{path} cannot be written: {error.strerror or error}") from error


def _whole_tensors(part: Path, count: Path, start: bytes) -> int:
    """How many tensors of an earlier attempt at this very file are whole."""
    try:
        with part.open("rb") as file:
            return int(count.read_text()) if file.read(len(start)) == start else 0
    except (FileNotFoundError, ValueError):
        return 0


def _write_one(file: BufferedRandom, begin: int, size: int, pieces: Iterable[np.ndarray]) -> None:
    file.seek(begin)
    file.truncate()
    for piece in pieces:
        file.write(np.ascontiguousarray(piece).view(np.uint8).reshape(-1).data)
    assert file.tell() == begin + size
    file.write(b"\0" * (-size % _ALIGNMENT))
    file.flush()


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % _ALIGNMENT)


def _bytes(place: TensorPlace, kind: gguf.GGMLQuantizationType) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return prod(place.shape) // block * block_bytes


def _start(
    path: Path,
    spec: ModelSpec,
    vocabulary: Vocabulary,
    precision: Precision,
    described: Described,
    listed: list[tuple[TensorPlace, gguf.GGMLQuantizationType]],
) -> bytes:
    """All that stands before the first tensor of the network."""
    architecture, metadata = metadata_of(spec)
    file = path.with_name(f"{path.name}.header")
    writer = gguf.GGUFWriter(file, architecture)
    try:
        _write_metadata(writer, architecture, metadata, vocabulary, precision, described)
        factors = rope_factors(spec)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
        for place, kind in listed:
            writer.add_tensor_info(place.theirs, place.shape, np.dtype(np.float32), _bytes(place, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = _padded(file.read_bytes())
        return start if factors is None else start + _padded(factors.numpy().tobytes())
    finally:
        with contextlib.suppress(OSError):
            writer.close()
        file.unlink(missing_ok=True)


def _write_metadata(
    writer: gguf.GGUFWriter,
    architecture: str,
    metadata: dict[str, Any],
    vocabulary: Vocabulary,
    precision: Precision,
    described: Described,
) -> None:
    writer.add_name(described.name)
    if described.license is not None:
        writer.add_license(described.license)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2" if vocabulary.scores is None else "llama")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is None:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(True)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.eot is not None:
        writer.add_eot_token_id(vocabulary.eot)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_chat_template(vocabulary.chat_template)
