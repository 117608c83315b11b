"""How long one kernel takes on one device: matrix products, attention, streams of memory, collectives on NVLink.

Two ideas. Every time is a *reference over an efficiency*: the reference is what the vendor's peaks allow (a roofline of
arithmetic and memory traffic, or of a link's bandwidth) plus the kernel's latency, and the efficiency is a smooth
surface over the logarithms of the shape, distilled from measurements by `tools/distill_kernels.py` into
`spec/catalog/kernels/`. So shapes beyond the measured ones keep the efficiency of the nearest and grow as the roofline
does, and no time falls below what the peaks allow. Devices without a table get the constants of
`catalog/kernels/typical*.toml`, and `Kernels.measured` is False.

All arguments are arrays that broadcast; all times are seconds of a kernel that runs alone. What a long training step
loses beyond that (power limits, gaps between launches) is not in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modelworks.spec import catalog
from modelworks.spec.errors import InputError
from modelworks.spec.fields import nearest
from modelworks.spec.hardware import DeviceSpec, Precision

Seconds = NDArray[np.float64]
ProductPrecision = Precision | Literal["fp8_block"]
"""`fp8` scales per tensor; `fp8_block` per 128 x 128 block of the weights and 1 x 128 of the activations (DeepSeek-V3,
arXiv:2412.19437, section 3.3)."""
CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]

_INPUT_BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "fp4": 0.5}
_OUTPUT_BYTES = {"fp32": 4.0, "tf32": 4.0}
"""Narrower inputs leave their product in 16 bits."""
_SURFACE_OF = {"fp8_block": ("fp8_block", "fp8", "bf16"), "fp8": ("fp8", "bf16"), "fp4": ("fp4", "fp8", "bf16")}
"""Which surface stands for a precision, best first; all others are bf16's, at their own peak."""
_BLOCK = 32_768
"""Elements that one pass of a lookup handles: its temporaries stay in the processor's cache."""


