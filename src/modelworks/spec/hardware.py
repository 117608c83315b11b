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


class GemmTime(Section):
    """How long one matrix product (m, k) x (k, n) takes."""

    precision: Precision
    threads: PositiveInt = 1
    """Of the process that multiplies; on a CPU."""
    m: PositiveInt
    n: PositiveInt
    k: PositiveInt
    time_s: PositiveFloat


class AttentionTime(Section):
    """How long the causal attention of one layer takes, forward and backward together, without its linear maps."""

    precision: Precision
    threads: PositiveInt = 1
    batch: PositiveInt
    seq_len: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    softcap: bool
    """Whether its logits are capped, which no fused kernel does."""
    time_s: PositiveFloat


class CollectiveTime(Section):
    """How long processes take to exchange a tensor."""

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    ranks: PositiveInt
    """Processes that take part, each of one thread."""
    bytes: Bytes
    """The whole tensor: what is reduced, what each process has after a gather or had before a scatter, what each sends
    to all (itself included)."""
    time_s: PositiveFloat


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
    cores: PositiveInt | None = None
    """Of a CPU: how many threads compute at once, whichever process they belong to."""
    gemm_measured: list[GemmTime] = []
    attention_measured: list[AttentionTime] = []
    collectives_measured: list[CollectiveTime] = []
    elementwise_bandwidth_bytes: ByteRate | None = None
    """Bytes per second that an elementwise operation reads and writes together, allocation of its result included."""
    operator_overhead_s: PositiveFloat | None = None
    """What PyTorch takes for one operator however small its tensors, forward and backward together."""
    layer_overhead_s: PositiveFloat | None = None
    """What one layer takes however small, per micro batch: forward, backward and its part of the optimizer's step."""
    step_overhead_s: PositiveFloat | None = None
    """What a step takes beside its layers however small: embedding, head, loss, clipping."""
    disk_write_bytes: ByteRate | None = None
    """Bytes per second written to the folder of runs, until they are on the disk."""
    disk_read_bytes: ByteRate | None = None


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
