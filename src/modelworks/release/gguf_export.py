"""Writes a network as a GGUF file that llama.cpp runs, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
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
    """Write a network with its tokenizer.

    Raises
    ------
    InputError
        If the network has no place in llama.cpp's architectures, or the vocabulary isn't as large as the network's.
    OperationError
        If the file can't be written.
    """
    spec = decoder.spec
    if len(vocabulary.tokens) != spec.vocab:
        raise InputError(f"the tokenizer has {len(vocabulary.tokens)} pieces and the network's vocabulary {spec.vocab}")
    architecture, metadata = metadata_of(spec)
    listed = places(spec, "gguf")
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _write_metadata(writer, architecture, metadata, vocabulary, precision, described)
        factors = rope_factors(spec)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
        for place in listed:
            _announce(writer, place, precision)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for done, values in enumerate(_tensors(decoder, architecture, listed, precision)):
            if progress is not None:
                progress(f"writing GGUF {precision}", done, len(listed))
            writer.write_tensor_data(values)
    except OSError as error:
        raise OperationError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()


def _announce(writer: gguf.GGUFWriter, place: TensorPlace, precision: Precision) -> None:
    kind = kind_for(place.theirs, place.shape, precision)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    size = int(np.prod(place.shape)) // block * block_bytes
    writer.add_tensor_info(place.theirs, place.shape, np.dtype(np.float32), size, raw_dtype=kind)


def _tensors(
    decoder: Decoder, architecture: str, listed: list[TensorPlace], precision: Precision
) -> Iterator[np.ndarray]:
    parameters = dict(decoder.named_parameters())
    for place in listed:
        tensor = place.of(parameters).to(torch.float32)
        heads = rotated_heads(decoder.spec, architecture, place.ours)
        if heads is not None:
            tensor = to_neighbours(tensor, heads)
        yield encoded(tensor.numpy(), kind_for(place.theirs, place.shape, precision))


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
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.eot is not None:
        writer.add_eot_token_id(vocabulary.eot)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_chat_template(vocabulary.chat_template)
