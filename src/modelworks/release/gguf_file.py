"""The tensors of a GGUF file as numbers, one at a time: mapped from the disk, dequantised."""

from __future__ import annotations

import gguf
import numpy as np

from modelworks.spec.gguf_header import GgufHeader


def values(file: GgufHeader, name: str) -> np.ndarray:
    """A tensor in fp32, dequantised; `file` has checked where it lies."""
    stored = file.tensors[name]
    mapped = np.memmap(file.path, np.uint8, "r", stored.offset, (stored.size,))
    if stored.kind == gguf.GGMLQuantizationType.F32:
        return np.array(mapped).view(np.float32).reshape(stored.shape)
    rows = mapped.reshape(*stored.shape[:-1], -1)
    if stored.kind == gguf.GGMLQuantizationType.F16:
        return np.array(rows).view(np.float16).astype(np.float32).reshape(stored.shape)
    kind = gguf.GGMLQuantizationType(stored.kind)
    return gguf.quants.dequantize(np.ascontiguousarray(rows), kind).astype(np.float32, copy=False)
