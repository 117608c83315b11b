"""The probe of precisions against matmuls that are timed here."""

from __future__ import annotations

import time

import torch

from modelworks.model.precision import fastest_precision, matmul_s


def test_the_chosen_precision_is_not_the_slow_one() -> None:
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(384, 384).to(dtype)
        times[dtype] = min(_timed(left) for _ in range(5))
    chosen = fastest_precision("cpu")
    other = torch.float32 if chosen == torch.bfloat16 else torch.bfloat16
    assert times[chosen] < 1.5 * times[other]


def test_the_probe_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    times = matmul_s((torch.float32, torch.bfloat16))
    assert torch.get_num_threads() == before
    assert all(0.0 < shortest < float("inf") for shortest in times)


def _timed(left: torch.Tensor) -> float:
    """CPU seconds of this thread, so that other work on the machine doesn't decide."""
    start = time.process_time()
    torch.mm(left, left)
    return time.process_time() - start
