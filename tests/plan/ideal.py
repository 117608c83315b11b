"""A device of round numbers, for times that are worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

RATE = 1e15


class Ideal:
    """Kernels of a device that multiplies at `RATE` whatever the shape, and takes no time for anything else."""

    measured = True
    host_is_device = False

    def gemm(self, m: Any, n: Any, k: Any, precision: str) -> Any:
        return 2.0 * np.asarray(m, float) * n * k / RATE

    def grouped_gemm(self, groups: Any, m: Any, n: Any, k: Any, precision: str) -> Any:
        return groups * self.gemm(m, n, k, precision)

    def attention_passes(
        self, batch: Any, seq: Any, heads: Any, kv_heads: Any, dim: Any, precision: str, ratio: float, capped: bool
    ) -> Any:
        forward = 4.0 * batch * heads * seq * seq * dim / 2 / RATE
        return forward, forward * ratio

    def memory_bound(self, moved: Any) -> Any:
        return np.zeros(np.shape(moved))

    def collective(self, kind: str, size: Any, ranks: Any) -> Any:
        """A link of 1 GB/s without latency."""
        share = (np.asarray(ranks, float) - 1) / ranks
        return np.asarray(size) * share * (2 if kind == "all_reduce" else 1) / 1e9
