"""The machine itself: how many of which parts a cluster is made of, what it draws and what it costs.

Two ideas. The network is a folded Clos of equal switches: every level but the topmost splits its ports between what is
below and what is above, so a level has as many switches as half their ports hold links, and the topmost uses all ports
downwards. Leaves are rail-optimised: a leaf serves one NIC of each of as many nodes as it has ports downwards, so its
loss touches that many nodes. Power and cost are sums over the bill of materials.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from modelworks.plan.cost import price_of
from modelworks.spec.errors import InputError
from modelworks.spec.facts import parts as read_parts
from modelworks.spec.facts import prices as read_prices
from modelworks.spec.files import device_spec
from modelworks.spec.hardware import ClusterSpec, DeviceSpec
from modelworks.spec.machine import PartsSpec, PricesSpec
from modelworks.spec.simulation import MOST_GPUS

HOURS_PER_YEAR = 8760.0
SWITCH_NAMES = ("leaf_switch", "spine_switch", "core_switch", "super_core_switch")
NODE_OF_PARTS = 8
"""GPUs of the node that the catalog's parts describe."""


@dataclass(frozen=True)
class Network:
    """A folded Clos network."""

    switches: tuple[int, ...]
    """By level, leaves first."""
    links: tuple[int, ...]
    """Cables by level: node to leaf, leaf to spine, spine to core."""
    metres: tuple[float, ...]
    """Mean length of a cable, by level."""
    nodes_per_leaf: int
    bisection_bytes: float
    """Bandwidth between two halves of the nodes, one direction, bytes/s."""


@dataclass(frozen=True)
class Power:
    """What the machine draws, in watts. `total_w` is the site's: the IT power times the PUE."""

    gpus_w: float
    hosts_w: float
    network_w: float
    storage_w: float
    pue: float
    communicating_w: float
    """IT power while all GPUs wait for the network."""
    idle_w: float
    """IT power while the job is down."""
    communication_share: float

    @property
    def it_w(self) -> float:
        """Critical IT power, everything at work."""
        return self.gpus_w + self.hosts_w + self.network_w + self.storage_w

    @property
    def total_w(self) -> float:
        """The site's power at full load."""
        return self.it_w * self.pue

    @property
    def swing_w(self) -> float:
        """How far the IT power falls and rises within each synchronised step."""
        return self.it_w - self.communicating_w

    @property
    def average_w(self) -> float:
        """IT power averaged over a step."""
        return self.it_w - self.communication_share * self.swing_w

    def year_wh(self, load: float = 1.0) -> float:
        """Energy of the site in a year, at a share of full load."""
        return self.total_w * load * HOURS_PER_YEAR

    def profile(self, step_time_s: float, steps: int = 3, down_s: float = 0.0) -> list[tuple[float, float]]:
        """(second, IT watts) corners of some steps, and of a failure behind them if `down_s` is given."""
        corners = []
        for step in range(steps):
            begin, wait = step * step_time_s, (step + 1 - self.communication_share) * step_time_s
            corners += [(begin, self.it_w), (wait, self.it_w), (wait, self.communicating_w)]
            corners.append(((step + 1) * step_time_s, self.communicating_w))
        if down_s:
            end = steps * step_time_s
            corners += [(end, self.idle_w), (end + down_s, self.idle_w), (end + down_s, self.it_w)]
        return corners


@dataclass(frozen=True)
class Cost:
    """What the machine costs, in US dollars."""

    servers_usd: float
    network_usd: float
    storage_usd: float
    building_usd: float
    energy_usd_per_year: float
    upkeep_usd_per_year: float
    lifetime_years: float
    building_years: float
    gpus: int

    @property
    def capital_usd(self) -> float:
        """All that is bought before the first step."""
        return self.servers_usd + self.network_usd + self.storage_usd + self.building_usd

    @property
    def usd_per_year(self) -> float:
        """Write-off, energy and upkeep."""
        it = (self.servers_usd + self.network_usd + self.storage_usd) / self.lifetime_years
        return it + self.building_usd / self.building_years + self.energy_usd_per_year + self.upkeep_usd_per_year

    @property
    def usd_per_gpu_hour(self) -> float:
        """What an hour of one GPU costs its owner."""
        return self.usd_per_year / HOURS_PER_YEAR / self.gpus


