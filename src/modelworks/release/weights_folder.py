"""Others' Hugging Face folders: what their files hold, checked against the config, and read when it is needed.

Three ideas. Everything that a file's header states is held against the network's own shapes before a value is read. A
file is open only while a tensor is copied out of it, so that what stays in memory is the copy. And a tensor may lie in
several files, as tensor parallelism wants it: Grok-2's release has its experts in ``*-TP-000.safetensors`` to
``*-TP-007.safetensors`` and the rest in ``*-TP-common.safetensors``; along which dimension they were cut follows from
their shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modelworks.model.vision import Tower
from modelworks.release.json_file import read_json
from modelworks.release.layouts import TOWER_TABLE, TensorPlace, places, places_of
from modelworks.spec.errors import InputError
from modelworks.spec.huggingface import layout_of, model_from_config, tower_from_config
from modelworks.spec.model import ModelSpec

_PRESHARDED = re.compile(r".*-TP-(common|\d{3})\.safetensors")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    files: tuple[Path, ...]
    """One, or those of its shards in their order."""
    dim: int | None = None
    """Along which dimension the shards follow one another; None where the first file has the whole."""


class WeightsFolder:
    """A Hugging Face folder whose tensors fit its config.

    Attributes
    ----------
    path, spec
        The folder, and the network that its config describes.

    Raises
    ------
    InputError
        If the folder lacks a file, a file is truncated or damaged, the architecture isn't known, or a tensor is
        missing, has another shape than the config says, or isn't made of floating-point numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        if not self.path.is_dir():
            raise InputError(
                f"{self.path}: there is no such folder; a Hugging Face folder with a config.json is accepted"
            )
        self.spec: ModelSpec = model_from_config(self.path)
        held = _files_by_tensor(self.path)
        wanted = _wanted(self.spec, held, self.path)
        self._places = {(place.ours, place.expert): place for place in wanted}
        self._stored = _checked(wanted, held, self.path)

    def identity(self) -> list[tuple[str, int, int]]:
        """Every file with its size and time: what work that goes on after an interruption must find unchanged."""
        files = {file for stored in self._stored.values() for file in stored.files} | {self.path / "config.json"}
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]

    def fill(self, place: TensorPlace, target: Tensor) -> None:
        """Copy a parameter, or an expert's part of it, into `target`; the place may be another layout's.

        Raises
        ------
        InputError
            If it holds values that aren't finite numbers in the target's dtype.
        """
        found = self._places[place.ours, place.expert]
        _copy(self._stored[found.theirs], found.theirs, target)

    def tensor(self, ours: str, expert: int | None, shape: tuple[int, ...]) -> Tensor:
        """A parameter, or an expert's part of it, in fp32."""
        found = torch.empty(shape)
        place = self._places[ours, expert]
        self.fill(place, found.view(place.shape))
        return found


def load_tower(folder: Path) -> Tower:
    """Read the vision tower of a SigLIP folder in fp32; its text tower and its pooling head are left out.

    Raises
    ------
    InputError
        If the folder lacks a file or a tensor, or one has another shape than the config says or values that aren't
        finite.
    """
    spec = tower_from_config(folder / "config.json")
    held = _files_by_tensor(folder)
    with torch.device("meta"):
        tower = Tower(spec)
    tower = tower.to_empty(device="cpu").requires_grad_(False)
    parameters = dict(tower.named_parameters())
    table = dict(TOWER_TABLE)
    if not any(name.startswith("vision_model.") for name in held):
        table = {ours: theirs.removeprefix("vision_model.") for ours, theirs in table.items()}
    wanted = places_of({name: tuple(value.shape) for name, value in parameters.items()}, table, "siglip", spec)
    _refuse_missing(wanted, held, folder, "siglip")
    stored = _checked(wanted, held, folder)
    for place in wanted:
        _copy(stored[place.theirs], place.theirs, place.of(parameters))
    return tower


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file, memory-mapped; an `InputError` if it is truncated or damaged."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: is truncated or damaged: {error}") from None


def _copy(stored: Stored, theirs: str, target: Tensor) -> None:
    """Copy a tensor into `target`; an `InputError` if it then holds values that aren't finite numbers."""
    begin = 0
    for file in stored.files if stored.dim is not None else stored.files[:1]:
        with open_safetensors(file) as content:
            part = content.get_tensor(theirs)
            if stored.dim is None:
                target.copy_(part)
            else:
                target.narrow(stored.dim, begin, part.shape[stored.dim]).copy_(part)
                begin += part.shape[stored.dim]
            del part
    if not bool(torch.isfinite(target).all()):
        raise InputError(f"{stored.files[0]}: {theirs} holds values that aren't finite numbers")


