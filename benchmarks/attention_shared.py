"""Attention of questions that share a picture: the fused kernel with a mask beside our blocks, forward and backward.

A sequence is a picture, half of it, and six questions behind it, each of which sees the picture and itself: little is
hidden from a whole block of queries, so there is little to skip. `model.attention` takes the fused kernel up to 512.

    python benchmarks/attention_shared.py --lengths 136,272,512
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from modelworks.model import attention as module

QUESTIONS, HEADS, HEAD_DIM, BATCH = 6, 4, 32, 8


def main() -> None:
    """Measure each length, in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="136,272,512")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'length':>8} {'fused, ms':>10} {'blocks, ms':>10} {'ratio':>7}")
    for length in map(int, arguments.lengths.split(",")):
        heads = [torch.randn(BATCH, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
        first, shared = questions(length)
        module.MASKED = length

        def fused(heads: list[Tensor] = heads, first: Tensor = first, shared: Tensor = shared) -> Tensor:
            return module.attention(*heads, HEAD_DIM**-0.5, first=first, shared=shared)

        def blocks(heads: list[Tensor] = heads, first: Tensor = first, shared: Tensor = shared) -> Tensor:
            return module.blockwise_attention(*heads, HEAD_DIM**-0.5, first=first, shared=shared)

        torch.testing.assert_close(fused(), blocks(), rtol=1e-4, atol=1e-5)
        took = [(timed(fused), timed(blocks)) for _ in range(arguments.rounds + 2)][2:]
        ours, theirs = (1e3 * statistics.median(times) for times in zip(*took, strict=True))
        ratio = statistics.median(one / other for one, other in took)
        print(f"{length:8} {ours:10.1f} {theirs:10.1f} {ratio:7.2f}")


def questions(length: int) -> tuple[Tensor, Tensor]:
    """Where the document of each token begins (B, T), and what it sees of the picture (B, T, 2)."""
    picture = length // 2
    first = torch.zeros(BATCH, length, dtype=torch.int64)
    shared = torch.zeros(BATCH, length, 2, dtype=torch.int64)
    for number in range(1, QUESTIONS):
        begin = picture + number * (length - picture) // QUESTIONS
        first[:, begin:], shared[:, begin:, 1] = begin, picture
    return first, shared


def timed(attend: Callable[[], Tensor]) -> float:
    """Seconds for both passes."""
    begun = time.perf_counter()
    output = attend()
    output.backward(torch.ones_like(output))
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
