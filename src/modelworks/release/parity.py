"""Whether what an import of Grok-1 wrote is the release's network: some layers, computed from both sides.

A checksum says that a file is the one that was written, not that the right numbers were written. So the matrices of a
sample of layers are multiplied with a random vector twice: from the release's integers and scales as they are, block by
block, and from the finished files. An exchanged, transposed, wrongly scaled or damaged matrix gives another product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelworks.release.gguf_file import values
from modelworks.release.huggingface import Progress
from modelworks.release.layouts import TensorPlace, places
from modelworks.release.pickles import QuantizedTensor, forget_pages
from modelworks.release.weights_folder import WeightsFolder
from modelworks.spec.errors import OperationError
from modelworks.spec.gguf_header import read_gguf_header
from modelworks.spec.model import ModelSpec

LIMITS = {
    "float32": 1e-5,
    "float16": 2e-3,
    "bfloat16": 1e-2,
    "f32": 1e-5,
    "f16": 2e-3,
    "bf16": 1e-2,
    "q8_0": 2e-2,
    "q4_k": 2e-1,
}
"""The largest accepted difference of two products, over the size of the one from the release: what a format rounds away
(3e-7, 2e-4, 2e-3 and for Q8_0 where it quantises anew 4e-3, for Q4_K 6e-2), with room."""
_CHUNK = 1 << 24
"""Numbers that are held in fp32 at a time."""
Stored = Callable[[TensorPlace], np.ndarray]
"""A written tensor (out, in), or an expert's part of it, in fp32."""


@dataclass(frozen=True)
class Parity:
    """How far the products of a file's matrices are from those of the release's."""

    layers: tuple[int, ...]
    matrices: int
    largest_difference: float
    """Over the size of the release's product."""
    limit: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**asdict(self), "layers": list(self.layers)}


def sampled_layers(spec: ModelSpec) -> tuple[int, ...]:
    """The first, the middle and the last layer."""
    return tuple(sorted({0, spec.layers // 2, spec.layers - 1}))


def of_folder(folder: Path) -> Stored:
    """Reads the safetensors of a folder."""
    written = WeightsFolder(folder)
    return lambda place: written.tensor(place.ours, place.expert, place.shape).numpy()


def of_gguf(file: Path) -> Stored:
    """Reads a GGUF file."""
    header = read_gguf_header(file)

    def stored(place: TensorPlace) -> np.ndarray:
        return values(header, place.theirs, place.expert)

    return stored


def check_parity(
    content: Callable[[str], np.ndarray | QuantizedTensor],
    spec: ModelSpec,
    stored: Stored,
    limit: float,
    where: str,
    progress: Progress | None = None,
) -> Parity:
    """Compare the sampled layers of a file with the release.

    Parameters
    ----------
    content
        A parameter as the release stores it, (in, out) or (experts, in, out), by our name.
    stored
        The same as it was written.

    Raises
    ------
    OperationError
        If a matrix gives another product than the release's.
    """
    layers = sampled_layers(spec)
    names = tuple(f"blocks.{layer}." for layer in layers)
    listed = [one for place in places(spec, "gguf") if place.ours.startswith(names) for one in _by_expert(place)]
    largest = 0.0
    for done, place in enumerate(listed):
        if progress is not None:
            progress("comparing layers with the release", done, len(listed))
        whole = content(place.ours)
        one = whole if place.expert is None else _of_expert(whole, place.expert)
        generator = np.random.default_rng(done)
        vector = generator.standard_normal(place.shape[-1] if len(place.shape) == 2 else 1, dtype=np.float32)
        expected = _product(one, vector)
        given = _written_product(stored(place), vector)
        difference = float(np.linalg.norm(given - expected) / max(float(np.linalg.norm(expected)), 1e-30))
        if not difference <= limit:
            raise OperationError(
                f"{where}: {place.theirs} differs from the release by {difference:.3g}, and {limit:g} is accepted"
            )
        largest = max(largest, difference)
    return Parity(layers, len(listed), largest, limit)


def _by_expert(place: TensorPlace) -> list[TensorPlace]:
    if len(place.shape) < 3:
        return [place]
    return [TensorPlace(place.theirs, place.ours, expert, place.shape[1:]) for expert in range(place.shape[0])]


def _of_expert(whole: np.ndarray | QuantizedTensor, expert: int) -> np.ndarray | QuantizedTensor:
    if isinstance(whole, QuantizedTensor):
        return QuantizedTensor(whole.weight[expert], whole.scales[expert])
    part: np.ndarray = whole[expert]
    return part


def _product(one: np.ndarray | QuantizedTensor, vector: np.ndarray) -> np.ndarray:
    """The product of the release's matrix (in, out) with a vector (in); a norm's scales (n) times a number."""
    if not isinstance(one, QuantizedTensor):
        scaled = one.astype(np.float32) * vector[0] if one.ndim == 1 else vector @ one.astype(np.float32)
        forget_pages(one)
        return np.asarray(scaled, np.float64)
    weight, scales = one
    block = len(weight) // len(scales)
    total = np.zeros(weight.shape[1])
    for number, scale in enumerate(scales.astype(np.float64)):
        rows = range(number * block, (number + 1) * block)
        step = max(1, _CHUNK // weight.shape[1])
        for begin in range(rows.start, rows.stop, step):
            part = slice(begin, min(begin + step, rows.stop))
            total += scale * (vector[part] @ weight[part].astype(np.float32))
        forget_pages(weight)
    return total


def _written_product(written: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.asarray(written * vector[0] if written.ndim == 1 else written @ vector, np.float64)
