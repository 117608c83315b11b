"""Others' models, taken in: a GGUF file or a Hugging Face folder becomes a Hugging Face folder of ours."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modelworks.release import gguf_export, gguf_eyes, quantization
from modelworks.release.gguf_export import Described, pieces_of
from modelworks.release.gguf_file import values
from modelworks.release.gguf_network import ROPE_FACTORS, from_neighbours, rotated_heads, spec_of
from modelworks.release.huggingface import Progress, formats, refuse_dtype, write_tensors
from modelworks.release.layouts import TensorPlace, layout_for, places
from modelworks.release.manifest import source_of, write_manifest
from modelworks.release.staging import refuse_existing, staged_folder
from modelworks.release.vocabulary import (
    Vocabulary,
    read_sentencepiece,
    read_vocabulary,
    refuse_larger,
    seeing,
    vocabulary_of,
    write_tokenizer,
)
from modelworks.release.weights_folder import WeightsFolder
from modelworks.spec.errors import InputError
from modelworks.spec.gguf_header import GgufHeader, read_gguf_header
from modelworks.spec.model import ModelSpec

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.tok.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "added_tokens.json",
)
"""What is copied along; ``tokenizer.tok.json`` is Grok-2's, which SGLang reads."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_OTHER_NAMES = {"layer_output_norm": "post_ffw_norm"}
"""What llama.cpp's own converter calls a tensor of Grok-2's blocks."""


def import_gguf(file: Path, out: Path, dtype: str = "float32", progress: Progress | None = None) -> ModelSpec:
    """Turn a GGUF file (dequantised) with its tokenizer into a Hugging Face folder.

    What was interrupted goes on with the next file when it is called again with the same arguments.

    Raises
    ------
    InputError
        If the file is truncated, damaged, of an architecture or tokenizer that isn't known, or its numbers don't fit
        each other; or if `out` exists.
    OperationError
        If the folder can't be written, such as on a full disk.
    """
    refuse_existing(out.expanduser().absolute())
    refuse_dtype(dtype)
    content = read_gguf_header(file)
    spec = spec_of(content)
    vocabulary = vocabulary_of(content.metadata, str(file))
    if len(vocabulary.tokens) != spec.vocab:
        raise InputError(f"{file}: the tokenizer has {len(vocabulary.tokens)} pieces and the network {spec.vocab}")
    stored = _checked(content, spec)
    stat = file.stat()
    key = json.dumps([str(file.absolute()), stat.st_size, stat.st_mtime_ns, dtype])
    with staged_folder(out, key=key) as temporary:
        write_tensors(temporary, spec, layout_for(spec), _filler(content, spec, stored), dtype, progress)
        write_tokenizer(vocabulary, temporary, spec.context)
        write_manifest(temporary, source_of("gguf", file.name, [(file.name, stat.st_size)]), progress)
    return spec


def import_huggingface(
    folder: Path,
    out: Path,
    dtype: str = "float32",
    progress: Progress | None = None,
    *,
    to: Sequence[str] = ("safetensors",),
    precision: str = "q8_0",
    tokenizer: Path | None = None,
) -> ModelSpec:
    """Check a Hugging Face folder against its network, and write it anew, its tokenizer beside it, a few tensors at a
    time.

    What was interrupted goes on with the next file or tensor when it is called again with the same arguments.

    Parameters
    ----------
    folder
        The folder; its tensors may be cut for tensor parallelism, as Grok-2's release has them.
    out
        Where the new one shall be; it must not exist. It appears whole or not at all.
    dtype
        Of the weights in safetensors.
    to
        `safetensors`, `gguf` or both.
    precision
        Of the GGUF file.
    tokenizer
        A ``tokenizer.json`` or SentencePiece ``tokenizer.model`` for the GGUF file, where the folder has none.

    Raises
    ------
    InputError
        If a file is missing, truncated or damaged, or the tokenizer has more pieces than the network's vocabulary;
        `out` is then not made.
    OperationError
        If it can't be written, such as on a full disk.
    """
    refuse_existing(out.expanduser().absolute())
    kinds, wanted = formats(to), quantization.precision(precision)
    refuse_dtype(dtype)
    source = WeightsFolder(folder)
    spec, name = source.spec, out.expanduser().absolute().name
    tokenizer = tokenizer or next((folder / file for file in _VOCABULARIES if (folder / file).is_file()), None)
    vocabulary = _vocabulary(tokenizer, spec, needed="gguf" in kinds)
    if spec.vision is not None and vocabulary is not None:
        vocabulary = seeing(vocabulary)
        gguf_eyes.refuse_eyes(spec, vocabulary)
    blind = spec.model_copy(update={"vision": None})
    identity = [*source.identity(), *([] if tokenizer is None else [(str(tokenizer), tokenizer.stat().st_size, 0)])]
    key = json.dumps([str(folder.absolute()), identity, spec.model_dump(mode="json"), dtype, wanted, kinds])
    with staged_folder(out, key=key) as temporary:
        if "safetensors" in kinds:
            write_tensors(temporary, spec, layout_for(spec), source.fill, dtype, progress)
        gguf = temporary / f"{name}-{wanted}.gguf"
        if vocabulary is not None and not gguf.exists():
            if spec.vision is not None:
                eyes, half = gguf_eyes.eyes_file(gguf), wanted != "f32"
                gguf_eyes.write_eyes(eyes, spec, source.tensor, Described(name), half=half, progress=progress)
            pieces = pieces_of(blind, source.tensor)
            gguf_export.write_tensors(gguf, blind, vocabulary, wanted, Described(name), pieces, progress)
        for file in (*(folder / beside for beside in _TOKENIZER_FILES), *([tokenizer] if tokenizer else [])):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
        read = [(file, size) for file, size, _ in source.identity()]
        write_manifest(temporary, source_of("hf", folder.absolute().name, read), progress)
    return spec