def _files_by_tensor(folder: Path) -> dict[str, list[Path]]:
    """Which files of a folder hold each tensor, or its shards in their order."""
    presharded = sorted(file for file in folder.glob("*.safetensors") if _PRESHARDED.fullmatch(file.name))
    if presharded:
        return _presharded(presharded)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: weight_map is missing or damaged")
        listed = {name: [folder / Path(file).name] for name, file in weight_map.items()}
        for [file] in sorted(listed.values()):
            if not file.is_file():
                raise InputError(f"{file}: is missing, and {index.name} names it")
        return listed
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: holds no safetensors files (model.safetensors is accepted)")
    found: dict[str, list[Path]] = {}
    for file in files:
        with open_safetensors(file) as content:
            found |= {name: [file] for name in content.keys()}  # noqa: SIM118 (it is no mapping)
    return found


def _presharded(files: list[Path]) -> dict[str, list[Path]]:
    """The files of each tensor by rank; every tensor is common to all ranks or has a shard for each."""
    by_rank: dict[str, dict[str, Path]] = {}
    for file in files:
        match = _PRESHARDED.fullmatch(file.name)
        assert match is not None
        with open_safetensors(file) as content:
            for name in content.keys():  # noqa: SIM118 (it is no mapping)
                if match[1] in by_rank.setdefault(name, {}):
                    raise InputError(f"{file}: holds {name}, and {by_rank[name][match[1]].name} does too")
                by_rank[name][match[1]] = file
    ranks = sorted({rank for held in by_rank.values() for rank in held} - {"common"})
    expected = [f"{rank:03d}" for rank in range(len(ranks))]
    for name, held in by_rank.items():
        if "common" in held and len(held) == 1:
            continue
        missing = sorted(set(expected if expected == ranks else [*expected, *ranks]) - set(held))
        if "common" in held or missing:
            where = "a common file too" if "common" in held else f"none in *-TP-{missing[0]}.safetensors"
            raise InputError(
                f"{files[0].parent}: the tensor {name} has shards for {len(held)} of {max(len(ranks), 1)} ranks, and "
                f"{where}: one for each rank from 000 on is accepted"
            )
    return {name: [held[rank] for rank in sorted(held)] for name, held in by_rank.items()}


def _wanted(spec: ModelSpec, held: Mapping[str, Any], folder: Path) -> list[TensorPlace]:
    """The tensors to read, in whichever of Grok-1's two layouts the folder has."""
    if spec.layers > len(held):
        raise InputError(f"{folder}: holds {len(held)} tensors, and the config speaks of {spec.layers} layers")
    layout = layout_of(spec)
    if layout == "grok-1" and any(".moe_block." in name for name in held):
        layout = "grok-1-vllm"
    # A tied head repeats the embedding and may be left out.
    wanted = [
        place for place in places(spec, layout) if not (spec.tied_embeddings and place.theirs == "lm_head.weight")
    ]
    _refuse_missing(wanted, held, folder, layout)
    expected = {place.theirs for place in wanted} | {"lm_head.weight"}
    # Old exporters stored the rotary frequencies, which follow from the config.
    surplus = [name for name in held if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if surplus:
        raise InputError(f"{folder}: holds {len(surplus)} tensors that the config has no place for: {surplus[0]}")
    return wanted


def _refuse_missing(wanted: list[TensorPlace], held: Mapping[str, Any], folder: Path, layout: str) -> None:
    missing = [place.theirs for place in wanted if place.theirs not in held]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]} "
            f"(the names of {layout} are accepted)"
        )


def _checked(wanted: list[TensorPlace], held: Mapping[str, list[Path]], folder: Path) -> dict[str, Stored]:
    """Where each wanted tensor lies, its shape and kind of numbers checked."""
    by_file: dict[Path, list[str]] = {}
    for place in wanted:
        for file in held[place.theirs]:
            by_file.setdefault(file, []).append(place.theirs)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for file, names in sorted(by_file.items()):
        with open_safetensors(file) as content:
            inside = set(content.keys())
            for name in names:
                if name not in inside:
                    raise InputError(f"{file}: the tensor {name} is missing")
                header = content.get_slice(name)
                if not header.get_dtype().startswith(("F", "BF")):
                    raise InputError(f"{file}: {name} is {header.get_dtype()}, and floating-point weights are accepted")
                shapes.setdefault(name, []).append(tuple(header.get_shape()))
    return {place.theirs: _stored(place, held[place.theirs], shapes[place.theirs], folder) for place in wanted}


def _stored(place: TensorPlace, files: list[Path], shapes: list[tuple[int, ...]], folder: Path) -> Stored:
    if all(shape == place.shape for shape in shapes):
        return Stored(tuple(files))
    if len(files) > 1 and all(len(shape) == len(place.shape) for shape in shapes):
        for dim, size in enumerate(place.shape):
            rest = place.shape[:dim] + place.shape[dim + 1 :]
            fits = all(shape[:dim] + shape[dim + 1 :] == rest for shape in shapes)
            if fits and sum(shape[dim] for shape in shapes) == size:
                return Stored(tuple(files), dim)
    given = shapes[0] if len(files) == 1 else f"{len(files)} shards of {shapes[0]}"
    raise InputError(
        f"{files[0]}: {place.theirs} has the shape {given}, and {folder / 'config.json'} says {place.shape}"
    )
