"""What runs are made on: one device, and the cluster that many of them form.

A `DeviceSpec` is one GPU (or the CPU of this machine) as its vendor states it; a `ClusterSpec` is how many of them
there are and how they are wired: the scale-up domain (NVLink), the scale-out network, storage, power and price.
Rates are peaks; what is reached of them is `plan/`'s subject.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modelworks.spec.fields import ByteRate, Bytes, Fraction, PositiveFloat, PositiveInt, Section

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp4"]


class DeviceSpec(Section):
    """One accelerator (or one machine's CPU): peaks per device, dense (no sparsity)."""

    name: str
    matches: list[str] = []
    """Patterns (as file names have them, in lower case) of what lists of measured runs call it."""
    kind: Literal["gpu", "cpu"] = "gpu"
    peak_flops: dict[Precision, PositiveFloat]
    """Dense matrix throughput in FLOP/s by precision."""
    memory_bytes: Bytes
    memory_bandwidth_bytes: ByteRate
    scale_up_bandwidth_bytes: ByteRate | None = None
    """NVLink bandwidth in one direction, bytes/s."""
    flash_2_slowdown: Annotated[float, Field(ge=1)] = 1.0
    """Time of FlashAttention-2 over that of the fastest fused attention on this device."""
    power_w: PositiveFloat
    """Thermal design power."""
    price_usd: PositiveFloat | None = None
    rent_usd_per_hour: PositiveFloat | None = None


class NetworkSpec(Section):
    """The scale-out network between nodes."""

    kind: Literal["infiniband", "ethernet", "loopback"] = "infiniband"
    nic_bandwidth_bytes: ByteRate
    """One network port, one direction."""
    nics_per_node: PositiveInt = 8
    latency_s: PositiveFloat = 5e-6
    """One hop through the network, end to end, for a small message."""
    levels: PositiveInt = 2
    """Levels of switches: 2 for leaf and spine, 3 with a core."""
    oversubscription: Annotated[float, Field(ge=1)] = 1.0
    """Bandwidth into the leaf switches over the bandwidth out of them."""
    nodes_per_island: PositiveInt | None = None
    """Nodes that reach each other at full bandwidth, below the oversubscribed level."""


class ClusterSpec(Section):
    """A cluster of equal nodes."""

    name: str = "cluster"
    preset: str | None = None
    device: str = "local"
    """The catalog name of the device, or a path to a hardware file."""
    gpus: PositiveInt
    """Devices in all."""
    gpus_per_node: PositiveInt = 8
    scale_up_domain: PositiveInt = 8
    """Devices that NVLink joins (8 for HGX, 72 for NVL72)."""
    network: NetworkSpec | None = None
    """Absent on one node."""
    storage_bandwidth_bytes: ByteRate | None = None
    """What the whole cluster writes to or reads from shared storage."""
    node_overhead_w: Annotated[float, Field(ge=0)] = 0.0
    """Power of a node beyond its devices."""
    pue: Annotated[float, Field(ge=1)] = 1.2
    """Power usage effectiveness: power of the whole site over that of its computers."""
    electricity_usd_per_kwh: Annotated[float, Field(ge=0)] = 0.08
    node_overhead_usd: Annotated[float, Field(ge=0)] = 0.0
    """Price of a node beyond its devices."""
    availability: Fraction = 1.0

    @model_validator(mode="after")
    def _whole_nodes(self) -> ClusterSpec:
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus = {self.gpus} doesn't fill nodes of gpus_per_node = {self.gpus_per_node}")
        if self.gpus > self.gpus_per_node and self.network is None:
            raise ValueError(f"gpus = {self.gpus} stand in several nodes, and network is missing")
        return self

    @property
    def nodes(self) -> int:
        """How many nodes the devices fill."""
        return max(1, self.gpus // self.gpus_per_node)
