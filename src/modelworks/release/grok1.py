"""Grok-1's released checkpoint, turned into a Hugging Face folder or a GGUF file a few rows at a time.

The whole has 318 GB, of which little is in memory at a time: files are mapped, values are made block by block, and an
import that was interrupted goes on with the next file or tensor. In a Q8_0 file the eight-bit values stay what they
are, since a block of 32 of them has one scale in the release too.

The release is a folder ``ckpt-0`` of pickles ``tensorNNNNN_000``, in the order in which JAX flattens the parameters:
their paths sorted as text, so that layer 10 comes before layer 2. Matrices are (in, out) and mostly in eight bits.
Source: xai-org/grok-1, ``checkpoint.py`` and ``model.py`` (March 2024).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from modelworks.release import gguf_export, quantization
from modelworks.release.huggingface import Progress, formats, refuse_dtype, write_tensors
from modelworks.release.json_file import read_json
from modelworks.release.layouts import TensorPlace, places
from modelworks.release.manifest import source_of, write_manifest
from modelworks.release.parity import LIMITS, check_parity, of_folder, of_gguf
from modelworks.release.pickles import QuantizedTensor, forget_pages, read_array
from modelworks.release.staging import refuse_existing, staged_folder
from modelworks.release.vocabulary import read_sentencepiece
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import model_spec
from modelworks.spec.huggingface import Layout
from modelworks.spec.model import ModelSpec

_EMBEDDING = "params/language_model/in_out_embed/embeddings"
_FINAL_NORM = "params/language_model/rms_norm/scale"
_LAYER = "params/transformer/decoder_layer_{layer}/"
_LAYER_PARTS = {
    "rms_norm/scale": "blocks.{layer}.attn_norm.weight",
    "rms_norm_1/scale": "blocks.{layer}.attn_post_norm.weight",
    "rms_norm_2/scale": "blocks.{layer}.ffn_norm.weight",
    "rms_norm_3/scale": "blocks.{layer}.ffn_post_norm.weight",
    "multi_head_attention/query/w": "blocks.{layer}.attn.wq.weight",
    "multi_head_attention/key/w": "blocks.{layer}.attn.wk.weight",
    "multi_head_attention/value/w": "blocks.{layer}.attn.wv.weight",
    "multi_head_attention/linear/w": "blocks.{layer}.attn.wo.weight",
    "router/w": "blocks.{layer}.moe.router.weight",
    "moe/linear/w": "blocks.{layer}.moe.gate",
    "moe/linear_v/w": "blocks.{layer}.moe.up",
    "moe/linear_1/w": "blocks.{layer}.moe.down",
}
"""The paths of the release's parameters in a layer, and ours: `linear` is the gate, `linear_v` the value beside it."""
_EXPERTS, _TOP_K, _FFN_FACTOR = 8, 2, 8.0
_CHUNK = 1 << 24
"""Numbers that are held in fp32 at a time."""
_SIZES = ("emb", "layers", "q", "kv", "key", "vocab", "seq")


@dataclass(frozen=True)
class ReleasedTensor:
    """One file of the release."""

    index: int
    path: str
    shape: tuple[int, ...] | None
    """(in, out), where a manifest states it."""


