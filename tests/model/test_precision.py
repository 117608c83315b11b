"""The probe of precisions against matmuls that are timed here."""

from __future__ import annotations

import time

import torch

from modelworks.model.precision import fastest_precision


def test_the_chosen_precision_is_not_the_slow_one() -> None:
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(384, 384).to(dtype)
        times[dtype] = min(_timed(left) for _ in range(5))
    chosen = fastest_precision("cpu")
    other = torch.float32 if chosen == torch.bfloat16 else torch.bfloat16
    assert times[chosen] < 1.5 * times[other]


def _timed(left: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(left, left)
    return time.perf_counter() - start