@dataclass(frozen=True)
class Machine:
    """A cluster with its bill of materials."""

    cluster: ClusterSpec
    device: DeviceSpec
    parts: PartsSpec
    counts: dict[str, int]
    network: Network | None
    power: Power
    cost: Cost
    transceivers: dict[str, int]
    """By kind: nic, multimode, singlemode; copper cables have none."""
    cables: dict[str, int]
    """By kind: copper, multimode, singlemode."""

    @property
    def nodes_per_scope(self) -> dict[str, int]:
        """How many nodes go down with what fails."""
        nodes, hall = self.cluster.nodes, self.parts.hall
        per_rack = nodes_per_rack(self.cluster, self.parts)
        sizes = {
            "none": 0,
            "cluster": 0,
            "node": 1,
            "rack": per_rack,
            "feed": per_rack * hall.racks_per_feed,
            "leaf": self.network.nodes_per_leaf if self.network else 1,
        }
        return {scope: min(size, nodes) for scope, size in sizes.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        network = asdict(self.network) if self.network else None
        power = {
            "gpus_w": self.power.gpus_w,
            "hosts_w": self.power.hosts_w,
            "network_w": self.power.network_w,
            "storage_w": self.power.storage_w,
            "it_w": self.power.it_w,
            "pue": self.power.pue,
            "total_w": self.power.total_w,
            "step_swing_w": self.power.swing_w,
            "idle_w": self.power.idle_w,
            "year_wh": self.power.year_wh(),
        }
        cost = asdict(self.cost) | {
            "capital_usd": self.cost.capital_usd,
            "usd_per_year": self.cost.usd_per_year,
            "usd_per_gpu_hour": self.cost.usd_per_gpu_hour,
        }
        return {
            "gpus": self.cluster.gpus,
            "device": self.device.name,
            "parts": self.counts,
            "network": network,
            "transceivers": self.transceivers,
            "cables": self.cables,
            "power": power,
            "cost": cost,
        }


def machine(cluster: ClusterSpec, parts: str = "h100-cluster", prices: str = "h100-2024") -> Machine:
    """A cluster's bill of materials, power and cost.

    Raises
    ------
    InputError
        If the cluster has more GPUs than any site is planned for, or its device isn't known.
    """
    if cluster.gpus > MOST_GPUS:
        raise InputError(f"cluster.gpus = {cluster.gpus:_} is not accepted: up to {MOST_GPUS:_} are")
    device, facts, costs = device_spec(cluster.device), read_parts(parts), read_prices(prices)
    net = network(cluster, facts)
    cables = _cables(net, facts)
    transceivers = _transceivers(net, facts)
    power = _power(cluster, device, facts, net, transceivers)
    return Machine(
        cluster=cluster,
        device=device,
        parts=facts,
        counts=components(cluster, facts, net),
        network=net,
        power=power,
        cost=_cost(cluster, device, costs, net, cables, transceivers, power),
        transceivers=transceivers,
        cables=cables,
    )


def network(cluster: ClusterSpec, parts: PartsSpec) -> Network | None:
    """The folded Clos that joins a cluster's NICs; with more levels than stated where those wouldn't reach.

    A network of switches with k ports in n levels reaches 2 (k/2)^n ports (Leiserson 1985; Al-Fares et al. 2008 for
    n = 3: k^3/4). Above an oversubscribed level there are so many times fewer links.
    """
    if cluster.network is None or cluster.nodes == 1:
        return None
    spec, half = cluster.network, parts.switch.ports // 2
    ports = cluster.nodes * spec.nics_per_node
    levels = spec.levels
    while ports > 2 * half**levels:
        levels += 1
    if levels > len(SWITCH_NAMES):
        raise InputError(f"a network of {levels} levels is not accepted: up to {len(SWITCH_NAMES)} are")
    switches, links = [], [ports]
    for level in range(levels):
        top = level == levels - 1
        switches.append(math.ceil(links[level] / (2 * half if top and level else half)))
        if not top:
            # What an oversubscribed network saves, it saves between its two uppermost levels.
            thinned = spec.oversubscription if level == levels - 2 else 1.0
            links.append(math.ceil(links[level] / thinned))
    metres = parts.link.metres
    return Network(
        switches=tuple(switches),
        links=tuple(links),
        metres=tuple(metres[min(level, len(metres) - 1)] for level in range(levels)),
        nodes_per_leaf=min(half, cluster.nodes),
        bisection_bytes=links[-1] * spec.nic_bandwidth_bytes / 2,
    )


def nodes_per_rack(cluster: ClusterSpec, parts: PartsSpec) -> int:
    """Nodes in a rack: the catalog's, or one where NVLink joins a whole rack."""
    if cluster.scale_up_domain > cluster.gpus_per_node:
        return max(1, cluster.scale_up_domain // cluster.gpus_per_node)
    return max(1, parts.hall.nodes_per_rack * NODE_OF_PARTS // max(NODE_OF_PARTS, cluster.gpus_per_node))


def components(cluster: ClusterSpec, parts: PartsSpec, net: Network | None) -> dict[str, int]:
    """How many there are of all that can fail."""
    gpus, nodes = cluster.gpus, cluster.nodes
    racks = math.ceil(nodes / nodes_per_rack(cluster, parts))
    eighths = gpus / NODE_OF_PARTS
    counts = {
        "job": 1,
        "gpu": gpus,
        "memory_stack": round(gpus * parts.node.memory_stacks_per_gpu),
        "node": nodes,
        "cpu": math.ceil(eighths * parts.node.cpus),
        "dimm": math.ceil(eighths * parts.node.dimms),
        "ssd": math.ceil(eighths * parts.node.ssds),
        "psu": math.ceil(eighths * parts.node.psus),
        "nvlink_switch": math.ceil(eighths * parts.node.nvlink_switches) if cluster.scale_up_domain > 1 else 0,
        "nic": nodes * cluster.network.nics_per_node if net and cluster.network else 0,
        "rack": racks,
        "feed": math.ceil(racks / parts.hall.racks_per_feed),
        "cable": sum(net.links) if net else 0,
        "transceiver": sum(_transceivers(net, parts).values()),
    }
    for level, name in enumerate(SWITCH_NAMES):
        counts[name] = net.switches[level] if net and level < len(net.switches) else 0
    return counts


def gpus_for_budget(cluster: ClusterSpec, budget_usd: float, parts: str, prices: str, building: bool = True) -> int:
    """The largest number of GPUs, in whole nodes, whose capital cost is within a budget."""

    def capital(nodes: int) -> float:
        bought = cluster.model_copy(update={"gpus": nodes * cluster.gpus_per_node})
        cost = machine(bought, parts, prices).cost
        return cost.capital_usd if building else cost.capital_usd - cost.building_usd

    low, high = 0, MOST_GPUS // cluster.gpus_per_node
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if capital(middle) <= budget_usd else (low, middle - 1)
    return low * cluster.gpus_per_node


def _kind(metres: float, parts: PartsSpec) -> str:
    if metres <= parts.link.copper_up_to_m:
        return "copper"
    return "multimode" if metres <= parts.link.multimode_up_to_m else "singlemode"


def _cables(net: Network | None, parts: PartsSpec) -> dict[str, int]:
    cables = {"copper": 0, "multimode": 0, "singlemode": 0}
    for links, metres in zip(net.links, net.metres, strict=True) if net else ():
        cables[_kind(metres, parts)] += links
    return cables


def _transceivers(net: Network | None, parts: PartsSpec) -> dict[str, int]:
    """One at a NIC, and at switches one module for several links."""
    modules = {"nic": 0, "multimode": 0, "singlemode": 0}
    if net is None:
        return modules
    each = parts.link.links_per_switch_transceiver
    for level, (links, metres) in enumerate(zip(net.links, net.metres, strict=True)):
        kind = _kind(metres, parts)
        if kind == "copper":
            continue
        if level == 0:
            modules["nic"] += links
            modules[kind] += math.ceil(links / each)
        else:
            modules[kind] += 2 * math.ceil(links / each)
    return modules


def _power(
    cluster: ClusterSpec, device: DeviceSpec, parts: PartsSpec, net: Network | None, transceivers: dict[str, int]
) -> Power:
    draw = parts.draw
    tdp = cluster.gpus * device.power_w
    hosts = cluster.nodes * cluster.node_overhead_w
    switches = sum(net.switches) * parts.switch.power_w if net else 0.0
    optics = transceivers["nic"] * parts.link.nic_transceiver_w
    optics += (transceivers["multimode"] + transceivers["singlemode"]) * parts.link.switch_transceiver_w
    gpus, networking = tdp * draw.gpu_computing, switches + optics
    storage = (tdp + hosts) * draw.storage_and_services if net else 0.0
    return Power(
        gpus_w=gpus,
        hosts_w=hosts,
        network_w=networking,
        storage_w=storage,
        pue=cluster.pue,
        communicating_w=tdp * draw.gpu_communicating + hosts + networking + storage,
        idle_w=tdp * draw.gpu_idle + hosts * draw.host_idle + networking + storage,
        communication_share=draw.communication_share,
    )


def _cost(
    cluster: ClusterSpec,
    device: DeviceSpec,
    prices: PricesSpec,
    net: Network | None,
    cables: dict[str, int],
    transceivers: dict[str, int],
    power: Power,
) -> Cost:
    known = price_of(device)
    each = known.price_usd if known else device.power_w * prices.gpu_with_server_per_watt
    if device.price_usd is not None:
        each = device.price_usd + cluster.node_overhead_usd / cluster.gpus_per_node
    servers = cluster.gpus * each
    networking = 0.0
    if net is not None:
        networking = (
            sum(net.switches) * prices.switch
            + transceivers["nic"] * prices.nic_transceiver
            + transceivers["multimode"] * prices.multimode_transceiver
            + transceivers["singlemode"] * prices.singlemode_transceiver
            + cables["copper"] * prices.copper_cable
            + (cables["multimode"] + cables["singlemode"]) * prices.fibre_cable
            + sum(links * metres for links, metres in zip(net.links, net.metres, strict=True)) * prices.fibre_per_m
        )
    storage = cluster.gpus * prices.storage_per_gpu
    return Cost(
        servers_usd=servers,
        network_usd=networking,
        storage_usd=storage,
        building_usd=power.it_w * prices.building_per_w,
        energy_usd_per_year=power.year_wh() / 1000 * cluster.electricity_usd_per_kwh,
        upkeep_usd_per_year=(servers + networking + storage) * prices.upkeep_fraction,
        lifetime_years=prices.lifetime_years,
        building_years=prices.building_years,
        gpus=cluster.gpus,
    )