def import_grok1(
    folder: Path,
    out: Path,
    config: Path | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
    *,
    to: Sequence[str] = ("safetensors",),
    vllm: bool = False,
    precision: str = "q8_0",
    tokenizer: Path | None = None,
) -> ModelSpec:
    """Turn a released checkpoint into a Hugging Face folder in SGLang's layout, a GGUF file, or both.

    What was interrupted goes on where it was when it is called again with the same arguments. When all is written, the
    first, the middle and the last layer are read back and held against the release (`parity`), and every file's
    SHA-256 is noted in ``manifest.json``, for `verify`.

    Parameters
    ----------
    folder
        The checkpoint: the folder that holds ``ckpt-0``, or ``ckpt-0`` itself.
    out
        Where the folder shall be; it must not exist. It appears whole or not at all.
    config
        A manifest with the network's sizes and the tensors' paths; without it the release's own constants hold.
    dtype
        Of the weights in safetensors. The release computes in bfloat16; `float32` loses nothing of the eight bits.
    to
        `safetensors`, `gguf` or both.
    vllm
        Name the safetensors as vLLM up to 0.24 does, not as SGLang.
    precision
        Of the GGUF file.
    tokenizer
        The release's ``tokenizer.model``, which a GGUF file needs.

    Raises
    ------
    InputError
        If a file is missing, truncated, hostile or of another shape than the network's; `out` is then not made.
    OperationError
        If it can't be written, such as on a full disk, or what was written isn't the release's network.
    """
    refuse_existing(out.expanduser().absolute())
    kinds = formats(to)
    refuse_dtype(dtype)
    wanted = quantization.precision(precision)
    checkpoint = folder / "ckpt-0" if (folder / "ckpt-0").is_dir() else folder
    if not checkpoint.is_dir():
        raise InputError(f"{folder}: there is no such folder; one that holds ckpt-0/tensor00000_000 is accepted")
    spec, listed = read_manifest(config) if config is not None else release_manifest()
    release = Release(checkpoint, spec, listed)
    vocabulary = None
    if "gguf" in kinds:
        if tokenizer is None:
            raise InputError("a GGUF file holds the tokenizer: tokenizer = the release's tokenizer.model is needed")
        vocabulary = read_sentencepiece(tokenizer, spec.vocab)
    key = json.dumps([release.identity(), spec.model_dump(mode="json"), dtype, vllm, wanted, sorted(kinds)])
    with staged_folder(out, key=key) as temporary:
        parity: dict[str, Any] = {}
        if "safetensors" in kinds:
            layout: Layout = "grok-1-vllm" if vllm else "grok-1"
            write_tensors(temporary, spec, layout, release.fill, dtype, progress)
            written = of_folder(temporary)
            found = check_parity(release.content, spec, written, LIMITS[dtype], f"safetensors in {out}", progress)
            parity["safetensors"] = found.as_dict()
        if vocabulary is not None:
            name = out.expanduser().absolute().name
            file = temporary / f"{name}-{wanted}.gguf"
            if not file.exists():
                gguf_export.write_tensors(
                    file, spec, vocabulary, wanted, gguf_export.Described(name, "Apache-2.0"), release.pieces, progress
                )
            found = check_parity(release.content, spec, of_gguf(file), LIMITS[wanted], file.name, progress)
            parity[file.name] = found.as_dict()
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.model")
        read = [(Path(name).name, size) for name, size, _ in release.identity()]
        source = source_of("grok-1", checkpoint.absolute().name, read) | {"parity": parity}
        write_manifest(temporary, source, progress)
    return spec


def release_manifest() -> tuple[ModelSpec, list[ReleasedTensor]]:
    """The network and the files of the release of March 2024: 770 tensors."""
    spec = model_spec("grok-1")
    paths = [_EMBEDDING, _FINAL_NORM]
    paths += [_LAYER.format(layer=layer) + part for layer in range(spec.layers) for part in _LAYER_PARTS]
    return spec, [ReleasedTensor(index, path, None) for index, path in enumerate(sorted(paths))]


def read_manifest(path: Path) -> tuple[ModelSpec, list[ReleasedTensor]]:
    """The network and the files that a manifest states.

    Raises
    ------
    InputError
        If a field is missing, or isn't what a network of Grok-1's shape can have.
    """
    if path.is_dir():
        path = path / "manifest.json"
    values = read_json(path)
    sizes, listed = values.get("config"), values.get("manifest")
    if not isinstance(sizes, dict) or not isinstance(listed, list):
        raise InputError(f"{path}: a manifest has the tables 'config' and 'manifest'")
    for name in _SIZES:
        if type(sizes.get(name)) is not int or sizes[name] <= 0:
            raise InputError(f"{path}: config.{name} = {sizes.get(name)!r} is not accepted: a positive number is")
    needed = 2 + len(_LAYER_PARTS) * sizes["layers"]
    if len(listed) != needed:
        raise InputError(
            f"{path}: manifest lists {len(listed)} tensors, and a network of {sizes['layers']} layers has {needed}"
        )
    spec = _spec(sizes, path)
    tensors = [_entry(entry, path) for entry in listed]
    known = set(_paths(spec))
    for tensor in tensors:
        if tensor.path not in known:
            raise InputError(f"{path}: manifest names {tensor.path!r}, which Grok-1's shape doesn't have")
    missing = known - {tensor.path for tensor in tensors}
    if missing:
        raise InputError(f"{path}: manifest lacks {min(missing)}")
    return spec, tensors


