"""Kernel times of this machine's processor, as `modelworks bench` measured them.

Three ideas. A time is read off the measured shapes: matrix products by their rate at the nearest shapes, attention by
its rate at the nearest lengths, collectives by bytes and ranks, element-wise operators by the bytes they move; at a
measured shape it is the measured time. Processes share the cores: each computes with its part of them, and where there
are more processes than cores everything that computes takes as much longer. And a processor is its own host: what
PyTorch takes to start an operator is added to the operator's time and never hides behind it.

What the file doesn't have falls back to the typical efficiencies of `kernels`, table by table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from modelworks.plan.kernels import CollectiveKind, Kernels, ProductPrecision, Seconds, kernels_for
from modelworks.spec.hardware import AttentionTime, CollectiveTime, DeviceSpec, GemmTime, Precision
from modelworks.spec.software import SoftwareSpec


@dataclass(frozen=True)
class Rates:
    """Rates at scattered points: between them the mean of the logarithms, weighted by distance to the power of -4."""

    points: Seconds
    """Base-2 logarithms of the arguments, (P, A)."""
    log_rates: Seconds
    """(P,)"""

    @classmethod
    def of(cls, arguments: Sequence[tuple[float, ...]], rates: Sequence[float]) -> Rates:
        """From arguments (P, A) and rates (P), all positive."""
        return cls(np.log2(np.array(arguments, dtype=np.float64)), np.log(np.array(rates, dtype=np.float64)))

    def at(self, *arguments: Seconds) -> Seconds:
        """The rate at arguments that broadcast; at a measured point the measured rate (Shepard 1968)."""
        place = np.log2(np.stack(np.broadcast_arrays(*arguments), axis=-1))[..., None, :]
        distance = ((place - self.points) ** 2).sum(axis=-1)
        weights = 1.0 / (distance + 1e-9) ** 2
        return cast(Seconds, np.exp((weights * self.log_rates).sum(axis=-1) / weights.sum(axis=-1)))


@dataclass(frozen=True)
class LocalKernels(Kernels):
    """A processor's kernel times for one of several equal processes that run on it."""

    threads: int
    """Threads of each process."""
    slowdown: float
    """Threads of all processes over the cores, where that is more than one."""
    product_rates: dict[str, dict[int, Rates]]
    """FLOP/s over (m, n, k), by precision and threads."""
    attention_rates: dict[tuple[str, bool], dict[int, Rates]]
    """Pairs of positions a second, times heads and their width, over the length; by precision and soft cap."""
    exchanges: dict[str, dict[int, tuple[Seconds, Seconds]]]
    """Logarithms of bytes and seconds, by kind and ranks."""
    stream_bytes: float | None
    """What one thread's element-wise operators move in a second."""

    def gemm(self, m: ArrayLike, n: ArrayLike, k: ArrayLike, precision: ProductPrecision) -> Seconds:
        """As `Kernels.gemm`, from the measured products."""
        if (measured := self.product_rates.get(precision)) is None:
            return super().gemm(m, n, k, precision) * self._share()
        shape = tuple(np.asarray(size, dtype=np.float64) for size in (m, n, k))
        rate = self._by_threads(measured, lambda rates: rates.at(*shape))
        return 2.0 * shape[0] * shape[1] * shape[2] / rate * self.slowdown

    def grouped_gemm(
        self, groups: ArrayLike, m: ArrayLike, n: ArrayLike, k: ArrayLike, precision: ProductPrecision
    ) -> Seconds:
        """As `Kernels.grouped_gemm`: one product after another."""
        return np.asarray(groups, dtype=np.float64) * self.gemm(m, n, k, precision)

    def attention_passes(
        self,
        batch: ArrayLike,
        seq: ArrayLike,
        heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
        precision: Precision,
        backward_ratio: float,
        softcap: bool = False,
    ) -> tuple[Seconds, Seconds]:
        """As `Kernels.attention_passes`: what was measured of both passes, split by `backward_ratio`."""
        if (measured := self.attention_rates.get((precision, softcap))) is None:
            forward, backward = super().attention_passes(
                batch, seq, heads, kv_heads, head_dim, precision, backward_ratio, softcap
            )
            return forward * self._share(), backward * self._share()
        length = np.asarray(seq, dtype=np.float64)
        rate = self._by_threads(measured, lambda rates: rates.at(length))
        work = np.asarray(batch, dtype=np.float64) * np.asarray(heads) * np.asarray(head_dim) * length**2
        both = work / rate * self.slowdown
        forward = both / (1.0 + backward_ratio)
        return forward, both - forward

    def memory_bound(self, bytes_moved: ArrayLike) -> Seconds:
        """As `Kernels.memory_bound`, at the measured rate of element-wise operators."""
        if self.stream_bytes is None:
            return super().memory_bound(bytes_moved) * self._share()
        rate = self.stream_bytes * self.threads
        return np.asarray(bytes_moved, dtype=np.float64) / rate * self.slowdown

    def collective(self, kind: CollectiveKind, bytes_: ArrayLike, ranks: ArrayLike) -> Seconds:
        """As `Kernels.collective`, from measured exchanges.

        Between measured sizes and ranks time is a power of each; below the smallest size it is that one's, above the
        largest it grows with the bytes. Processes that share cores were measured sharing them.
        """
        measured = self.exchanges.get(kind)
        if not measured:
            return super().collective(kind, bytes_, ranks)
        size, count = np.broadcast_arrays(np.asarray(bytes_, dtype=np.float64), np.asarray(ranks, dtype=np.float64))
        known = sorted(measured)
        by_ranks = [_exchange(measured[number], size) for number in known]
        time = by_ranks[0] * np.maximum(count, 1.0) / known[0]
        for place in range(1, len(known)):
            low, high = known[place - 1], known[place]
            way = (np.log(np.maximum(count, 1.0)) - np.log(low)) / (np.log(high) - np.log(low))
            between = by_ranks[place - 1] ** (1.0 - way) * by_ranks[place] ** way
            time = np.where((count >= low) & ((count <= high) | (place == len(known) - 1)), between, time)
        return cast(Seconds, np.where((count > 1.0) & (size > 0.0), time, 0.0))

    def _share(self) -> float:
        """What a process's part of the processor takes over what all of it takes, for rates of all of it."""
        cores = self.device.cores or self.threads
        return self.slowdown * max(1.0, cores / self.threads)

    def _by_threads(self, measured: dict[int, Rates], rate: Callable[[Rates], Seconds]) -> Seconds:
        """The rate with this process's threads: a power of the threads between measured numbers of them."""
        known = sorted(measured)
        above = next((count for count in known if count >= self.threads), known[-1])
        below = next((count for count in reversed(known) if count <= self.threads), known[0])
        if above == below:
            return rate(measured[above]) * (self.threads / above if self.threads < above else 1.0)
        way = (np.log(self.threads) - np.log(below)) / (np.log(above) - np.log(below))
        return cast(Seconds, rate(measured[below]) ** (1.0 - way) * rate(measured[above]) ** way)


