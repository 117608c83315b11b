"""The tensors of a GGUF file as numbers, one at a time: mapped from the disk, dequantised."""

from __future__ import annotations

import gguf
import numpy as np

from modelworks.spec.gguf_header import GgufHeader


def values(file: GgufHeader, name: str, expert: int | None = None) -> np.ndarray:
    """A tensor, or one expert's part of it, in fp32, dequantised; `file` has checked where it lies."""
    stored = file.tensors[name]
    mapped = np.memmap(file.path, np.uint8, "r", stored.offset, (stored.size,))
    rows, shape = mapped.reshape(*stored.shape[:-1], -1), stored.shape
    if expert is not None:
        rows, shape = rows[expert], shape[1:]
    if stored.kind == gguf.GGMLQuantizationType.F32:
        return np.array(rows).view(np.float32).reshape(shape)
    if stored.kind == gguf.GGMLQuantizationType.F16:
        return np.array(rows).view(np.float16).astype(np.float32).reshape(shape)
    kind = gguf.GGMLQuantizationType(stored.kind)
    return gguf.quants.dequantize(np.ascontiguousarray(rows), kind).astype(np.float32, copy=False)
