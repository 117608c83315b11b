"""Others' models, taken in: a GGUF file or a Hugging Face folder becomes a Hugging Face folder of ours."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modelworks.release.gguf_file import values
from modelworks.release.gguf_network import ROPE_FACTORS, from_neighbours, rotated_heads, spec_of
from modelworks.release.huggingface import Progress, load_pretrained, write_model, write_tensors
from modelworks.release.layouts import TensorPlace, layout_for, places
from modelworks.release.staging import refuse_existing, staged_folder
from modelworks.release.vocabulary import vocabulary_of, write_tokenizer
from modelworks.spec.errors import InputError
from modelworks.spec.gguf_header import GgufHeader, read_gguf_header
from modelworks.spec.model import ModelSpec

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def import_gguf(file: Path, out: Path, dtype: str = "float32", progress: Progress | None = None) -> ModelSpec:
    """Turn a GGUF file (dequantised) with its tokenizer into a Hugging Face folder.

    Raises
    ------
    InputError
        If the file is truncated, damaged, of an architecture or tokenizer that isn't known, or its numbers don't fit
        each other; or if `out` exists.
    """
    refuse_existing(out.expanduser().absolute())
    content = read_gguf_header(file)
    spec = spec_of(content)
    vocabulary = vocabulary_of(content.metadata, str(file))
    if len(vocabulary.tokens) != spec.vocab:
        raise InputError(f"{file}: the tokenizer has {len(vocabulary.tokens)} pieces and the network {spec.vocab}")
    stored = _checked(content, spec)
    with staged_folder(out) as temporary:
        write_tensors(temporary, spec, layout_for(spec), _filler(content, spec, stored), dtype, progress)
        write_tokenizer(vocabulary, temporary, spec.context)
    return spec


def import_huggingface(folder: Path, out: Path, dtype: str = "float32", progress: Progress | None = None) -> ModelSpec:
    """Read a Hugging Face folder, check it against the network, and write it anew with its tokenizer."""
    refuse_existing(out.expanduser().absolute())
    decoder = load_pretrained(folder, progress)
    with staged_folder(out) as temporary:
        write_model(temporary, decoder, dtype=dtype, progress=progress)
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
    return decoder.spec


def _checked(content: GgufHeader, spec: ModelSpec) -> dict[str, TensorPlace]:
    """The file's tensors by our parameter, each of the network's shape, none missing and none over."""
    by_ours = {place.ours: place for place in places(spec, "gguf")}
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
