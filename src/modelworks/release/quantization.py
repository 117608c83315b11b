"""The precisions of GGUF files, and how a tensor gets one.

The `gguf` package quantises to most formats. It can't write Q4_K, so that is done here: 256 values in eight blocks of
32, each with a scale and a minimum in six bits, under two fp16 numbers (llama.cpp, ``ggml-common.h``, `block_q4_K`).
A tensor whose rows don't divide into a format's blocks falls back as in llama.cpp: Q4_K to Q5_0, and that to F16.
"""

from __future__ import annotations

from typing import Literal, get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from modelworks.spec.errors import InputError

Precision = Literal["f32", "f16", "bf16", "q8_0", "q4_k"]
_KINDS: dict[str, Kind] = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_k": Kind.Q4_K}
FILE_TYPES: dict[str, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S,
}
"""What ``general.file_type`` says for each precision."""
_FALLBACK = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_0: Kind.F16, Kind.Q8_0: Kind.F16}
_SUPER, _BLOCKS, _BLOCK = 256, 8, 32
_TRIES = 21
"""Candidates for a block's scale, around the one that spans its range."""


def precision(name: str) -> Precision:
    """A precision by its name; an `InputError` that names those accepted otherwise."""
    if name.lower() not in get_args(Precision):
        raise InputError(f"quantize = {name!r} is not accepted: one of {', '.join(get_args(Precision))} is")
    return name.lower()  # type: ignore[return-value]


def kind_for(name: str, shape: tuple[int, ...], wanted: Precision) -> Kind:
    """The format of one tensor in a file of the wanted precision.

    Vectors and routers stay in fp32, as in llama.cpp. The embedding and the head of a Q4_K file are in Q8_0, since
    what they lose shows in every token.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Kind.F32
    kind = _KINDS[wanted]
    if kind is Kind.Q4_K and name in ("token_embd.weight", "output.weight"):
        kind = Kind.Q8_0
    while shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACK[kind]
    return kind


def encoded(values: np.ndarray, kind: Kind) -> np.ndarray:
    """An fp32 tensor (..., row) in a format: fp32 and fp16 as such, else the format's bytes (..., row bytes)."""
    if kind is Kind.F32:
        return np.ascontiguousarray(values, np.float32)
    if kind is Kind.F16:
        return values.astype(np.float16)
    if kind is Kind.Q4_K:
        return quantize_q4_k(values)
    return gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)


def quantize_q4_k(values: np.ndarray) -> np.ndarray:
    """Quantise (..., row) in fp32, rows in multiples of 256, to Q4_K: (..., row / 256 * 144) bytes.

    A value is `scale * level - minimum` with a level of four bits. For each block of 32 the scale and minimum are
    the least-squares fit to the levels of the best of several candidate scales.
    """
    blocks = np.asarray(values, np.float32).reshape(-1, _BLOCKS, _BLOCK)  # (N, 8, 32)
    packed = [_pack_q4_k(part) for part in np.array_split(blocks, max(1, len(blocks) // 8192))]
    return np.concatenate(packed).reshape(*values.shape[:-1], -1)


def _pack_q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _fit(blocks)  # (N, 8) each, both >= 0
    scale_unit = (scales.max(-1) / 63).astype(np.float16)  # (N)
    minimum_unit = (minima.max(-1) / 63).astype(np.float16)
    six_scales = _in_units(scales, scale_unit)
    six_minima = _in_units(minima, minimum_unit)
    scale = scale_unit.astype(np.float32)[:, None] * six_scales  # as they will be read
    minimum = minimum_unit.astype(np.float32)[:, None] * six_minima
    levels = _levels(blocks, scale, minimum).astype(np.uint8)  # (N, 8, 32)

    packed = np.empty((len(blocks), 144), np.uint8)
    packed[:, 0:2] = scale_unit.view(np.uint8).reshape(-1, 2)
    packed[:, 2:4] = minimum_unit.view(np.uint8).reshape(-1, 2)
    # Six-bit numbers: the first four blocks' in the low bits, the last four's low halves apart, their tops above.
    packed[:, 4:8] = six_scales[:, :4] | (six_scales[:, 4:] >> 4) << 6
    packed[:, 8:12] = six_minima[:, :4] | (six_minima[:, 4:] >> 4) << 6
    packed[:, 12:16] = (six_scales[:, 4:] & 15) | (six_minima[:, 4:] & 15) << 4
    packed[:, 16:] = (levels[:, 0::2] | levels[:, 1::2] << 4).reshape(-1, 128)
    return packed


def _fit(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the minimum (N, 8) of each block that lose least."""
    lowest = np.minimum(blocks.min(-1), 0)
    span = np.maximum(blocks.max(-1), 0) - lowest  # (N, 8)
    best_scale, best_minimum = span / 15, -lowest
    best_loss = _loss(blocks, best_scale, best_minimum)
    for step in range(_TRIES):
        scale, minimum = span / (14.0 + 0.1 * step), -lowest
        scale, minimum = _least_squares(blocks, _levels(blocks, scale, minimum))
        loss = _loss(blocks, scale, minimum)
        better = loss < best_loss
        best_scale = np.where(better, scale, best_scale)
        best_minimum = np.where(better, minimum, best_minimum)
        best_loss = np.where(better, loss, best_loss)
    return best_scale, best_minimum


def _least_squares(blocks: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the minimum that fit given levels best; a minimum below zero has no place and becomes zero."""
    mean_level, mean_value = levels.mean(-1), blocks.mean(-1)
    square = (levels * levels).mean(-1)
    product = (levels * blocks).mean(-1)
    variance = square - mean_level**2
    scale = (product - mean_level * mean_value) / np.where(variance > 0, variance, 1)
    minimum = scale * mean_level - mean_value
    through_zero = product / np.where(square > 0, square, 1)
    negative = minimum < 0
    return np.maximum(np.where(negative, through_zero, scale), 0), np.where(negative, 0, minimum)


def _levels(blocks: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)
    levels: np.ndarray = np.clip(np.rint((blocks + minimum[..., None]) * inverse[..., None]), 0, 15)
    return levels


def _loss(blocks: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    found = scale[..., None] * _levels(blocks, scale, minimum) - minimum[..., None]
    loss: np.ndarray = ((found - blocks) ** 2).sum(-1)
    return loss


def _in_units(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    units = unit.astype(np.float32)[:, None]
    safe = np.where(units > 0, units, 1)
    return np.clip(np.rint(np.where(units > 0, values / safe, 0)), 0, 63).astype(np.uint8)
