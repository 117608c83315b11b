"""What an optimizer remembers, kept in bf16 without losing what is small.

bf16 has 8 bits: a moving average that a step moves by less than 1/512 of itself would be rounded back to where it was,
for ever. So it is rounded up or down at random, such that the expectation is what was to be kept (Gupta et al. 2015,
arXiv:1502.02551). Two ideas make that cheap, and the same on every layout and after every resume. The random bits of an
element are the sum, modulo 2^16, of a number for each of its indices: as many are drawn as a matrix has rows and
columns, each element's sum is uniform, and any two are independent. And these numbers follow from the seed, the name
and the step alone, for the whole tensor, of which a process takes those of its part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LOW, _HIGH = 0xFFFF, -0x10000
"""The bits of an fp32 number that bf16 doesn't have, and those that it has."""


@dataclass(frozen=True)
class Part:
    """Which part of a whole tensor is rounded."""

    name: str
    shape: Sequence[int]
    """Of the whole."""
    start: Sequence[int]
    """Where in the whole the part begins, per dimension."""


def keep(target: Tensor, values: Tensor, noise: Sequence[Tensor]) -> None:
    """Round fp32 values to bf16 at random, into `target`.

    Parameters
    ----------
    target
        Of the same shape; in fp32 it takes the values as they are.
    values
        Are overwritten.
    noise
        As `noise_of` gives it.
    """
    if target.dtype == torch.bfloat16:
        bits = values.view(torch.int32)
        together = noise[0]
        for one in noise[1:]:
            together = together + one
        bits.add_(together.bitwise_and(_LOW)).bitwise_and_(_HIGH)
    target.copy_(values)


def noise_of(part: Part, like: Tensor, seed: int, step: int) -> list[Tensor]:
    """Random bits for a part of a tensor: one tensor for each dimension, which broadcast to the part.

    Parameters
    ----------
    part
        Its place.
    like
        What is to be rounded.
    seed
        The run's.
    step
        Of the run; another one gives other bits.
    """
    digest = hashlib.blake2b(f"{seed}/{part.name}/{step}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))
    found = []
    for dimension, (size, first, length) in enumerate(zip(part.shape, part.start, like.shape, strict=True)):
        drawn = generator.integers(0, 1 << 16, size, dtype=np.int32)[first : first + length]
        shape = [1] * len(part.shape)
        shape[dimension] = length
        found.append(torch.from_numpy(drawn).view(shape).to(like.device))
    return found
