"""Hugging Face folders: ``config.json`` and safetensors files, read into our network and written from it.

Two ideas: the tables in `layouts` say how tensors are named, and nothing else here knows a layout; tensors go by one
at a time, so that the weights never stand in memory twice. What a file states is checked against the network's own
shapes before anything is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modelworks.model.decoder import Decoder
from modelworks.release.layouts import TensorPlace, layout_for, places
from modelworks.release.staging import flush, staged_folder
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.huggingface import Layout, config_from_model, layout_of, model_from_config
from modelworks.spec.model import ModelSpec

Progress = Callable[[str, int, int], None]
"""Told (what is done now, how many are done, of how many)."""
SHARD_BYTES = 1 << 30
"""Size at which a new safetensors file is begun."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pretrained(folder: str | Path, progress: Progress | None = None) -> Decoder:
    """Read a Hugging Face folder into a network in fp32.

    Raises
    ------
    InputError
        If the folder lacks a file, a file is truncated or damaged, the architecture isn't known, or a tensor is
        missing or has another shape than the config says.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; a Hugging Face folder with a config.json is accepted")
    spec = model_from_config(folder)
    index = _tensor_files(folder)
    wanted = _wanted(spec, index, folder)
    _check_shapes(wanted, index, folder)
    decoder = _empty_decoder(spec)
    parameters = dict(decoder.named_parameters())
    for done, (place, tensor) in enumerate(_read(wanted, index, folder)):
        if progress is not None:
            progress("reading weights", done, len(wanted))
        place.of(parameters).copy_(tensor)
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
    if dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r} is not accepted: one of {', '.join(DTYPES)} is")
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
    return [_write_json(folder / "config.json", config), *files]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's table; an `InputError` if it can't be read or isn't one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise InputError(f"{path}: is damaged: it isn't JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a table of fields is accepted, and this is a {type(values).__name__}")
    return values


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


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: weight_map is missing or damaged")
        listed = {name: folder / Path(file).name for name, file in weight_map.items()}
        for file in sorted(set(listed.values())):
            if not file.is_file():
                raise InputError(f"{file}: is missing, and {index.name} names it")
        return listed
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no safetensors files (model.safetensors is accepted)")
    found: dict[str, Path] = {}
    for file in files:
        with open_safetensors(file) as content:
            found |= dict.fromkeys(content.keys(), file)
    return found


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file, memory-mapped; an `InputError` if it is truncated or damaged."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: is truncated or damaged: {error}") from None


def _wanted(spec: ModelSpec, index: dict[str, Path], folder: Path) -> list[TensorPlace]:
    """The tensors to read, in whichever of Grok-1's two layouts the folder has."""
    if spec.layers > len(index):
        raise InputError(f"{folder}: holds {len(index)} tensors, and the config speaks of {spec.layers} layers")
    layout = layout_of(spec)
    if layout == "grok-1" and any(".moe_block." in name for name in index):
        layout = "grok-1-vllm"
    # A tied head repeats the embedding and may be left out.
    wanted = [
        place for place in places(spec, layout) if not (spec.tied_embeddings and place.theirs == "lm_head.weight")
    ]
    missing = [place.theirs for place in wanted if place.theirs not in index]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]} "
            f"(the names of {layout} are accepted)"
        )
    expected = {place.theirs for place in wanted} | {"lm_head.weight"}
    # Old exporters stored the rotary frequencies, which follow from the config.
    surplus = [name for name in index if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if surplus:
        raise InputError(f"{folder}: holds {len(surplus)} tensors that the config has no place for: {surplus[0]}")
    return wanted


def _check_shapes(wanted: list[TensorPlace], index: dict[str, Path], folder: Path) -> None:
    by_file: dict[Path, list[TensorPlace]] = {}
    for place in wanted:
        by_file.setdefault(index[place.theirs], []).append(place)
    for file, contained in by_file.items():
        with open_safetensors(file) as content:
            held = set(content.keys())
            for place in contained:
                if place.theirs not in held:
                    raise InputError(f"{file}: the tensor {place.theirs} is missing")
                shape = tuple(content.get_slice(place.theirs).get_shape())
                if shape != place.shape:
                    raise InputError(
                        f"{file}: {place.theirs} has the shape {shape}, and {folder / 'config.json'} says {place.shape}"
                    )


def _read(wanted: list[TensorPlace], index: dict[str, Path], folder: Path) -> Iterator[tuple[TensorPlace, Tensor]]:
    for file in dict.fromkeys(index[place.theirs] for place in wanted):
        with open_safetensors(file) as content:
            for place in wanted:
                if index[place.theirs] != file:
                    continue
                tensor = content.get_tensor(place.theirs)
                if not tensor.is_floating_point():
                    raise InputError(
                        f"{file}: {place.theirs} is {tensor.dtype}, and floating-point weights are accepted"
                    )
                yield place, tensor


def _empty_decoder(spec: ModelSpec) -> Decoder:
    """A network whose weights are not drawn, since they will be read."""
    with torch.device("meta"):
        decoder = Decoder(spec)
    return decoder.to_empty(device="cpu").requires_grad_(False)