def _spec(sizes: dict[str, Any], path: Path) -> ModelSpec:
    """The network of a manifest's sizes; the rest are the release's constants.

    The experts' width is the release's `ffn_size`: two thirds of eight times the width, up to a multiple of eight.
    """
    hidden = sizes["emb"]
    width = int(_FFN_FACTOR * hidden) * 2 // 3
    width += (8 - width) % 8
    values = {
        "name": path.parent.name or "grok-1",
        "layers": sizes["layers"],
        "hidden": hidden,
        "ffn_hidden": width,
        "heads": sizes["q"],
        "kv_heads": sizes["kv"],
        "head_dim": sizes["key"],
        "vocab": sizes["vocab"],
        "context": sizes["seq"],
        "activation": "gelu",
        "norm_placement": "sandwich",
        "attention_multiplier": sizes["key"] ** -0.5,
        "attention_softcap": 30.0,
        "embedding_multiplier": math.sqrt(hidden),
        "output_multiplier": model_spec("grok-1").output_multiplier,
        "tied_embeddings": True,
        "moe": {"experts": _EXPERTS, "top_k": _TOP_K, "expert_hidden": width},
    }
    return validate(ModelSpec, values, where=str(path))


def _entry(entry: Any, path: Path) -> ReleasedTensor:
    try:
        index, name, shape = entry["index"], entry["path"], entry["shape"]
        if type(index) is int and index >= 0 and isinstance(name, str):
            return ReleasedTensor(index, name, tuple(int(size) for size in shape))
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{path}: an entry of manifest has index, path and shape, and this is {str(entry)[:80]}")


def _paths(spec: ModelSpec) -> dict[str, str]:
    """Each path of the release, and our parameter."""
    paths = {_EMBEDDING: "embed.weight", _FINAL_NORM: "final_norm.weight"}
    for layer in range(spec.layers):
        for part, ours in _LAYER_PARTS.items():
            paths[_LAYER.format(layer=layer) + part] = ours.format(layer=layer)
    return paths


def _file(checkpoint: Path, tensor: ReleasedTensor) -> Path:
    return checkpoint / f"tensor{tensor.index:05d}_000"


