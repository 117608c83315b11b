"""Which precision this machine multiplies fastest, found by multiplying.

What a processor's name or flags promise and what its matmuls do differ: without bf16 units bf16 runs a hundred times
slower than fp32, and some Xeons that have the instruction (Emerald Rapids with its matrix units hidden) still multiply
at half of fp32's rate. So a matmul of a layer's size is timed in both, once per process and device. Other work on the
machine must not decide: the two take turns, the shortest times are compared, and a CPU's is the time of one thread on
it, waiting excluded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import cache

import torch

SIZE = 256
"""Rows and columns of the probe's matrices: large enough to leave overheads behind, 33 MFLOP."""
ADVANTAGE = 1.1
"""How much faster bf16 must be before its lower precision is worth it."""


ROUNDS = 7


@cache
def fastest_precision(device: str = "cpu") -> torch.dtype:
    """`torch.bfloat16` where the device multiplies it faster than fp32, else `torch.float32`."""
    fp32_s, bf16_s = matmul_s((torch.float32, torch.bfloat16), device)
    return torch.bfloat16 if fp32_s > ADVANTAGE * bf16_s else torch.float32


def matmul_s(dtypes: Sequence[torch.dtype], device: str = "cpu") -> list[float]:
    """The shortest time, in seconds, of a square matmul of `SIZE` in each dtype; infinite where it isn't there."""
    factors = [[torch.ones(SIZE, SIZE, device=device).to(dtype) for _ in range(2)] for dtype in dtypes]
    clock = time.thread_time if device == "cpu" else time.perf_counter
    shortest = [float("inf")] * len(dtypes)
    with _one_thread():
        for _ in range(ROUNDS):
            for place, (left, right) in enumerate(factors):
                start = clock()
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    torch.mm(left, right)
                    if device != "cpu":
                        torch.accelerator.synchronize()
                    shortest[place] = min(shortest[place], clock() - start)
    return shortest


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute on the calling thread alone, as long as the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
