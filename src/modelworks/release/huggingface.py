"""Hugging Face folders: ``config.json`` and safetensors files, read into our network and written from it.

Two ideas: the tables in `layouts` say how tensors are named, and nothing else here knows a layout; tensors go by one
at a time, so that the weights never stand in memory twice. `weights_folder` checks what is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modelworks.model.decoder import Decoder
from modelworks.model.vision import network_of
from modelworks.release.layouts import TensorPlace, layout_for, places
from modelworks.release.staging import flush, staged_folder
from modelworks.release.weights_folder import WeightsFolder
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.huggingface import Layout, config_from_model, preprocessor_config
from modelworks.spec.model import ModelSpec

Progress = Callable[[str, int, int], None]
"""Told (what is done now, how many are done, of how many)."""
SHARD_BYTES = 1 << 30
"""Size at which a new safetensors file is begun."""
FORMATS = ("safetensors", "gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pretrained(folder: str | Path, progress: Progress | None = None) -> Decoder:
    """Read a Hugging Face folder into a network in fp32.

    Raises
    ------
    InputError
        If `WeightsFolder` refuses it.
    """
    source = WeightsFolder(Path(folder))
    decoder = _empty_decoder(source.spec)
    parameters = dict(decoder.named_parameters())
    listed = places(source.spec, layout_for(source.spec))
    for done, place in enumerate(listed):
        if progress is not None:
            progress("reading weights", done, len(listed))
        source.fill(place, place.of(parameters))
    return decoder


def save_pretrained(
    decoder: Decoder,
    folder: str | Path,
    *,
    dtype: str = "float32",
    vllm: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a network as a Hugging Face folder, atomically.

    Parameters
    ----------
    decoder
        The network; its layout follows from its spec.
    folder
        Where; it must not exist, unless `replace`.
    dtype
        `float32`, `bfloat16` or `float16`.
    vllm
        Write Grok-1 under the names that vLLM up to 0.24 reads, instead of SGLang's.

    Raises
    ------
    InputError
        If `folder` exists, or the network has no place in the layout.
    """
    with staged_folder(Path(folder), replace) as temporary:
        write_model(temporary, decoder, dtype=dtype, vllm=vllm, progress=progress)


def write_model(
    folder: Path, decoder: Decoder, *, dtype: str = "float32", vllm: bool = False, progress: Progress | None = None
) -> list[Path]:
    """Write ``config.json`` and the weights of a network into a folder; returns the files."""
    layout = layout_for(decoder.spec, vllm)
    parameters = dict(decoder.named_parameters())

    def fill(place: TensorPlace, target: Tensor) -> None:
        target.copy_(place.of(parameters))

    return write_tensors(folder, decoder.spec, layout, fill, dtype, progress)


def write_tensors(
    folder: Path,
    spec: ModelSpec,
    layout: Layout,
    fill: Callable[[TensorPlace, Tensor], None],
    dtype: str = "float32",
    progress: Progress | None = None,
) -> list[Path]:
    """Write ``config.json`` and a network's tensors, of which no more than a file's are in memory at a time.

    A weights file has its name only when it is whole, and one that is there already is left as it is, so that what was
    interrupted goes on.

    Parameters
    ----------
    fill
        Copies a tensor's values into the one that it is given, of the written dtype.

    Raises
    ------
    InputError
        If `dtype` isn't known or the network has no place in the layout's config.
    OperationError
        If a file can't be written.
    """
    refuse_dtype(dtype)
    config = config_from_model(spec, layout, dtype)
    shards = _shards(places(spec, layout), DTYPES[dtype])
    done, total = 0, sum(map(len, shards))
    files = []
    for number, contained in enumerate(shards, start=1):
        name = "model" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}"
        file = folder / f"{name}.safetensors"
        files.append(file)
        if file.exists():
            done += len(contained)
            continue
        tensors = {}
        for place in contained:
            # Memory of its own, since tied or sliced tensors share storage, which the format has no word for.
            tensors[place.theirs] = torch.empty(place.shape, dtype=DTYPES[dtype])
            fill(place, tensors[place.theirs])
            done += 1
            if progress is not None:
                progress("writing safetensors", done, total)
        _write_shard(file, tensors)
    if len(shards) > 1:
        files.append(_write_index(folder, shards, files))
    if spec.vision is not None:
        files.append(_write_json(folder / "preprocessor_config.json", preprocessor_config(spec.vision)))
    return [_write_json(folder / "config.json", config), *files]


def refuse_dtype(dtype: str) -> None:
    """Raise an `InputError` if weights aren't written in this dtype."""
    if dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r} is not accepted: one of {', '.join(DTYPES)} is")


def formats(given: Iterable[str], accepted: Sequence[str] = FORMATS) -> list[str]:
    """The formats that are written, each once; an `InputError` that names those accepted otherwise."""
    names = list(dict.fromkeys(name.strip() for name in given))
    for name in names:
        if name not in accepted:
            raise InputError(f"to = {name!r} is not accepted: {' and '.join(accepted)} are")
    if not names:
        raise InputError(f"to is empty: {' or '.join(accepted)} is needed")
    return names


def _shards(listed: list[TensorPlace], dtype: torch.dtype) -> list[list[TensorPlace]]:
    """The tensors by file."""
    shards: list[list[TensorPlace]] = [[]]
    held = 0
    for place in listed:
        size = math.prod(place.shape) * dtype.itemsize
        if held and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(place)
        held += size
    return shards


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    part = file.with_name(f"{file.name}.part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        flush(part)
        part.rename(file)
    except (OSError, SafetensorError) as error:
        raise OperationError(f"{file} cannot be written: {error}") from error


def _write_index(folder: Path, shards: list[list[TensorPlace]], files: list[Path]) -> Path:
    weight_map = {place.theirs: file.name for contained, file in zip(shards, files, strict=True) for place in contained}
    index = {"metadata": {"total_size": sum(file.stat().st_size for file in files)}, "weight_map": weight_map}
    return _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def _empty_decoder(spec: ModelSpec) -> Decoder:
    """A network whose weights are not drawn, since they will be read."""
    with torch.device("meta"):
        decoder = network_of(spec)
    return decoder.to_empty(device="cpu").requires_grad_(False)