def measured_on(device: DeviceSpec, processes: int = 1) -> Kernels:
    """A processor's kernel times for each of `processes` that share it: measured where its hardware file has them.

    Each process has as many threads as `train` gives it: its part of the cores, and one at least.
    """
    typical = kernels_for(device)
    cores = device.cores
    if cores is None:
        return typical
    threads = max(1, cores // processes)
    return LocalKernels(
        **{field.name: getattr(typical, field.name) for field in fields(Kernels)}
        | {"measured": bool(device.gemm_measured and device.attention_measured), "host_is_device": True},
        threads=threads,
        slowdown=max(1.0, processes * threads / cores),
        product_rates=_product_rates(device.gemm_measured),
        attention_rates=_attention_rates(device.attention_measured),
        exchanges=_exchanges(device.collectives_measured),
        stream_bytes=device.elementwise_bandwidth_bytes,
    )


def with_overheads(software: SoftwareSpec, device: DeviceSpec, processes: int = 1) -> SoftwareSpec:
    """A framework's traits with the overheads that were measured on a processor, where they were.

    The overhead of a layer is spread over the operators of a dense layer, so that layers of more operators take more.
    """
    if device.cores is None:
        return software
    slowdown = max(1.0, processes * max(1, device.cores // processes) / device.cores)
    changed: dict[str, float] = {}
    if device.layer_overhead_s is not None:
        changed["launch_s"] = slowdown * device.layer_overhead_s / (3.0 * software.kernels_per_layer)
    if device.step_overhead_s is not None:
        changed["step_host_s"] = slowdown * device.step_overhead_s
    return software.model_copy(update=changed)


def _product_rates(times: Sequence[GemmTime]) -> dict[str, dict[int, Rates]]:
    found: dict[str, dict[int, list[GemmTime]]] = {}
    for time in times:
        found.setdefault(time.precision, {}).setdefault(time.threads, []).append(time)
    return {
        precision: {
            threads: Rates.of([(t.m, t.n, t.k) for t in rows], [2.0 * t.m * t.n * t.k / t.time_s for t in rows])
            for threads, rows in by_threads.items()
        }
        for precision, by_threads in found.items()
    }


def _attention_rates(times: Sequence[AttentionTime]) -> dict[tuple[str, bool], dict[int, Rates]]:
    found: dict[tuple[str, bool], dict[int, list[AttentionTime]]] = {}
    for time in times:
        found.setdefault((time.precision, time.softcap), {}).setdefault(time.threads, []).append(time)
    return {
        key: {
            threads: Rates.of(
                [(t.seq_len,) for t in rows],
                [t.batch * t.heads * t.head_dim * t.seq_len**2 / t.time_s for t in rows],
            )
            for threads, rows in by_threads.items()
        }
        for key, by_threads in found.items()
    }


def _exchanges(times: Sequence[CollectiveTime]) -> dict[str, dict[int, tuple[Seconds, Seconds]]]:
    found: dict[str, dict[int, list[CollectiveTime]]] = {}
    for time in sorted(times, key=lambda time: time.bytes):
        found.setdefault(time.kind, {}).setdefault(time.ranks, []).append(time)
    return {
        kind: {
            ranks: (np.log([float(t.bytes) for t in rows]), np.log([t.time_s for t in rows]))
            for ranks, rows in by_ranks.items()
        }
        for kind, by_ranks in found.items()
    }


def _exchange(measured: tuple[Seconds, Seconds], size: Seconds) -> Seconds:
    """Seconds by bytes: a power of them between measured sizes."""
    log_bytes, log_times = measured
    log_size = np.log(np.maximum(size, 1.0))
    beyond = np.maximum(log_size - log_bytes[-1], 0.0)
    return cast(Seconds, np.exp(np.interp(log_size, log_bytes, log_times) + beyond))
