"""Which precision this machine multiplies fastest, found by multiplying.

What a processor's name promises and what its matmuls do differ: without bf16 units bf16 runs a hundred times slower
than fp32. So a matmul of a layer's size is timed in both, once per process and device.
"""

from __future__ import annotations

import time
from functools import cache

import torch

SIZE = 256
"""Rows and columns of the probe's matrices: large enough to leave overheads behind, 33 MFLOP."""
ADVANTAGE = 1.1
"""How much faster bf16 must be before its lower precision is worth it."""


@cache
def fastest_precision(device: str = "cpu") -> torch.dtype:
    """`torch.bfloat16` where the device multiplies it faster than fp32, else `torch.float32`."""
    return (
        torch.bfloat16
        if matmul_s(torch.float32, device) > ADVANTAGE * matmul_s(torch.bfloat16, device)
        else (torch.float32)
    )


def matmul_s(dtype: torch.dtype, device: str = "cpu", rounds: int = 5) -> float:
    """The shortest of a few times, in seconds, of a square matmul of `SIZE`; infinite where the dtype isn't there."""
    left, right = (torch.ones(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    shortest = float("inf")
    for _ in range(rounds):
        _synchronize(device)
        start = time.perf_counter()
        try:
            torch.mm(left, right)
        except (RuntimeError, NotImplementedError):
            return float("inf")
        _synchronize(device)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
