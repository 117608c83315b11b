"""What moving bytes between devices takes: groups, where they lie, and the algorithms that serve them.

Two ideas. A group of ranks at a stride lies partly inside a scale-up domain (NVLink) and partly across the network:
`placement` says how many of its ranks share a domain. Inside one domain times come from the device's measured
collectives (`Kernels.collective`); across domains they follow NCCL's hierarchical algorithms: rings whose rate is the
network share of those ranks of the group that sit in one domain, or trees where latency matters more.

Bytes are those of the whole tensor: what an all-gather leaves on each rank, what a reduce-scatter or an all-reduce
reads on each rank, what one rank sends in all in an all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelworks.plan.kernels import CollectiveKind, Kernels
from modelworks.plan.layout import FloatArray, IntArray
from modelworks.spec.hardware import ClusterSpec
from modelworks.spec.software import CalibrationSpec


@dataclass(frozen=True)
class Fabric:
    """A cluster's network as the collectives see it; plain numbers."""

    kernels: Kernels
    domain: int
    """Devices that share a scale-up domain."""
    nic_bytes: float
    """What one device's share of its node's network carries, one direction, bytes/s; infinite on one node."""
    nic_latency_s: float
    efficiency: float
    """Reached share of the network's rate in rings."""
    all_to_all_efficiency: float
    node_devices: int
    island: int
    """Devices that reach each other without oversubscription."""
    oversubscription: float

    def all_gather(self, size_bytes: FloatArray, ranks: IntArray, stride: IntArray) -> FloatArray:
        """Seconds for an all-gather that leaves `size_bytes` on each of `ranks` ranks, `stride` devices apart."""
        return self._ring("all_gather", size_bytes, ranks, stride, passes=1.0)

    def reduce_scatter(self, size_bytes: FloatArray, ranks: IntArray, stride: IntArray) -> FloatArray:
        """Seconds for a reduce-scatter of `size_bytes` on each rank."""
        return self._ring("reduce_scatter", size_bytes, ranks, stride, passes=1.0)

    def all_reduce(self, size_bytes: FloatArray, ranks: IntArray, stride: IntArray) -> FloatArray:
        """Seconds for an all-reduce of `size_bytes` on each rank."""
        return self._ring("all_reduce", size_bytes, ranks, stride, passes=2.0)

    def all_to_all(self, size_bytes: FloatArray, ranks: IntArray, stride: IntArray) -> FloatArray:
        """Seconds for an all-to-all in which each rank sends `size_bytes` in all, its own part included."""
        inside = self.placement(ranks, stride)
        local = self.kernels.collective("all_to_all", size_bytes * inside / ranks, inside)
        away = size_bytes * (ranks - inside) / ranks
        rate = self._rate(ranks, stride) * self.all_to_all_efficiency
        # Messages to all peers are under way together; the latency is that of one, and of starting each.
        remote = away / rate + np.where(ranks > inside, self.nic_latency_s * (1 + 0.1 * (ranks - inside)), 0.0)
        return np.where(ranks > 1, np.maximum(local, remote), 0.0)

    def send(self, size_bytes: FloatArray, stride: IntArray) -> FloatArray:
        """Seconds to send `size_bytes` to the rank `stride` devices away."""
        near = stride < self.domain
        local = self.kernels.collective("all_gather", 2.0 * size_bytes, np.full_like(stride, 2))
        return np.where(near, local, size_bytes / (self.nic_bytes * self.efficiency) + self.nic_latency_s)

    def placement(self, ranks: IntArray, stride: IntArray) -> IntArray:
        """How many ranks of a group share one scale-up domain."""
        inside: IntArray = np.clip(self.domain // np.maximum(stride, 1), 1, ranks)
        return inside

    def _rate(self, ranks: IntArray, stride: IntArray) -> FloatArray:
        """A device's rate into the network, less what an oversubscribed level leaves to groups that cross it."""
        crosses = ranks * stride > self.island
        return np.where(crosses, self.nic_bytes / self.oversubscription, self.nic_bytes)

    def _ring(
        self, kind: CollectiveKind, size_bytes: FloatArray, ranks: IntArray, stride: IntArray, passes: float
    ) -> FloatArray:
        """Rings over domains: each of a domain's `inside` ranks carries its share of the bytes in a ring of its own.

        Thakur et al. 2005 (Optimization of Collective Communication Operations in MPICH), the ring algorithms, with
        the bandwidth of a ring that enters a domain as often as it has ranks there; latency as of NCCL's trees, which
        serve what is small (Sanders et al. 2009): a round trip through log2 of the domains.
        """
        inside = self.placement(ranks, stride)
        domains = np.maximum(1, -(-ranks // inside))
        local = self.kernels.collective(kind, size_bytes, inside)
        rate = self._rate(ranks, stride) * self.efficiency * inside
        remote = passes * size_bytes * (ranks - 1) / np.maximum(ranks, 1) / rate
        hops = np.minimum(domains - 1, 2.0 * np.log2(np.maximum(domains, 1)) + 1.0)
        remote = np.maximum(remote, np.where(inside > 1, local, 0.0)) + passes * hops * self.nic_latency_s
        return np.where(ranks <= 1, 0.0, np.where(domains > 1, remote, local))


def fabric(cluster: ClusterSpec, kernels: Kernels, calibration: CalibrationSpec) -> Fabric:
    """The network of a cluster."""
    network = cluster.network
    if network is None:
        return Fabric(
            kernels, max(cluster.scale_up_domain, cluster.gpus), np.inf, 0.0, 1.0, 1.0, cluster.gpus_per_node,
            cluster.gpus, 1.0,
        )  # fmt: skip
    per_device = network.nic_bandwidth_bytes * network.nics_per_node / cluster.gpus_per_node
    kind = "infiniband" if network.kind == "infiniband" else "ethernet"
    return Fabric(
        kernels=kernels,
        domain=cluster.scale_up_domain,
        nic_bytes=per_device,
        nic_latency_s=network.latency_s,
        efficiency=getattr(calibration, f"{kind}_efficiency"),
        all_to_all_efficiency=calibration.all_to_all_efficiency,
        node_devices=cluster.gpus_per_node,
        island=(network.nodes_per_island or cluster.nodes) * cluster.gpus_per_node,
        oversubscription=network.oversubscription,
    )
