"""An adapter alone, without the weights that it changes: for PEFT, and as a GGUF file for llama.cpp.

Both hold the two narrow matrices of each adapted map under the names that they have for the map itself. Where llama.cpp
has a matrix's rows in another order than we, B's rows are in that order too, and A, which reads, is as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modelworks.release.gguf_network import metadata_of, rotated_heads, to_neighbours
from modelworks.release.layouts import layout_for, places
from modelworks.release.runs import RunContent
from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.huggingface import Layout
from modelworks.spec.run import AdapterSpec

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_NAMES = {
    "lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector",
}  # fmt: skip


def refuse_adapter_formats(kinds: list[str], adapter: AdapterSpec | None) -> None:
    """Refuse an adapter's formats for a run that has none, and llama.cpp's for one that it can't compute.

    Raises
    ------
    InputError
        Naming the format and what is accepted.
    """
    for kind in ("peft", "gguf-adapter"):
        if kind in kinds and adapter is None:
            raise InputError(f"to = {kind!r} is not accepted: the run has no [adapter]; safetensors and gguf are")
    if "gguf-adapter" in kinds and adapter is not None and adapter.kind == "dora":
        raise InputError(
            "to = 'gguf-adapter' is not accepted with adapter.kind = 'dora', which llama.cpp doesn't compute: gguf is, "
            "which has the adapter merged into the weights"
        )


def write_peft(folder: Path, content: RunContent) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into a folder.

    Raises
    ------
    OperationError
        If they can't be written.
    """
    adapter, model = _adapter(content), content.spec.model
    tensors = {
        f"base_model.model.{theirs.removesuffix('.weight')}.{_PEFT_NAMES[part]}": tensor.contiguous()
        for _, theirs, part, tensor in _tensors(content, layout_for(model))
    }
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": content.spec.train.init_from,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": modules,
        "use_dora": adapter.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    try:
        save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OperationError(f"{folder / PEFT_WEIGHTS} cannot be written: {error}") from error
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_gguf_adapter(path: Path, content: RunContent) -> None:
    """Write a GGUF file that llama.cpp loads beside the network's own, in fp32.

    Raises
    ------
    InputError
        If the network has no place in llama.cpp's architectures.
    OperationError
        If it can't be written.
    """
    adapter, spec = _adapter(content), content.spec.model
    architecture, _ = metadata_of(spec)
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(content.spec.name)
        writer.add_license(content.spec.release.license.lower())
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        for ours, theirs, part, tensor in _tensors(content, "gguf"):
            heads = rotated_heads(spec, architecture, ours) if part == "lora_b" else None
            ordered = tensor if heads is None else to_neighbours(tensor, heads)
            writer.add_tensor(f"{theirs}.{part}", np.ascontiguousarray(ordered.float().numpy()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise OperationError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()


def _adapter(content: RunContent) -> AdapterSpec:
    assert content.spec.adapter is not None
    return content.spec.adapter


def _tensors(content: RunContent, layout: Layout | str) -> Iterator[tuple[str, str, str, Tensor]]:
    """Of each tensor of the adapter: our and their name of the matrix that it changes, what it is, and itself."""
    theirs = {place.ours: place.theirs for place in places(content.spec.model, layout)}  # type: ignore[arg-type]
    for name, tensor in content.adapter.items():
        changed, _, part = name.rpartition(".")
        ours = f"{changed}.weight"
        yield ours, theirs[ours], part, tensor