def _vocabulary(tokenizer: Path | None, spec: ModelSpec, *, needed: bool) -> Vocabulary | None:
    """The tokenizer for a GGUF file; where none is written, its pieces are only counted.

    Raises
    ------
    InputError
        If it doesn't fit the network's embedding, or is needed and there is none.
    """
    if tokenizer is None:
        if needed:
            raise InputError(
                "a GGUF file holds the tokenizer: tokenizer = a tokenizer.json or tokenizer.model is needed"
            )
        return None
    if tokenizer.suffix == ".model":
        return read_sentencepiece(tokenizer, spec.vocab) if needed else None
    if needed:
        return read_vocabulary(tokenizer, spec.vocab)
    refuse_larger(tokenizer, spec.vocab)
    return None


def _checked(content: GgufHeader, spec: ModelSpec) -> dict[str, TensorPlace]:
    """The file's tensors by our parameter, each of the network's shape, none missing and none over."""
    by_ours = {place.ours: _as_named_there(place, content) for place in places(spec, "gguf")}
    for place in by_ours.values():
        held = content.tensors.get(place.theirs)
        if held is None:
            raise InputError(f"{content.path}: the tensor {place.theirs} is missing")
        if held.shape != place.shape:
            raise InputError(
                f"{content.path}: {place.theirs} has the shape {held.shape}, and the metadata says {place.shape}"
            )
    surplus = set(content.tensors) - {place.theirs for place in by_ours.values()} - {ROPE_FACTORS}
    if surplus:
        raise InputError(
            f"{content.path}: holds {len(surplus)} tensors that the network has no place for: {min(surplus)}"
        )
    return by_ours


def _as_named_there(place: TensorPlace, content: GgufHeader) -> TensorPlace:
    part = place.theirs.split(".")[-2]
    other = place.theirs.replace(part, _OTHER_NAMES.get(part, part))
    return place if place.theirs in content.tensors else dataclasses.replace(place, theirs=other)


def _filler(
    content: GgufHeader, spec: ModelSpec, stored: dict[str, TensorPlace]
) -> Callable[[TensorPlace, Tensor], None]:
    """Copies tensors out of the file; a layer's experts are read together and given out one by one."""

    @functools.lru_cache(maxsize=1)
    def parameter(ours: str) -> Tensor:
        return _values(content, spec, stored[ours])

    def fill(place: TensorPlace, target: Tensor) -> None:
        whole = parameter(place.ours)
        target.copy_(whole if place.expert is None else whole[place.expert])

    return fill


def _values(content: GgufHeader, spec: ModelSpec, place: TensorPlace) -> Tensor:
    numbers = values(content, place.theirs)
    if not np.all(np.isfinite(numbers)):
        raise InputError(f"{content.path}: {place.theirs} holds values that aren't finite numbers")
    heads = rotated_heads(spec, content.architecture, place.ours)
    tensor = torch.from_numpy(numbers)
    return tensor if heads is None else from_neighbours(tensor, heads)
