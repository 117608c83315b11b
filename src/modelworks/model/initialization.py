"""The values that a network's parameters begin with, whole or any part of them.

Two ideas. What a parameter is drawn from follows from its name and shape alone: matrices are normal with variance 1 /
(their inputs), so that activations keep their size; what writes to the residual stream is smaller by the square root of
how many writers there are (GPT-2): the output matrices, or the norms after them where there are any; the embedding is
normal such that it enters the stream at about unit size where it has a multiplier, else 0.02. A vision tower's filters
see no even colour, and its positions are sines, since of pictures it must not be the paper, which they have in common,
that is learnt first. And each parameter is drawn in blocks of rows, each from a generator of its own, seeded by the
run's seed, the parameter's name and the block's number: a process that holds a part of a tensor draws the blocks that
it needs, one at a time, and gets the same values as one that holds the whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modelworks.spec.model import ModelSpec

_FILTERS, _POSITIONS = "eyes.tower.patches.weight", "eyes.tower.positions.weight"
BLOCK = 1 << 20
"""Elements that are drawn together, about: what a part costs in memory beside itself (4 MiB)."""


@torch.no_grad()
def fill(
    part: Tensor, spec: ModelSpec, seed: int, name: str, shape: Sequence[int] = (), start: Sequence[int] = ()
) -> None:
    """Give a parameter, or a part of it, the values that it begins with.

    Parameters
    ----------
    part
        Is filled; on the meta device, nothing happens.
    spec
        The network's.
    seed
        The run's.
    name
        The parameter's, as the decoder names it.
    shape
        Of the whole parameter; that of `part` if empty.
    start
        Where in the whole the part begins, per dimension; at its first element if empty.
    """
    if part.is_meta or part.numel() == 0:
        return
    shape, start = tuple(shape) or tuple(part.shape), tuple(start) or (0,) * part.dim()
    deviation = _deviation(spec, name, shape)
    if deviation is None:
        part.fill_(_constant(spec, name))
        return
    if name == _POSITIONS:
        region = tuple(slice(begin, begin + length) for begin, length in zip(start, part.shape, strict=True))
        part.copy_(_sines(math.isqrt(shape[0]), shape[1])[region])
        return
    width, first = shape[-1], start[-1]
    columns = slice(first, first + part.shape[-1])
    height = max(1, BLOCK // width)
    drawn: tuple[int, Tensor | None] = (-1, None)
    for row, destination in _runs_of_rows(part, shape, start):
        # `destination` (n, columns of the part) stands in the whole's rows from `row` on.
        done = 0
        while done < len(destination):
            number, within = divmod(row + done, height)
            if drawn[0] != number:
                rows = min(height, math.prod(shape[:-1]) - number * height)
                block = _draw(seed, name, number, rows, width, deviation)
                drawn = (number, _of_contrasts(block) if name == _FILTERS else block)
            assert drawn[1] is not None
            taken = drawn[1][within : within + len(destination) - done, columns]
            destination[done : done + len(taken)].copy_(taken)
            done += len(taken)


def _runs_of_rows(part: Tensor, shape: tuple[int, ...], start: tuple[int, ...]) -> list[tuple[int, Tensor]]:
    """The part as matrices of rows that are neighbours in the whole, each with its first row's number there."""
    if part.dim() == 2:
        return [(start[0], part)]
    # A stack of matrices: (experts, rows, columns).
    return [((start[0] + place) * shape[1] + start[1], matrix) for place, matrix in enumerate(part)]


def _draw(seed: int, name: str, number: int, rows: int, width: int, deviation: float) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=16).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    return torch.from_numpy(generator.standard_normal((rows, width), dtype=np.float32)).mul_(deviation)


def _of_contrasts(filters: Tensor) -> Tensor:
    """Filters (D, 3 x pixels) that an even colour doesn't pass; larger, since what they see then is small."""
    by_color = filters.view(len(filters), 3, -1)
    return (1.5 * (by_color - by_color.mean(-1, keepdim=True))).flatten(1)


def _sines(side: int, width: int) -> Tensor:
    """Positions (side^2, D) of the squares of a grid: sines and cosines of the row, and of the column, with wavelengths
    from 6 to 600 squares (Dosovitskiy et al. 2020 learn theirs; in two dimensions as MoCo v3, arXiv:2104.02057)."""
    number = width // 4
    angles = torch.arange(side)[:, None] * 100.0 ** (-torch.arange(number) / max(1, number))
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # (side, D / 2)
    found = torch.zeros(side, side, width)
    found[:, :, : 2 * number] = waves[:, None]
    found[:, :, 2 * number : 4 * number] = waves
    return found.flatten(0, 1)


def _constant(spec: ModelSpec, name: str) -> float:
    """What biases and norms begin with."""
    if name.endswith("bias"):
        return 0.0
    return _of_writers(spec) if "post_norm" in name else 1.0


def _deviation(spec: ModelSpec, name: str, shape: Sequence[int]) -> float | None:
    """The standard deviation that a parameter is drawn with; None where it isn't drawn."""
    place = name.split(".")
    if place[-1] == "bias" or len(shape) == 1:
        return None
    if place[0] == "embed":
        return 1.0 / spec.embedding_multiplier if spec.embedding_multiplier != 1.0 else 0.02
    writes = spec.norm_placement == "pre" and ("wo" in place or "down" in place)
    return math.sqrt(1.0 / shape[-1]) * (_of_writers(spec) if writes else 1.0)


def _of_writers(spec: ModelSpec) -> float:
    return math.sqrt(1.0 / (2 * spec.layers))