@dataclass(frozen=True)
class Surface:
    """An efficiency over a regular grid in the base-2 logarithms of its arguments, multilinear in all logarithms."""

    first: tuple[float, ...]
    """Base-2 logarithm of the first node, per axis."""
    step: tuple[float, ...]
    shape: tuple[int, ...]
    log_efficiency: Seconds
    """Natural logarithms at the nodes, row-major and flat."""

    @classmethod
    def read(cls, table: dict[str, Any]) -> Surface:
        """From a catalog table: `first`, `step`, `shape` and `efficiency`, whitespace-separated, in thousandths."""
        shape = tuple(int(size) for size in table["shape"])
        values = np.log(np.array(table["efficiency"].split(), dtype=np.float64) / 1000.0)
        if values.size != np.prod(shape):
            raise InputError(f"efficiency has {values.size} values: its shape {list(shape)} needs {np.prod(shape)}")
        return cls(tuple(table["first"]), tuple(table["step"]), shape, values)

    def corners(self, *arguments: NDArray[np.float64]) -> list[tuple[NDArray[np.intp], NDArray[np.float64]]]:
        """The nodes around each point and their weights, which sum to one; points beyond the grid move to its edge."""
        found: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = []
        for first, step, size, argument in zip(self.first, self.step, self.shape, arguments, strict=True):
            if size == 1:
                found = found or [(np.zeros(argument.shape, dtype=np.intp), np.ones(argument.shape))]
                continue
            place = np.clip((np.log2(argument) - first) / step, 0.0, size - 1.0)
            lower = np.minimum(place.astype(np.intp), size - 2)
            upper_weight = place - lower
            lower_weight = 1.0 - upper_weight
            if not found:
                found = [(lower, lower_weight), (lower + 1, upper_weight)]
                continue
            found = [
                corner
                for node, weight in found
                for start in (node * size + lower,)
                for corner in ((start, weight * lower_weight), (start + 1, weight * upper_weight))
            ]
        return found

    def at(self, *arguments: ArrayLike) -> NDArray[np.float64]:
        """Efficiency (0 to 1] at positive arguments, broadcast against each other."""
        if self.log_efficiency.size == 1:
            shape = np.broadcast_shapes(*(np.shape(argument) for argument in arguments))
            return np.full(shape, np.exp(self.log_efficiency[0]))
        broadcast = np.broadcast_arrays(*(np.asarray(argument, dtype=np.float64) for argument in arguments))
        flat = [argument.reshape(-1) for argument in broadcast]
        result = np.empty(flat[0].size)
        for start in range(0, result.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            total = np.zeros(result[block].size)
            for node, weight in self.corners(*(argument[block] for argument in flat)):
                total += weight * self.log_efficiency[node]
            np.exp(total, out=result[block])
        return result.reshape(broadcast[0].shape)


@dataclass(frozen=True)
class Link:
    """One kind of collective: its latency by the number of ranks, and its efficiency by bytes and ranks."""

    latency_s: float
    latency_per_doubling_s: float
    """Added for each doubling of the ranks beyond two."""
    efficiency: Surface


@dataclass(frozen=True)
class Kernels:
    """One device's kernel times."""

    device: DeviceSpec
    measured: bool
    """False where typical efficiencies stand in for measurements of this device."""
    launch_s: float
    """The shortest kernel."""
    products: dict[str, Surface]
    """Dense products over (m, n, k), by precision."""
    grouping: Surface
    """What a grouped product keeps of the dense one's efficiency, over (rows per group, the narrower of n and k)."""
    fused_attention: Surface
    """Over (head dimension, queries of all heads, mean length seen x 2)."""
    latent_attention: Surface | None
    """The same without the head dimension, for the 192-wide keys and 128-wide values of latent attention."""
    streams: Surface
    """Memory-bound kernels over bytes moved."""
    links: dict[str, Link]
    link_bandwidth_bytes: float | None
    host_is_device: bool
    """Whether what the host takes to launch kernels adds to their time, as on a processor, or runs beside it."""

    def gemm(self, m: ArrayLike, n: ArrayLike, k: ArrayLike, precision: ProductPrecision) -> Seconds:
        """Time of one product of (m, k) by (k, n); in training m is tokens, n the output and k the inner width.

        fp8 and fp4 are the product alone: casting the inputs is `memory_bound`.

        Raises
        ------
        InputError
            If the device's peak in that precision is unknown.
        """
        m, n, k = _positive(m=m, n=n, k=k)
        reference = self._product_roofline(1.0, m, n, k, precision) + self.launch_s
        return np.asarray(reference / self._product_surface(precision).at(m, n, k))

    def grouped_gemm(
        self, groups: ArrayLike, m: ArrayLike, n: ArrayLike, k: ArrayLike, precision: ProductPrecision
    ) -> Seconds:
        """Time of `groups` products of (m, k) by (k, n) with a matrix each, in one launch; m is the rows per group.

        The efficiency is that of a dense product with the rows of all groups, times what grouping keeps of it. All
        groups are equally full: an uneven load is the caller's to add.
        """
        groups, m, n, k = _positive(groups=groups, m=m, n=n, k=k)
        reference = self._product_roofline(groups, m, n, k, precision) + self.launch_s
        dense = self._product_surface(precision).at(groups * m, n, k)
        return np.asarray(reference / (dense * self.grouping.at(m, np.minimum(n, k))))

    def attention(
        self,
        batch: ArrayLike,
        seq_q: ArrayLike,
        seq_kv: ArrayLike,
        heads: ArrayLike,
        kv_heads: ArrayLike,
        head_dim: ArrayLike,
        causal: ArrayLike,
        precision: Precision,
        value_head_dim: ArrayLike | None = None,
    ) -> Seconds:
        """Time of the forward pass of a fused (flash) attention kernel, without projections.

        A causal mask aligns the last query with the last key, so each of `seq_q` queries sees what is before it, and
        only visible pairs count: 2 * batch * heads * (head_dim + value_head_dim) FLOPs each (Dao 2023,
        arXiv:2307.08691, section 4.1, counts the same). `value_head_dim` is `head_dim` if not given.
        """
        batch, seq_q, seq_kv, heads, kv_heads, head_dim = _positive(
            batch=batch, seq_q=seq_q, seq_kv=seq_kv, heads=heads, kv_heads=kv_heads, head_dim=head_dim
        )
        latent = value_head_dim is not None and self.latent_attention is not None
        (value_dim,) = (head_dim,) if value_head_dim is None else _positive(value_head_dim=value_head_dim)
        queries = np.minimum(seq_q, seq_kv)
        pairs = np.where(causal, queries * seq_kv - queries * (queries - 1.0) / 2.0, seq_q * seq_kv)
        width = head_dim + value_dim
        flop = 2.0 * batch * heads * width * pairs
        moved = _INPUT_BYTES[precision] * batch * width * (heads * seq_q + kv_heads * seq_kv)
        reference = self._roofline(flop, moved, precision) + self.launch_s
        all_queries = batch * heads * seq_q
        seen = 2.0 * pairs / seq_q
        surface = self.fused_attention.at(head_dim, all_queries, seen)
        if latent and self.latent_attention is not None:
            surface = np.where(head_dim == value_dim, surface, self.latent_attention.at(all_queries, seen))
        return np.asarray(reference / surface)

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
        """Times of causal attention's forward pass and of its backward pass, which takes `backward_ratio` of it.

        A GPU's fused kernels cap the logits in passing; a processor's `softcap` attention is another one.
        """
        forward = self.attention(batch, seq, seq, heads, kv_heads, head_dim, True, precision)
        return forward, np.asarray(forward * backward_ratio)

    def memory_bound(self, bytes_moved: ArrayLike) -> Seconds:
        """Time of one kernel that reads and writes `bytes_moved` in all and computes next to nothing."""
        moved = np.asarray(bytes_moved, dtype=np.float64)
        reference = moved / self.device.memory_bandwidth_bytes + self.launch_s
        return np.asarray(reference / self.streams.at(np.maximum(moved, 1.0)))

    def collective(self, kind: CollectiveKind, bytes_: ArrayLike, ranks: ArrayLike) -> Seconds:
        """Time of one collective among `ranks` devices of one scale-up domain; none for one rank.

        `bytes_` is the *full tensor*: for all_gather what each rank holds afterwards, for reduce_scatter and all_reduce
        what each rank holds before, for all_to_all one rank's whole send buffer, its own share included. A link then
        carries (ranks - 1) / ranks of it, twice that for all_reduce.

        Raises
        ------
        InputError
            If the kind is none of the four, or no scale-up bandwidth is known for the device.
        """
        if kind not in self.links:
            raise InputError(f"collective {kind!r} is not accepted; {nearest(kind, get_args(CollectiveKind))}")
        if self.link_bandwidth_bytes is None:
            raise InputError(f"scale_up_bandwidth_bytes of {self.device.name} is missing: collectives need it")
        link = self.links[kind]
        size = np.asarray(bytes_, dtype=np.float64)
        count = np.maximum(np.asarray(ranks, dtype=np.float64), 1.0)
        carried = (2.0 if kind == "all_reduce" else 1.0) * (count - 1.0) / count * size
        latency = link.latency_s + link.latency_per_doubling_s * np.maximum(np.log2(count) - 1.0, 0.0)
        time = (carried / self.link_bandwidth_bytes + latency) / link.efficiency.at(np.maximum(size, 1.0), count)
        return np.asarray(np.where((count > 1.0) & (size > 0.0), time, 0.0))

    def _product_surface(self, precision: str) -> Surface:
        return next(self.products[name] for name in _SURFACE_OF.get(precision, ("bf16",)) if name in self.products)

    def _product_roofline(
        self,
        groups: NDArray[np.float64] | float,
        m: NDArray[np.float64],
        n: NDArray[np.float64],
        k: NDArray[np.float64],
        precision: str,
    ) -> NDArray[np.float64]:
        if precision not in _INPUT_BYTES:
            raise InputError(f"precision {precision!r} is not accepted; {nearest(precision, _INPUT_BYTES)}")
        moved = groups * (_INPUT_BYTES[precision] * (m * k + n * k) + _OUTPUT_BYTES.get(precision, 2.0) * m * n)
        return self._roofline(groups * 2.0 * m * n * k, moved, precision)

    def _roofline(self, flop: NDArray[np.float64], moved: NDArray[np.float64], precision: str) -> NDArray[np.float64]:
        peaks: dict[str, float] = {str(name): rate for name, rate in self.device.peak_flops.items()}
        name = "fp8" if precision == "fp8_block" else precision
        if name not in peaks:
            raise InputError(
                f"precision {precision!r} is not accepted on {self.device.name}: its rates are known for "
                f"{', '.join(peaks)}"
            )
        return np.asarray(np.maximum(flop / peaks[name], moved / self.device.memory_bandwidth_bytes))


def kernels_for(device: DeviceSpec) -> Kernels:
    """The kernel times of a device: its table in the catalog, or typical efficiencies where there is none."""
    measured = device.kind == "gpu" and device.name in catalog.names("kernels")
    tables = _tables(device.name if measured else "typical-cpu" if device.kind == "cpu" else "typical")
    bandwidth = device.scale_up_bandwidth_bytes
    if bandwidth is None and tables.link_share_of_memory is not None:
        bandwidth = tables.link_share_of_memory * device.memory_bandwidth_bytes
    return Kernels(
        device=device,
        measured=measured,
        launch_s=tables.launch_s,
        products=tables.products,
        grouping=tables.grouping,
        fused_attention=tables.attention,
        latent_attention=tables.latent_attention,
        streams=tables.streams,
        links=tables.links,
        link_bandwidth_bytes=bandwidth,
        host_is_device=device.kind == "cpu",
    )


@dataclass(frozen=True)
class _Tables:
    """One catalog file, read."""

    launch_s: float
    products: dict[str, Surface]
    grouping: Surface
    attention: Surface
    latent_attention: Surface | None
    streams: Surface
    links: dict[str, Link]
    link_share_of_memory: float | None


@cache
def _tables(name: str) -> _Tables:
    values = catalog.entry("kernels", name).values
    attention = values["attention"]
    return _Tables(
        launch_s=float(values["launch_s"]),
        products={precision: Surface.read(table) for precision, table in values["gemm"].items()},
        grouping=Surface.read(values["grouped_gemm"]),
        attention=Surface.read(attention["fused"]),
        latent_attention=Surface.read(attention["latent"]) if "latent" in attention else None,
        streams=Surface.read(values["memory_bound"]),
        links={
            kind: Link(table["latency_s"], table["latency_per_doubling_s"], Surface.read(table))
            for kind, table in values["collective"].items()
        },
        link_share_of_memory=values.get("link_share_of_memory"),
    )


def _positive(**arguments: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in arguments.items()}
    for name, array in arrays.items():
        if not np.all(array > 0.0):
            raise InputError(f"{name} = {array.min():g} is not accepted: a kernel's shape is positive")
    return tuple(arrays.values())
