"""Grok-1's released checkpoint, turned into a Hugging Face folder tensor by tensor.

The release is a folder ``ckpt-0`` of pickles ``tensorNNNNN_000``, in the order in which JAX flattens the parameters:
their paths sorted as text, so that layer 10 comes before layer 2. Matrices are (in, out) and mostly in eight bits.
Source: xai-org/grok-1, ``checkpoint.py`` and ``model.py`` (March 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelworks.release.huggingface import Progress, read_json, write_tensors
from modelworks.release.layouts import places
from modelworks.release.pickles import QuantizedTensor, read_array
from modelworks.release.staging import refuse_existing, staged_folder
from modelworks.spec.errors import InputError
from modelworks.spec.fields import validate
from modelworks.spec.files import model_spec
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
_SIZES = ("emb", "layers", "q", "kv", "key", "vocab", "seq")


@dataclass(frozen=True)
class ReleasedTensor:
    """One file of the release."""

    index: int
    path: str
    shape: tuple[int, ...] | None
    """(in, out), where a manifest states it."""


def import_grok1(
    folder: Path, out: Path, config: Path | None = None, dtype: str = "float32", progress: Progress | None = None
) -> ModelSpec:
    """Turn a released checkpoint into a Hugging Face folder in SGLang's layout.

    Parameters
    ----------
    folder
        The checkpoint: the folder that holds ``ckpt-0``, or ``ckpt-0`` itself.
    out
        Where the folder shall be; it must not exist. It appears whole or not at all.
    config
        A manifest with the network's sizes and the tensors' paths; without it the release's own constants hold.
    dtype
        Of the written weights. The release computes in bfloat16; `float32` loses nothing of the eight-bit weights.

    Raises
    ------
    InputError
        If a file is missing, truncated, hostile or of another shape than the network's; `out` is then not made.
    """
    refuse_existing(out.expanduser().absolute())
    checkpoint = folder / "ckpt-0" if (folder / "ckpt-0").is_dir() else folder
    if not checkpoint.is_dir():
        raise InputError(f"{folder}: there is no such folder; one that holds ckpt-0/tensor00000_000 is accepted")
    spec, listed = read_manifest(config) if config is not None else release_manifest()
    for tensor in listed:
        if not _file(checkpoint, tensor).is_file():
            raise InputError(f"{_file(checkpoint, tensor)}: is missing; the network has {len(listed)} tensors")
    with staged_folder(out) as temporary:
        write_tensors(temporary, spec, "grok-1", _converted(checkpoint, spec, listed), dtype, progress)
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


def _converted(checkpoint: Path, spec: ModelSpec, listed: list[ReleasedTensor]) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors under SGLang's names, one file in memory at a time."""
    by_ours: dict[str, list[Any]] = {}
    for place in places(spec, "grok-1"):
        by_ours.setdefault(place.ours, []).append(place)
    ours = _paths(spec)
    for tensor in listed:
        file = _file(checkpoint, tensor)
        content = read_array(file)
        stored = content.weight if isinstance(content, QuantizedTensor) else content
        wanted = by_ours[ours[tensor.path]]
        _check_shape(file, tensor, stored, wanted)
        for place in wanted:
            part = content if place.expert is None else _expert(content, place.expert)
            matrix = torch.from_numpy(dequantized(part, file))
            yield place.theirs, matrix if tensor.path == _EMBEDDING or matrix.dim() == 1 else matrix.T


def _check_shape(file: Path, tensor: ReleasedTensor, stored: np.ndarray, wanted: list[Any]) -> None:
    """Hold a file's shape against the network's, which is (out, in) in all but the embedding."""
    shape = wanted[0].shape
    if tensor.path != _EMBEDDING:
        shape = shape[::-1]
    if wanted[0].expert is not None:
        shape = (len(wanted), *shape)
    if tuple(stored.shape) != shape or tensor.shape not in (None, shape):
        stated = "" if tensor.shape is None else f", the manifest {tensor.shape}"
        raise InputError(f"{file}: {tensor.path} has the shape {stored.shape}{stated}, and the network {shape}")


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
    weight, scales = content
    rows, blocks = weight.shape[-2], scales.shape[-2] if scales.ndim >= 2 else 0
    fits = weight.ndim == scales.ndim and blocks and rows % blocks == 0
    if not fits or (*weight.shape[:-2], weight.shape[-1]) != (*scales.shape[:-2], scales.shape[-1]):
        raise InputError(f"{file}: scales of shape {scales.shape} don't fit a weight of shape {weight.shape}")
    values = weight.astype(np.float32).reshape(*weight.shape[:-2], blocks, rows // blocks, weight.shape[-1])
    values *= scales.astype(np.float32)[..., :, None, :]
    if not np.all(np.isfinite(scales.astype(np.float32))):
        raise InputError(f"{file}: holds scales that aren't finite numbers")
    return values.reshape(weight.shape)