class Release:
    """The release's parameters, read when they are needed.

    Raises
    ------
    InputError
        If a file of the network is missing.
    """

    def __init__(self, checkpoint: Path, spec: ModelSpec, listed: list[ReleasedTensor]) -> None:
        ours = _paths(spec)
        self._files = {ours[tensor.path]: (tensor, _file(checkpoint, tensor)) for tensor in listed}
        self._shapes = {place.ours: place.shape for place in places(spec, "gguf")}
        self._held: tuple[str, np.ndarray | QuantizedTensor] | None = None
        for _, file in self._files.values():
            if not file.is_file():
                raise InputError(f"{file}: is missing; the network has {len(listed)} tensors")

    def identity(self) -> list[tuple[str, int, int]]:
        """Every file with its size and time: what an interrupted import must find unchanged."""
        stats = [(str(file.absolute()), file.stat()) for _, file in self._files.values()]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def fill(self, place: TensorPlace, target: Tensor) -> None:
        """Copy a parameter's values, or an expert's slice of them, into `target`, which is (out, in)."""
        content = self.content(place.ours)
        self._fill(place.ours, content if place.expert is None else _expert(content, place.expert), target)

    def pieces(self, place: TensorPlace, kind: GGMLQuantizationType) -> Iterator[np.ndarray]:
        """A parameter in a format of GGUF, an expert at a time."""
        content, file = self.content(place.ours), self._files[place.ours][1]
        experts = [content] if len(place.shape) < 3 else [_expert(content, number) for number in range(place.shape[0])]
        for one in experts:
            if kind is GGMLQuantizationType.Q8_0 and isinstance(one, QuantizedTensor) and _in_blocks_of_32(one):
                _check_scales(one, file)
                yield as_q8_0(one)
                forget_pages(one.weight)
                continue
            values = torch.empty(place.shape[-2:])
            self._fill(place.ours, one, values)
            for rows in torch.split(values, max(1, _CHUNK // values.shape[-1])):
                yield quantization.encoded(rows.numpy(), kind)

    def _fill(self, ours: str, content: np.ndarray | QuantizedTensor, target: Tensor) -> None:
        file = self._files[ours][1]
        for begin, values in _chunks(content, file):
            rows = torch.from_numpy(values)
            if ours == "embed.weight" or rows.dim() == 1:
                target[begin : begin + len(rows)] = rows
            else:
                target[:, begin : begin + len(rows)] = rows.T
            forget_pages(content.weight if isinstance(content, QuantizedTensor) else content)

    def content(self, ours: str) -> np.ndarray | QuantizedTensor:
        """A parameter as it is stored, (in, out), its shape checked."""
        if self._held is None or self._held[0] != ours:
            self._held = None
            tensor, file = self._files[ours]
            content = read_array(file)
            stored = content.weight if isinstance(content, QuantizedTensor) else content
            shape = self._shapes[ours]
            if ours != "embed.weight":
                shape = (*shape[:-2], *shape[:-3:-1])
            if tuple(stored.shape) != shape or tensor.shape not in (None, shape):
                stated = "" if tensor.shape is None else f", the manifest {tensor.shape}"
                raise InputError(f"{file}: {tensor.path} has the shape {stored.shape}{stated}, and the network {shape}")
            self._held = (ours, content)
        return self._held[1]


def _expert(content: np.ndarray | QuantizedTensor, expert: int) -> np.ndarray | QuantizedTensor:
    if isinstance(content, QuantizedTensor):
        if len(content.scales) != len(content.weight):
            return content  # Refused by `dequantized`, which names the shapes.
        return QuantizedTensor(content.weight[expert], content.scales[expert])
    one: np.ndarray = content[expert]
    return one


def dequantized(content: np.ndarray | QuantizedTensor, file: Path) -> np.ndarray:
    """A tensor's values in fp32: weight times scales, each row of scales for an equal block of the weight's rows."""
    if not isinstance(content, QuantizedTensor):
        if content.dtype.kind not in "fV" or not np.all(np.isfinite(values := content.astype(np.float32))):
            raise InputError(f"{file}: holds values that aren't finite floating-point numbers")
        return values
    _check_scales(content, file)
    weight, scales = content
    rows, blocks = weight.shape[-2], scales.shape[-2]
    values = weight.astype(np.float32).reshape(*weight.shape[:-2], blocks, rows // blocks, weight.shape[-1])
    values *= scales.astype(np.float32)[..., :, None, :]
    return values.reshape(weight.shape)


def as_q8_0(content: QuantizedTensor) -> np.ndarray:
    """A quantised matrix (in, out) as the bytes of Q8_0 (out, in / 32 * 34): the same integers under the same scales.

    A block of Q8_0 is a scale in fp16 and 32 integers of 8 bits (llama.cpp, ``ggml-common.h``, `block_q8_0`). Nothing
    is lost but what fp16 can't hold of a scale.
    """
    weight, scales = content
    rows, columns = weight.shape
    packed = np.empty((columns, rows // 32), np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
    packed["values"] = weight.T.reshape(columns, rows // 32, 32)
    packed["scale"] = np.repeat(scales.astype(np.float32).T, rows // 32 // len(scales), axis=1)
    return packed.view(np.uint8).reshape(columns, -1)


def _in_blocks_of_32(content: QuantizedTensor) -> bool:
    """Whether 32 values one after another have one scale, so that they are a block of Q8_0."""
    blocks = content.scales.shape[-2] if content.scales.ndim >= 2 else 0
    return bool(blocks) and content.weight.shape[-2] % (32 * blocks) == 0


def _check_scales(content: QuantizedTensor, file: Path) -> None:
    weight, scales = content
    rows, blocks = weight.shape[-2], scales.shape[-2] if scales.ndim >= 2 else 0
    fits = weight.ndim == scales.ndim and blocks and rows % blocks == 0
    if not fits or (*weight.shape[:-2], weight.shape[-1]) != (*scales.shape[:-2], scales.shape[-1]):
        raise InputError(f"{file}: scales of shape {scales.shape} don't fit a weight of shape {weight.shape}")
    if weight.dtype != np.int8 or not np.all(np.isfinite(scales.astype(np.float32))):
        raise InputError(f"{file}: holds a weight of {weight.dtype} or scales that aren't finite numbers")


def _chunks(content: np.ndarray | QuantizedTensor, file: Path) -> Iterator[tuple[int, np.ndarray]]:
    """A matrix's values in fp32, some rows at a time, each with its first row's number."""
    if not isinstance(content, QuantizedTensor):
        rows = max(1, _CHUNK // max(1, prod(content.shape[1:])))
        for begin in range(0, len(content), rows):
            yield begin, dequantized(content[begin : begin + rows], file)
        return
    _check_scales(content, file)
    block = len(content.weight) // len(content.scales)
    rows = max(1, min(block, _CHUNK // content.weight.shape[1]))
    for number in range(len(content.scales)):
        for begin in range(number * block, (number + 1) * block, rows):
            weight = content.weight[begin : min(begin + rows, (number + 1) * block)]
            yield begin, dequantized(QuantizedTensor(weight, content.scales[number : number + 1]), file)
